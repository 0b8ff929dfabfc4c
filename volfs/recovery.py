"""What a daemon does at its start about what killed ones left on this machine; see journal.py."""

from __future__ import annotations

import logging

import trio

from volfs import journal
from volfs.backends import DRIVERS, backend_class
from volfs.backends.base import deadline
from volfs.errors import VolfsError

log = logging.getLogger(__name__)

SECONDS = 30.0  # for all of it: a start must not wait for a storage that is gone


async def clean_up() -> None:
    """Undo what dead daemons left. What fails is logged, and tried again at the next start; nothing is raised."""
    try:
        records = await trio.to_thread.run_sync(lambda: list(journal.orphans()))
    except VolfsError as exc:
        log.error("cannot clean up after a daemon that was killed: %s", exc)
        return
    async with trio.open_nursery() as nursery:
        for record in records:
            nursery.start_soon(_clean_up, record)


async def _clean_up(record: journal.Record) -> None:
    try:
        if record.driver not in DRIVERS:
            raise VolfsError(f"no driver {record.driver!r} in this volfs")
        with deadline(SECONDS, "clean up"):
            await backend_class(record.driver).clean_up(record.facts)
        await trio.to_thread.run_sync(record.remove)
        log.info("cleaned up after a daemon that was killed: %s", record)
    except VolfsError as exc:
        log.error(
            "could not clean up after a daemon that was killed, left to the next start: %s: %s", record, exc
        )
    except (
        Exception
    ):  # a bug in a driver, or a record that another version wrote, must not keep us from serving
        log.exception("%s: unexpected error while cleaning up; a bug in volfs", record)
    finally:
        record.release()
