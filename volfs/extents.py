"""The data and holes of an open descriptor: finding them, and making holes.

Whatever the file system does not know is data: it is read, and it is written. Offsets and lengths are in bytes.
lseek(2) moves the descriptor's position, so one thread at a time; whoever needs the position keeps it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

# fallocate(2), from linux/falloc.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10

# How file systems and devices say "not here"; any other error is one of the data. EPERM and ETXTBSY: of a file that
# may be written all the same (a seal, a swap file).
REFUSALS = frozenset(
    {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM, errno.ETXTBSY, errno.ESPIPE}
)
PUNCH_STEP = 16 << 30  # in one call: few for a terabyte, each soon over, so that a copy can be interrupted
ZEROES = bytes(1 << 20)
UNIT = 4096  # what the unaligned part of a block device is measured in: no sector is larger


class Extent(NamedTuple):
    """A run of bytes that is all data or all hole."""

    offset: int
    length: int
    data: bool  # False: a hole, unallocated, which reads as zeros

    @property
    def end(self) -> int:
        return self.offset + self.length


def extents(number: int, offset: int, end: int) -> Iterator[Extent]:
    """The range in runs of data and holes, in order, without gaps; looked for one after the other, as taken."""
    while offset < end:
        data = next_data(number, offset, end)
        if data > offset:
            yield Extent(offset, data - offset, data=False)
        if data < end:
            offset = next_hole(number, data, end)
            yield Extent(data, offset - data, data=True)
        else:
            return


def common_extents(one: int, other: int, shift: int, offset: int, end: int) -> Iterator[Extent]:
    """As `extents` of `one`, for holes that `other` has as well, `shift` bytes further on."""
    while offset < end:
        first = next_data(one, offset, end)
        second = next_data(other, offset + shift, end + shift) - shift
        data = min(first, second)
        if data > offset:
            yield Extent(offset, data - offset, data=False)
        if data == end:
            return
        found, beyond = (one, 0) if first == data else (other, shift)
        offset = next_hole(found, data + beyond, end + beyond) - beyond
        yield Extent(data, offset - data, data=True)


def next_data(number: int, offset: int, end: int) -> int:
    """The first byte from `offset` on that may be data; `end` where all before it is known to be hole."""
    try:
        return min(os.lseek(number, offset, os.SEEK_DATA), end)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            # None up to the end of the file. What is past that is no hole: reading or writing there will tell.
            return end if os.lseek(number, 0, os.SEEK_END) >= end else offset
        if exc.errno not in REFUSALS:
            raise
        return offset


def next_hole(number: int, offset: int, end: int) -> int:
    """The end of the data that `offset` is in, `end` at the most."""
    try:
        hole = os.lseek(number, offset, os.SEEK_HOLE)
    except OSError as exc:
        if exc.errno != errno.ENXIO and exc.errno not in REFUSALS:
            raise
        return end
    return min(hole, end) if hole > offset else end  # somebody punches meanwhile: do not stay there for ever


class Zeroer:
    """Makes ranges of one descriptor read as zeros, in the cheapest way that it has."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._modes = [
            PUNCH_HOLE | KEEP_SIZE,
            ZERO_RANGE | KEEP_SIZE,
        ]  # that were not refused, the best first
        self._unit = 1

    def zero(self, offset: int, end: int) -> Iterator[int]:
        """Yields how many bytes more are zeros. What is a hole already is left alone."""
        while offset < end:
            begin = next_data(self._number, offset, end)
            if begin == offset:
                begin = self._step(offset, min(end, offset + PUNCH_STEP))
            yield begin - offset
            offset = begin

    def _step(self, offset: int, end: int) -> int:
        """Make a part of the range zeros, from its beginning; returns where that part ends."""
        for mode in list(self._modes):
            first, last = -(-offset // self._unit) * self._unit, end // self._unit * self._unit
            if first >= last:
                break
            if first > offset:
                return self._write(offset, first)
            try:
                fallocate(self._number, mode, offset, last - offset)
            except OSError as exc:
                if exc.errno == errno.EINVAL and self._unit == 1:
                    self._unit = UNIT  # a block device takes nothing but whole sectors
                    return self._step(offset, end)
                if exc.errno not in REFUSALS:
                    raise
                self._modes.remove(mode)
            else:
                return last
        return self._write(offset, next_hole(self._number, offset, end))

    def _write(self, offset: int, end: int) -> int:
        written = os.pwrite(self._number, memoryview(ZEROES)[: end - offset], offset)
        if not written:
            raise OSError(errno.EIO, "the target takes no bytes, and tells no error")
        return offset + written


def fallocate(number: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which os does not have: posix_fallocate takes no mode."""
    call = _libc_fallocate()
    while call(number, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


@cache
def _libc_fallocate() -> Any:
    call = ctypes.CDLL(None, use_errno=True).fallocate64  # with that name an offset has 64 bits everywhere
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call
