"""Processes that read and write the same few blocks at once see what a disk may return, checked afterwards.

Each write fills its sectors with a number of its own, and each call is noted with when it began and ended, by the one
clock that all processes have. A disk may answer a read of a sector with what a write has put there that began before
the read was over, unless another write came after that one, and was over before the read began: it is overwritten then.
A range of several sectors may come in pieces of several writes. A single sector may not: but from a page cache, the
kernel's own or that behind a target's file, it is copied without a lock, so that one that is just being written may be
read in halves there. Ceph's objects are not.
"""

from __future__ import annotations

import bisect
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from disks import Disk, disk_maker
from volumes import variants

make_disk = disk_maker(variants(quick=("rbd",), only=("rbd", "iscsi-4096", "block", "file")))

SECTOR = 512
BLOCK = 4096  # of which direct I/O takes whole ones
OBJECT = 4 << 20
BEGIN = OBJECT - 3 * BLOCK  # across two objects of RBD
BLOCKS = 8
CLIENTS = 4
CALLS = 250  # of each client
NOW = sys.maxsize

# A client has the standard library alone, and as little to do between two calls as can be.
CLIENT = f"""
import json, mmap, os, random, sys, time
path, direct, client = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance, clock = random.Random(client), time.monotonic_ns
file = os.open(path, os.O_RDWR | direct)
memory = mmap.mmap(-1, {BLOCKS * BLOCK})  # aligned
sys.stdin.read(1)
calls = []
for number in range({CALLS}):
    first = chance.randrange({BLOCKS})
    length = chance.randint(1, {BLOCKS} - first) * {BLOCK}
    piece, offset = memoryview(memory)[:length], {BEGIN} + first * {BLOCK}
    if chance.random() < 0.5:
        tag = client << 32 | number + 1
        piece[:] = tag.to_bytes(8) * (length // 8)
        begin = clock()
        done = os.pwritev(file, [piece], offset)
        calls.append((True, begin, clock(), offset, length, tag))
    else:
        begin = clock()
        done = os.preadv(file, [piece], offset)
        calls.append((False, begin, clock(), offset, length, piece.hex()))
    assert done == length, done
    if chance.random() < 0.05:
        os.fsync(file)
os.close(file)
print(json.dumps(calls))
"""


@dataclass(frozen=True)
class Write:
    begin: int
    end: int


class Sector:
    """What was done to one, and what may have been read there. Times are the clock's nanoseconds."""

    def __init__(self) -> None:
        self.writes: dict[int, Write] = {0: Write(-1, -1)}  # by tag; at first there are zeros

    def prepare(self) -> None:
        by_end = sorted(self.writes.values(), key=lambda it: it.end)
        self.ends = [write.end for write in by_end]
        self.latest_begins = []  # of the writes up to each that were over by then
        latest = -1
        for write in by_end:
            latest = max(latest, write.begin)
            self.latest_begins.append(latest)

    def why_not(self, tag: int, begin: int, end: int) -> str | None:
        """Why a read within these times may not have had this."""
        write = self.writes.get(tag)
        if write is None:
            return "nobody wrote that"
        if write.begin >= end:
            return "it was written later"
        over = bisect.bisect_left(self.ends, begin)
        if over and self.latest_begins[over - 1] > write.end:
            return "it was overwritten before"
        return None


@pytest.mark.slow
@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_what_processes_read_of_blocks_that_others_write_is_what_a_disk_may_return(
    disk: Disk, direct: int
) -> None:
    disk.stored.write(bytes(BLOCKS * BLOCK), BEGIN)
    clients = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CLIENT, disk.path, str(direct), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in range(1, CLIENTS + 1)
    ]
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(b"!")
        client.stdin.flush()
    outputs = [client.communicate(timeout=120)[0] for client in clients]
    assert [client.returncode for client in clients] == [0] * CLIENTS
    calls = [call for output in outputs for call in json.loads(output)]
    assert sum(both_at_once(calls)) > CLIENTS * CALLS // 4, "the clients hardly met"

    sectors: defaultdict[int, Sector] = defaultdict(Sector)
    for is_write, begin, end, offset, length, tag in calls:
        if is_write:
            for at in range(offset, offset + length, SECTOR):
                sectors[at].writes[tag] = Write(begin, end)
    for sector in sectors.values():
        sector.prepare()
    reads = [(begin, end, offset, bytes.fromhex(data)) for w, begin, end, offset, _, data in calls if not w]
    reads.append((NOW - 1, NOW, BEGIN, disk.stored.read()[BEGIN:][: BLOCKS * BLOCK]))  # all is over
    cached = not direct or disk.stored.driver != "rbd"
    wrong = [found for read in reads for found in impossible(sectors, *read, cached)]
    assert wrong == [], f"{len(wrong)} sectors of {len(reads)} reads, first: {wrong[0]}"


def both_at_once(calls: Sequence[Sequence[int]]) -> list[bool]:
    """Of each call but the first, in the order of their begins, whether one before it was not over yet."""
    ordered = sorted(calls, key=lambda call: call[1])
    latest, found = ordered[0][2], []
    for call in ordered[1:]:
        found.append(call[1] < latest)
        latest = max(latest, call[2])
    return found


def impossible(
    sectors: dict[int, Sector], begin: int, end: int, offset: int, data: bytes, cached: bool
) -> list[str]:
    """What of a read a disk does not return; one `cached` may have halves of what is just being written."""
    found = []
    for at in range(0, len(data), SECTOR):
        sector = sectors[offset + at]
        words = {data[word : word + 8] for word in range(at, at + SECTOR, 8)}
        tags = sorted(int.from_bytes(word) for word in words)
        name = f"sector at {offset + at}, read as {[hex(tag) for tag in tags]}"
        found += [f"{name}: {why}" for tag in tags if (why := sector.why_not(tag, begin, end))]
        if len(tags) > 1 and not (
            cached and any(written.end > begin for tag, written in sector.writes.items() if tag in tags)
        ):
            found.append(f"{name}: of several writes")
    return found


def test_what_no_disk_returns_is_found() -> None:
    """The check itself: of one sector that was written from 10 to 20 and from 30 to 40."""
    sector = Sector()
    sector.writes |= {1: Write(10, 20), 2: Write(30, 40)}
    sector.prepare()
    for tag, begin, end, why in (
        (0, 5, 6, None),
        (0, 15, 16, None),  # while it is written
        (1, 15, 16, None),
        (0, 21, 22, "it was overwritten before"),
        (1, 25, 26, None),
        (1, 35, 36, None),
        (1, 41, 42, "it was overwritten before"),
        (2, 25, 26, "it was written later"),
        (2, 25, 31, None),
        (3, 25, 31, "nobody wrote that"),
    ):
        assert sector.why_not(tag, begin, end) == why, (tag, begin, end)
    halves = (1).to_bytes(8) * 32 + (2).to_bytes(8) * 32
    in_halves = "sector at 0, read as ['0x1', '0x2']: of several writes"
    assert impossible({0: sector}, 35, 36, 0, halves, cached=False) == [in_halves]
    assert impossible({0: sector}, 35, 36, 0, halves, cached=True) == []
    assert in_halves in impossible({0: sector}, 41, 42, 0, halves, cached=True)
