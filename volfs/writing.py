"""The target's side of a copy: blocks and zeros, one behind the other."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, Protocol

from volfs.comparing import BLOCK_SIZE
from volfs.descriptors import Place, descriptor
from volfs.extents import Zeroer
from volfs.reading import would_block

PAGE = 4096  # what direct I/O takes multiples of, whatever the storage's sectors


class Writer(Protocol):
    def write(self, block: bytes) -> Iterator[int]:
        """Write all of it; yields how much each call has written."""

    def zero(self, length: int) -> Iterable[int]:
        """Make as much zeros; yields how much more is."""


class DescriptorWriter:
    """Writes at offsets of a descriptor, past the page cache where that can be: blocks of whole pages.

    A copy of a volume into the page cache costs more than the copy itself, and throws out what others need there: where
    a machine has to fault its memory in, 4.6 s of processor time for each GiB, and 1.2 s past it. To copy each block
    once more, so that it is aligned, takes a tenth of a second of them.

    The descriptor is the caller's own, with O_DIRECT set for each such write. Another one would do for a file; but to a
    volume opened with O_TRUNC, what is written by others is a part that this one has skipped, and becomes zeros.
    """

    def __init__(self, place: Place, done: int) -> None:
        """`done` bytes of the copy are there already."""
        self._number = place.number
        self._offset = place.start + done
        self._zeroer = Zeroer(place.number)
        self._memory: mmap.mmap | None = mmap.mmap(-1, BLOCK_SIZE)

    def write(self, block: bytes) -> Iterator[int]:
        rest = memoryview(block)
        while rest:
            written = self._write_direct(rest) or self._write_cached(rest)
            if not written:
                raise _takes_nothing()
            self._offset += written
            yield written
            rest = rest[written:]

    def _write_direct(self, data: memoryview) -> int:
        """As much as the memory holds; 0 of what is not of whole pages, or where the file takes no such write."""
        length = min(len(data), BLOCK_SIZE)
        if self._memory is None or self._offset % PAGE or length % PAGE:
            return 0
        flags = fcntl.fcntl(self._number, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._number, fcntl.F_SETFL, flags | os.O_DIRECT)
            with memoryview(self._memory)[:length] as part:
                part[:] = data[:length]
                return os.pwrite(self._number, part, self._offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self._memory = None  # no direct I/O there, or none of pages
            return 0
        finally:
            fcntl.fcntl(self._number, fcntl.F_SETFL, flags)

    def _write_cached(self, data: memoryview) -> int:
        written = os.pwrite(self._number, data, self._offset)
        _write_back(self._number, self._offset, written)
        return written

    def zero(self, length: int) -> Iterator[int]:
        begin, self._offset = self._offset, self._offset + length
        return self._zeroer.zero(begin, begin + length)


def _write_back(number: int, offset: int, length: int) -> None:
    """Have the kernel begin to, and not wait with all of it until it is made stable at the end.

    That is what the advice does to pages that are dirty; there is no call for just this but Linux's sync_file_range,
    which Python does not have.
    """
    with suppress(OSError):  # of what is no file
        os.posix_fadvise(number, offset, length, os.POSIX_FADV_DONTNEED)


class StreamWriter:
    """Writes by the methods of a file object, holes as well: what it holds there, nobody knows."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, block: bytes) -> Iterator[int]:
        rest: bytes | memoryview = block  # RBDVolumeIOWrapper takes nothing but bytes
        while rest:
            written: int | None = self._file.write(rest)
            if written is None:
                # RBDVolumeIOWrapper has written all, a non-blocking raw file nothing.
                number = descriptor(self._file)
                if number is not None and not os.get_blocking(number):
                    raise would_block()
                written = len(rest)
            if not written:
                raise _takes_nothing()
            yield written
            rest = memoryview(rest)[written:]

    def zero(self, length: int) -> Iterator[int]:
        block = bytes(min(length, BLOCK_SIZE))
        for offset in range(0, length, len(block)):
            yield from self.write(block[: length - offset])


def _takes_nothing() -> OSError:
    return OSError(errno.EIO, "the target takes no bytes, and tells no error")
