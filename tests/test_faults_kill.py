"""The daemon is killed at random moments under programs that write: what they fsynced is there, and nobody dead is."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from ceph_daemons import standing_still
from journal_writer import Journal
from mounts import is_mounted, mounted, wait_until
from services import MIB, Services
from volumes import Storage
from writers import Writer, path_of, writing

import volfs
from volfs import api

SIZE = 6 * MIB  # more than one object of RBD
WRITERS = 2  # on each volume: one through the page cache, one with O_DIRECT
LATEST = 120  # steps of a writer's account, after which the daemon is killed at the latest


def wait_for_writes(writers: list[Writer], more: int) -> None:
    """One of them has written so often from now on."""
    goals = [writer.journal.count("w") + more for writer in writers]
    wait_until(
        lambda: any(it.journal.count("w") >= goal for it, goal in zip(writers, goals, strict=True)),
        "they write",
        60,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "rounds",
    [10, pytest.param(100, marks=[pytest.mark.thorough, pytest.mark.timeout(1500)])],
)
def test_what_was_fsynced_survives_a_daemon_that_is_killed_again_and_again(
    rounds: int,
    storage: Storage,
    services: Services,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """On the same volumes, whose writers keep one account over all rounds.

    In every other round Ceph does not answer in the end, so that what the daemon has taken over from programs and not
    passed on is lost for sure. (Else it is on its way in a moment, and no kill would ever find it.)
    """
    volumes = [storage.make("rbd", SIZE), storage.make("iscsi", SIZE)]
    prefixes = [stored.prefix for stored in volumes]
    environment = {key: value for stored in volumes for key, value in stored.environment.items()}
    place = tmp_path_factory.mktemp("k")
    chance = random.Random(rounds)
    journals: dict[str, list[Journal]] = {stored.url: [] for stored in volumes}
    with contextlib.ExitStack() as mounts:
        for turn in range(rounds + 1):
            # The mount and the socket that the last daemon left are in its way.
            assert is_mounted(place / "mnt") == bool(turn)
            mount = mounts.enter_context(mounted(place, prefixes, env=environment))
            status = api.status(socket_path=str(mount.socket))
            assert (status.open, status.attached) == ([], []), "handles and leases of the dead"
            for stored in volumes:
                for content in (stored.read(), path_of(mount, stored).read_bytes()):
                    for journal in journals[stored.url]:
                        journal.verify(content, f"after {turn} kills")
            if turn == rounds:
                break
            with contextlib.ExitStack() as stack:
                writers = [
                    writer
                    for stored in volumes
                    for writer in stack.enter_context(
                        writing(path_of(mount, stored), tmp_path, SIZE, count=WRITERS, seed=turn)
                    )
                ]
                for stored in volumes:
                    journals[stored.url] = [
                        it.journal for it in writers if it.journal.path.stem == stored.place[-1]
                    ]
                holder = volfs.open_volume(volumes[0].url, "r+b", socket_path=str(mount.socket))
                wait_for_writes(writers, chance.randrange(1, LATEST))
                with contextlib.ExitStack() as silence:
                    if turn % 2:
                        silence.enter_context(standing_still(services, "ceph-osd"))
                        wait_for_writes(writers, 40)  # by iSCSI, or by who does not wait for the answer
                    mount.process.kill()
                    mount.process.wait()
                assert "Traceback" not in mount.log, mount.log
                for writer in writers:
                    writer.end()
                    assert writer.journal.errors(), "it was told"
                with contextlib.suppress(OSError):
                    holder.close()
            for stored in volumes:
                stored.evict()
    synced = [journal.count("s") for each in journals.values() for journal in each]
    assert len(synced) == len(volumes) * WRITERS
    assert min(synced) >= rounds, f"too few fsyncs to tell anything: {synced}"
    assert not is_mounted(place / "mnt")
