"""The whole life of volumes, in any order: attached, opened, written, resized, closed, detached, the daemon killed.

A state machine of hypothesis takes the steps by volfs.api and by system calls, on a daemon and a storage that are
real, and keeps account of each sector: what it reads as, and what else it may be once the daemon was killed. What was
flushed stays; of the rest each sector is as one of the writes since has left it, or as it was before.

A flush that does nothing may go unnoticed here, for most writes reach the storage in a moment anyway; the tests of
faults hold the storage back for that.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mounts import Mount, mounted, wait_until
from services import MIB
from volumes import Storage, StoredVolume, raises

from volfs import api
from volfs.extents import KEEP_SIZE, PUNCH_HOLE, fallocate

SECTOR = 4096
SIZE = MIB + 2 * SECTOR
SIZES = (SIZE, SIZE + 16 * SECTOR, 2 * SIZE)
SECTORS = SIZE // SECTOR  # that the volume always has
ZERO = 0
NAME = "model"
STEPS = 50
MOST_HANDLES = 4
FLAGS = {"buffered": os.O_RDWR, "direct": os.O_RDWR | os.O_DIRECT, "synchronous": os.O_RDWR | os.O_DSYNC}

numbers = st.integers(0, MOST_HANDLES - 1)
places = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 60)).map(
    lambda it: range(it[0], min(it[0] + it[1], SECTORS))
)


def is_attached(life: Life) -> bool:
    return life.path is not None


def is_open(life: Life) -> bool:
    return bool(life.handles)


def has_lived(life: Life) -> bool:
    """Long enough that its end is of interest; a start takes as long as a hundred other steps."""
    return life.age > 12


class Life(RuleBasedStateMachine):
    """Of one volume; `stored` and `directory` are set by a subclass."""

    stored: StoredVolume
    directory: Path

    def __init__(self) -> None:
        super().__init__()
        self.stored.resize(SIZE)
        self.stored.write(bytes(SIZE))
        self.now = [ZERO] * SECTORS
        self.maybe = [{ZERO} for _ in range(SECTORS)]
        self.writes = 0
        self.path: Path | None = None  # of the volume, while it is attached
        self.handles: list[tuple[str, int]] = []
        self.start()

    # ---- the daemon

    def start(self) -> None:
        self.context: AbstractContextManager[Mount] = mounted(self.directory, [], env=self.stored.environment)
        self.mount = self.context.__enter__()
        self.age = 0  # steps of this daemon

    @invariant()
    def grow_older(self) -> None:
        self.age += 1

    @property
    def socket(self) -> str:
        return str(self.mount.socket)

    @rule()
    @precondition(has_lived)
    def kill(self) -> None:
        self.mount.process.kill()
        self.mount.process.wait()
        while self.handles:
            with suppress(OSError):  # ENOTCONN, where there is something to tell
                os.close(self.handles.pop()[1])
        subprocess.run(["umount", "-l", self.mount.path], check=True)
        self.context.__exit__(None, None, None)
        self.path = None
        self.stored.evict()
        wait_until(lambda: not self.stored.users(), "the killed daemon's storage has nobody", 60)
        found = tags(self.stored.read())
        wrong = {
            at: (tag, self.maybe[at])
            for at, tag in enumerate(found[:SECTORS])
            if tag not in self.maybe[at] | {self.now[at]}
        }
        assert not wrong, f"sectors, with what they are and what they may be: {wrong}"
        self.now = found[:SECTORS]
        self.settled()
        self.start()

    @rule()
    @precondition(lambda life: has_lived(life) and not life.handles)
    def stop_and_start(self) -> None:
        assert self.mount.stop() == 0, self.mount.log
        self.context.__exit__(None, None, None)
        self.path = None
        self.check_stored()
        self.start()

    # ---- the volume

    @rule()
    @precondition(lambda life: not is_attached(life))
    def attach(self) -> None:
        attached, connection = api.attach(self.stored.url, NAME, socket_path=self.socket)
        connection.close()
        assert (attached.name, attached.size) == (NAME, self.stored.size)
        self.path = Path(attached.path)

    @rule()
    @precondition(is_attached)
    def detach(self) -> None:
        if self.handles:
            with raises(errno.EBUSY):
                api.detach(NAME, wait=0, socket_path=self.socket)
            return
        api.detach(NAME, socket_path=self.socket)
        self.path = None
        assert self.stored.users() == []
        self.check_stored()

    @rule(size=st.sampled_from(SIZES))
    @precondition(lambda life: not is_attached(life))
    def resize(self, size: int) -> None:
        self.stored.resize(size)

    @rule()
    @precondition(lambda life: not is_attached(life))
    def open_and_close_by_the_api(self) -> None:
        with api.open_volume(self.stored.url, "r+b", socket_path=self.socket) as file:
            assert file.seek(0, os.SEEK_END) == self.stored.size
            file.seek(0)
            file.write(self.next_tag() * (SECTOR // 8))
            self.changed(range(1), self.writes)
        self.settled()
        assert self.stored.users() == []
        self.check_stored()

    # ---- handles

    @rule(how=st.sampled_from(list(FLAGS)))
    @precondition(lambda life: is_attached(life) and len(life.handles) < MOST_HANDLES)
    def open(self, how: str) -> None:
        assert self.path is not None
        self.handles.append((how, os.open(self.path, FLAGS[how])))

    @rule(number=numbers)
    @precondition(is_open)
    def close(self, number: int) -> None:
        os.close(self.handles.pop(number % len(self.handles))[1])
        self.settled()

    @rule(number=numbers, place=places)
    @precondition(is_open)
    def write(self, number: int, place: range) -> None:
        how, file = self.handles[number % len(self.handles)]
        with mmap.mmap(-1, len(place) * SECTOR) as memory:  # aligned
            memory[:] = self.next_tag() * (len(memory) // 8)
            assert os.pwritev(file, [memory], place.start * SECTOR) == len(memory)
        self.changed(place, self.writes)
        if how == "synchronous":
            for at in place:
                self.maybe[at] = {self.writes}

    @rule(number=numbers, place=places)
    @precondition(is_open)
    def punch(self, number: int, place: range) -> None:
        _, file = self.handles[number % len(self.handles)]
        fallocate(file, PUNCH_HOLE | KEEP_SIZE, place.start * SECTOR, len(place) * SECTOR)
        self.changed(place, ZERO)

    @rule(number=numbers, place=places)
    @precondition(is_open)
    def read(self, number: int, place: range) -> None:
        _, file = self.handles[number % len(self.handles)]
        with mmap.mmap(-1, len(place) * SECTOR) as memory:
            assert os.preadv(file, [memory], place.start * SECTOR) == len(memory)
            assert tags(memory[:]) == self.now[place.start : place.stop]

    @rule(number=numbers)
    @precondition(is_open)
    def fsync(self, number: int) -> None:
        os.fsync(self.handles[number % len(self.handles)][1])
        self.settled()
        self.check_stored()

    # ---- the account

    def next_tag(self) -> bytes:
        self.writes += 1
        return self.writes.to_bytes(8)

    def changed(self, place: range, tag: int) -> None:
        for at in place:
            self.now[at] = tag
            self.maybe[at].add(tag)

    def settled(self) -> None:
        """All that was written is stable."""
        self.maybe = [{tag} for tag in self.now]

    def check_stored(self) -> None:
        assert tags(self.stored.read())[:SECTORS] == self.now

    def teardown(self) -> None:
        try:
            while self.handles:
                self.close(0)
            if self.mount.process.poll() is None:
                self.check_stored()
        finally:
            self.context.__exit__(None, None, None)


def tags(data: bytes) -> Sequence[int]:
    """Of each sector, which is of one write."""
    found = []
    for at in range(0, len(data), SECTOR):
        words = {data[word : word + 8] for word in range(at, at + SECTOR, 8)}
        assert len(words) == 1, f"sector {at // SECTOR} is of several writes: {words}"
        found.append(int.from_bytes(words.pop()))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [1, pytest.param(50, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("driver", ["rbd", "iscsi", "file"])
def test_a_volume_holds_what_was_made_stable_through_any_life(
    storage: Storage, tmp_path_factory: pytest.TempPathFactory, driver: str, examples: int
) -> None:
    options: dict[str, Any] = {"sector_size": SECTOR} if driver == "iscsi" else {}
    volume = storage.make(driver, SIZE, **options)

    class LifeOfThis(Life):
        stored = volume
        directory = tmp_path_factory.mktemp("l")

    run_state_machine_as_test(
        LifeOfThis,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            phases=(Phase.explicit, Phase.generate),  # each step of a shorter life would start daemons again
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
