"""Requests that go past pyfuse3 (native/fuse_session.c, fuse/requests.py): when they come late, or are taken back."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyfuse3
import pytest
import trio
from mounts import Mount

from volfs.fuse.filesystem import Filesystem
from volfs.fuse.requests import Requests


class NoFilesystem:
    """Nothing is open."""

    def start_read(self, *_: object) -> bool:
        return False

    start_write = start_read

    async def wait_open(self) -> None:
        await trio.sleep_forever()


async def test_a_read_that_fails_when_the_last_task_has_ended_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its request is answered when it is dropped. An exception here would end the daemon before it has flushed."""
    requests = Requests(cast(Filesystem, NoFilesystem()))
    told: list[str] = []

    class LastTask(trio.abc.Instrument):
        """Tells of the read when no task is left, and `serve` does not know it yet."""

        def task_exited(self, task: trio.lowlevel.Task) -> None:
            if requests._tasks is not None and not requests._tasks.child_tasks:
                try:
                    requests._spawn("read_failed", cast(Any, object()), (1, 0, 4096, errno.EIO))
                    told.append("dropped")
                except RuntimeError as exc:
                    told.append(str(exc))

    async def main(**_: int) -> None:
        """Of pyfuse3; ends while a request is under way."""
        cast(trio.Nursery, requests._tasks).start_soon(trio.lowlevel.checkpoint)

    monkeypatch.setattr(pyfuse3, "main", main)
    trio.lowlevel.add_instrument(last := LastTask())
    await requests.serve(1, 1)
    trio.lowlevel.remove_instrument(last)
    assert told == ["dropped"]


def test_a_request_that_is_taken_back_does_not_stop_the_daemon(
    mount: Callable[..., Mount], volumes: Path
) -> None:
    """The kernel wakes it for a request that it drops when the program is killed: a read must not wait for another."""
    on = mount(f"file:{volumes}")
    process = on.process.pid
    (descriptor,) = [
        name for name in os.listdir(f"/proc/{process}/fd") if _target(process, name) == "/dev/fuse"
    ]
    flags = re.search(r"flags:\s*(\d+)", Path(f"/proc/{process}/fdinfo/{descriptor}").read_text())
    assert flags is not None
    assert int(flags[1], 8) & os.O_NONBLOCK


def _target(process: int, descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/{process}/fd/{descriptor}")
    except OSError:  # closed meanwhile
        return ""
