"""A program that writes to a volume and keeps account of it elsewhere, and what its account says the volume must hold.

The account is a file outside of volfs, one line for each step, written with O_APPEND before the step (`w`) or after it
(all others):

    r                           a writer starts; what went before, and was not synced, may be there or not
    w FIRST COUNT VERSION       these slots are about to be written
    a VERSION                   pwrite(2) has returned
    s VERSION                   fsync(2) or close(2) has returned, so all that was acknowledged is stable
    e ERRNO STEP                the step (open, write, fsync, read, close) has failed
    t SECONDS STEP              it took so long, longer than any before
    c                           the volume is closed

Each sector of a slot names the slot, the version and itself, so a lost, torn, old or misplaced write is told from any
other. Run as a script it is the writer: it reads back what it wrote, too, and exits with 3 when that is not what it
should be. It goes on until SIGTERM, or to the first error unless told to keep going.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
SLOT = 16 * 1024
LONGEST_RUN = 16  # slots of one write: 256 KiB
PAUSE_SECONDS = 0.02  # after an error, before it is tried again
MISMATCH = 3  # exit code


def sector(slot: int, version: int, number: int) -> bytes:
    """What version 1 and later of a slot holds in its sector of that number; version 0 is zeros."""
    if not version:
        return bytes(SECTOR)
    head = struct.pack(">QQQ", slot, version, number)
    return (head + hashlib.blake2b(head).digest() * 8)[:SECTOR]


def slot_content(slot: int, version: int) -> bytes:
    return b"".join(sector(slot, version, number) for number in range(SLOT // SECTOR))


def versions_in(slot: int, content: bytes) -> set[int]:
    """The versions that the sectors of a slot hold; -1 for what is no version's of this slot."""
    found = set()
    for number in range(SLOT // SECTOR):
        data = content[number * SECTOR : (number + 1) * SECTOR]
        version = struct.unpack_from(">QQ", data)[1]
        found.add(version if data == sector(slot, version, number) else -1)
    return found


@dataclass
class Journal:
    """The account of one writer, whose slots are `first` and so many behind it."""

    path: Path
    first: int
    slots: int

    def steps(self) -> list[list[str]]:
        """The lines that are complete."""
        text = self.path.read_text() if self.path.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def count(self, kind: str) -> int:
        return sum(step[0] == kind for step in self.steps())

    def errors(self) -> list[tuple[str, str]]:
        """Errno's name, and the step that failed with it."""
        return [(step[1], step[2]) for step in self.steps() if step[0] == "e"]

    def slowest(self) -> float:
        """Seconds."""
        return max((float(step[1]) for step in self.steps() if step[0] == "t"), default=0.0)

    def possible(self, *, acknowledged: bool = False) -> dict[int, set[int]]:
        """The versions that each slot may hold, and no other: the synced one, and those that were written since.

        `acknowledged`: what pwrite(2) has returned for counts as synced. That is what an orderly end promises.
        """
        known: dict[int, set[int]] = {slot: {0} for slot in range(self.first, self.first + self.slots)}
        pending: dict[int, list[int]] = {}  # acknowledged since the last sync, in order
        begun: tuple[range, int] | None = None

        def unsure() -> None:
            for slot, versions in pending.items():
                known[slot].update(versions)
            pending.clear()

        def begun_may_be_there() -> None:
            if begun is not None:
                for slot in begun[0]:
                    known[slot].update((*pending.pop(slot, ()), begun[1]))

        for kind, *rest in self.steps():
            match kind:
                case "w":
                    first, count, version = map(int, rest)
                    begun = range(first, first + count), version
                case "a":
                    assert begun is not None
                    for slot in begun[0]:
                        pending.setdefault(slot, []).append(begun[1])
                    begun = None
                    if acknowledged:
                        for slot, versions in pending.items():
                            known[slot] = {versions[-1]}
                        pending.clear()
                case "s":
                    for slot, versions in pending.items():
                        known[slot] = {versions[-1]}
                    pending.clear()
                case "e" | "r":
                    begun_may_be_there()
                    begun = None
                    unsure()
        begun_may_be_there()
        unsure()
        return known

    def verify(self, content: bytes, when: str, *, acknowledged: bool = False) -> None:
        """The whole volume's content has in each slot what it may have."""
        for slot, versions in self.possible(acknowledged=acknowledged).items():
            found = versions_in(slot, content[slot * SLOT : (slot + 1) * SLOT])
            assert found <= versions, (
                f"{when}: slot {slot} (at {slot * SLOT}) holds version {sorted(found)}, and may only hold"
                f" {sorted(versions)}, says {self.path}"
            )


# ---- the writer ------------------------------------------------------------------------------------------------


class _Failed(Exception):
    """A step has failed, which is in the account."""


class _Run:
    def __init__(
        self, volume: str, journal: str, first: int, slots: int, flags: int, seed: int, keep_going: bool
    ) -> None:
        self.volume, self.first, self.slots, self.flags, self.keep_going = (
            volume,
            first,
            slots,
            flags,
            keep_going,
        )
        account = Journal(Path(journal), first, slots)
        self.version = max((int(step[3]) for step in account.steps() if step[0] == "w"), default=0)
        self.latest: dict[int, int] = {}  # of slots that this run wrote, and nothing failed on since
        self.random = random.Random(f"{journal} {seed}")
        self.longest = 0.0
        self.account = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.stopping = False

    def note(self, *words: object) -> None:
        os.write(self.account, (" ".join(map(str, words)) + "\n").encode())

    def step(self, name: str, call: Callable[[], object]) -> object:
        begun = time.monotonic()
        try:
            return call()
        except OSError as exc:
            self.note("e", errno.errorcode.get(exc.errno or 0, exc.errno), name)
            raise _Failed from exc
        finally:
            took = time.monotonic() - begun
            if took > self.longest:
                self.longest = took
                self.note("t", f"{took:.3f}", name)

    def write(self, file: int) -> None:
        count = self.random.randint(1, min(LONGEST_RUN, self.slots))
        first = self.first + self.random.randrange(self.slots - count + 1)
        self.version += 1
        data = b"".join(slot_content(slot, self.version) for slot in range(first, first + count))
        self.note("w", first, count, self.version)
        for slot in range(first, first + count):
            self.latest.pop(slot, None)
        written = self.step("write", lambda: os.pwrite(file, data, first * SLOT))
        assert written == len(data), f"short write: {written} of {len(data)}"
        self.note("a", self.version)
        for slot in range(first, first + count):
            self.latest[slot] = self.version

    def sync(self, file: int) -> None:
        try:
            self.step("fsync", lambda: os.fsync(file))
        except _Failed:
            self.latest.clear()
            raise
        self.note("s", self.version)

    def read(self, file: int) -> None:
        if not self.latest:
            return
        slot = self.random.choice(list(self.latest))
        data = self.step("read", lambda: os.pread(file, SLOT, slot * SLOT))
        assert isinstance(data, bytes)
        if len(data) != SLOT or data != slot_content(slot, self.latest[slot]):
            found = sorted(versions_in(slot, data.ljust(SLOT, b"\xff")))
            print(f"slot {slot}: read {found}, wrote {self.latest[slot]}", file=sys.stderr)
            raise SystemExit(MISMATCH)

    def run(self) -> None:
        self.note("r")
        try:
            file = self.step("open", lambda: os.open(self.volume, os.O_RDWR | self.flags))
        except _Failed:
            return
        assert isinstance(file, int)
        try:
            while not self.stopping:
                try:
                    self.write(file)
                    chance = self.random.random()
                    if chance < 0.3:
                        self.sync(file)
                    elif chance < 0.6:
                        self.read(file)
                except _Failed:
                    if not self.keep_going:
                        break
                    select.select([], [], [], PAUSE_SECONDS)
        finally:
            with contextlib.suppress(_Failed):
                self.step("close", lambda: os.close(file))
                self.note("s", self.version)
            self.note("c")


def main() -> None:
    volume, journal, *numbers = sys.argv[1:]
    first, slots, flags, seed, keep_going = map(int, numbers)
    run = _Run(volume, journal, first, slots, flags, seed, bool(keep_going))

    def stop(*_: object) -> None:
        run.stopping = True

    signal.signal(signal.SIGTERM, stop)
    run.run()


if __name__ == "__main__":
    main()
