"""A regular file as an open volume: for the file driver, and for volumes on file systems that os-brick mounts."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

import trio

from volfs.backends.base import Extent
from volfs.backends.local import LocalVolume, local_errors

MAX_EXTENTS = 1000  # in one answer; a file written here and there has millions


class FileVolume(LocalVolume):
    """An open raw file."""

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        return await self._run(_extents, self._fd, offset, offset + length, doing="extents")


async def open_file(
    path: str, name: str, *, writable: bool, can_resize: bool, threads: trio.CapacityLimiter
) -> FileVolume:
    """Open a raw file, which messages call `name`. VolumeNotFound, BackendError."""
    with local_errors("open", path):
        fd = await trio.to_thread.run_sync(_open_regular, path, writable, limiter=threads)
    return FileVolume(
        fd,
        name,
        writable=writable,
        block_size=1,
        zero_unit=1,  # file systems zero parts of blocks themselves
        can_resize=can_resize,
        threads=threads,
    )


def _open_regular(path: str, writable: bool) -> int:
    # O_NONBLOCK: a FIFO put in the file's place must not hold the thread; regular files ignore it.
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR if writable else os.O_RDONLY)
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _extents(fd: int, begin: int, end: int) -> list[Extent]:
    """What `BackendVolume.extents` promises, by lseek(2)'s SEEK_DATA and SEEK_HOLE.

    These count as data what the page cache has not written yet; a file system that knows no holes, as data all that is
    before the end of the file. That they move the descriptor's position harms nobody: all else here says where it
    reads and writes, and two threads that seek do not need to find the position where they left it.
    """
    found: list[Extent] = []
    while begin < end and len(found) < MAX_EXTENTS:
        try:
            data = min(os.lseek(fd, begin, os.SEEK_DATA), end)
            # Punched since, it may be: then no data is found here, and the next round looks further.
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end) if data < end else end
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # no data from here to the end of the file
                data = min(max(begin, os.fstat(fd).st_size), end)
                # Beyond the end, if somebody shortened it behind our back, is no hole: a read tells of the error.
                hole = end
            elif exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # such a seek is not known here, as on ramfs
                data, hole = begin, end
            else:
                raise
        if begin < data:
            found.append(Extent(begin, data - begin, data=False))
        if data < hole:
            found.append(Extent(data, hole - data, data=True))
        begin = hole
    return found
