"""A file descriptor of this machine as an open volume: what files and block devices have in common.

Requests run in threads. Long ranges are zeroed in steps: a thread inside the kernel cannot be called back, and whoever
waits for it is to wait for one step, not for a terabyte.
"""

from __future__ import annotations

import abc
import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from volfs import extents
from volfs.backends.base import BLOCK_UNIT, ZEROES, BackendVolume, Properties
from volfs.errors import BackendError, VolfsError, VolumeNotFound
from volfs.identity import sys_directory

T = TypeVar("T")

# The modes in use. Without KEEP_SIZE a file that somebody shortened would grow again.
PUNCH_HOLE = extents.PUNCH_HOLE | extents.KEEP_SIZE  # give the space back; the range reads as zeros
ZERO_RANGE = (
    extents.ZERO_RANGE | extents.KEEP_SIZE
)  # the quickest way, as a rule in space that stays allocated
# There is no such mode here. On a device also EBUSY: somebody else holds it exclusively (a mounted file system), and
# the kernel then throws nothing away that its page cache still has to write.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EBUSY)

# What one call zeroes at most. Other requests wait meanwhile for the lock of the file or device: where nothing is
# quicker than writing, a disk of 100 MB/s takes most of a second for this.
_ZERO_STEP = 64 << 20
_ZERO_SECONDS = 0.05  # after which no further step begins before a cancellation was looked for
# In how large pieces zeros are looked for. Chunks of thin pools are as large or larger.
_LOOK_STEP = 64 << 10


class LocalVolume(BackendVolume):
    """What an open file and an open block device have in common. fallocate(2) takes multiples of `zero_unit` bytes."""

    def __init__(self, fd: int, name: str, properties: Properties, *, zero_unit: int) -> None:
        self._fd = fd
        self._name = name
        self._zero_unit = zero_unit
        self._dirty = False
        self.properties = properties

    @abc.abstractmethod
    async def _run(self, call: Callable[..., T], *args: object, doing: str) -> T:
        """The result of a call that may block, made in a thread. VolfsError for its OSErrors."""

    async def discard(self, offset: int, length: int) -> None:
        await self._zero(offset, length, [PUNCH_HOLE], self._write_needed_zeroes, doing="discard")

    async def write_zeroes(self, offset: int, length: int) -> None:
        modes = [ZERO_RANGE, PUNCH_HOLE]  # tmpfs has only the second
        await self._zero(offset, length, modes, super().write_zeroes, doing="write zeroes")

    async def _zero(
        self,
        offset: int,
        length: int,
        modes: Sequence[int],
        write: Callable[[int, int], Awaitable[None]],
        *,
        doing: str,
    ) -> None:
        """Zero the range by the first of `modes` that there is; by `write(offset, length)` where there is none."""
        self.check_writable(self._name)
        self._dirty = True
        end = offset + length
        begin = min(end, offset + -offset % self._zero_unit)  # of the whole units
        stop = max(begin, end - end % self._zero_unit)
        if offset < begin:
            await write(offset, begin - offset)
        while begin < stop:
            reached = await self._zero_some(modes, begin, stop, doing)
            if reached == begin:
                reached = min(stop, begin + _ZERO_STEP)
                await write(begin, reached - begin)
            begin = reached
        if stop < end:
            await write(stop, end - stop)

    async def _zero_some(self, modes: Sequence[int], begin: int, stop: int, doing: str) -> int:
        """Zero a part of the whole units [begin, stop), from its beginning; returns where that ends."""
        return await self._run(fallocate_some, self._fd, modes, begin, stop, doing=doing)

    async def _write_needed_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros by writing, but only where it does not yet.

        Zeros written into a hole would take space instead of giving it back: fstrim would fill a thin pool, whose
        volumes cannot punch holes. They can BLKDISCARD, but that promises nothing of what is read afterwards.
        """
        for begin in range(offset, offset + length, len(ZEROES)):
            data = memoryview(await self.pread(begin, min(len(ZEROES), offset + length - begin)))
            for at in range(0, len(data), _LOOK_STEP):
                zeroes = memoryview(ZEROES)[: min(_LOOK_STEP, len(data) - at)]
                if data[at : at + len(zeroes)] != zeroes:
                    await self.pwrite(begin + at, zeroes)

    async def flush(self) -> None:
        # fdatasync also makes a new size stable when it is needed to read the data back (fsync(2)).
        await self._run(os.fdatasync, self._fd, doing="flush")

    async def refresh(self) -> Properties:
        size = await self._run(end_of, self._fd, doing="size")
        self.properties = replace(self.properties, size=size)
        return self.properties


def device_properties(status: os.stat_result) -> Properties:
    """Those of a block device that is not opened for it: multipath and udev would look at it again."""
    directory = sys_directory(status)
    size = int(directory.joinpath("size").read_text()) * BLOCK_UNIT
    return Properties(size, BLOCK_UNIT, writable=directory.joinpath("ro").read_text().strip() != "1")


def normal_path(path: str) -> str:
    """The one form of an absolute path; ValueError for what is none. Equal files and directories need equal paths."""
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"expected an absolute path, not {path!r}")
    return "/" + os.path.normpath(path).lstrip("/")  # normpath keeps two slashes at the beginning


def volume_path(text: object) -> str | None:
    """The normal form of a path that may be a volume's; None for anything else, such as a directory's."""
    if not isinstance(text, str) or text.endswith("/"):
        return None
    try:
        path = normal_path(text)
    except ValueError:
        return None
    return None if path == "/" else path


@contextmanager
def local_errors(doing: str, name: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, keeping errno and text."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise VolumeNotFound(f"{name}: no such file or device") from exc
    except OSError as exc:
        if isinstance(exc, VolfsError):
            raise
        raise BackendError(f"{name}: {doing}: {exc.strerror}", exc.errno) from exc


def end_of(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_END)  # works for files and block devices alike


def fallocate_some(fd: int, modes: Sequence[int], begin: int, end: int) -> int:
    """Zero the range from its beginning on; returns how far it came in a short time. `begin`: this cannot be done.

    Many steps in one visit to the thread, since those that find nothing to do are over in microseconds.
    """
    until = time.monotonic() + _ZERO_SECONDS
    while begin < end:
        length = min(_ZERO_STEP, end - begin)
        if not _fallocate(fd, modes, begin, length):
            break
        begin += length
        if time.monotonic() > until:
            break
    return begin


def _fallocate(fd: int, modes: Sequence[int], offset: int, length: int) -> bool:
    """Do the first of `modes` that this file or device can; False when it can none. Raises OSError for all else."""
    for mode in modes:
        try:
            extents.fallocate(fd, mode, offset, length)
        except OSError as exc:
            if exc.errno not in _CANNOT:
                raise
        else:
            return True
    return False
