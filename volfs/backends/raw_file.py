"""A regular file as an open volume: for the file driver, and for volumes on file systems that os-brick mounts."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from volfs.backends.base import Extent, Properties
from volfs.backends.local import LocalVolume, end_of, local_errors

T = TypeVar("T")

MAX_EXTENTS = 1000  # in one answer; a file written here and there has millions


class FileVolume(LocalVolume):
    """An open raw file, by way of the page cache. Owns its descriptor.

    Requests carry no deadline: a thread inside the kernel cannot be called back, and one that writes must not be left
    behind unnoticed.
    """

    def __init__(
        self, fd: int, name: str, *, writable: bool, can_resize: bool, threads: trio.CapacityLimiter
    ) -> None:
        properties = Properties(end_of(fd), 1, writable, can_resize)
        super().__init__(fd, name, properties, zero_unit=1)  # file systems zero parts of blocks themselves
        self._threads = threads

    async def pread(self, offset: int, length: int) -> bytes:
        return await self._run(_pread_all, self._fd, offset, length, doing="read")

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        self.check_writable(self._name)
        self._dirty = True
        await self._run(_pwrite_all, self._fd, offset, data, doing="write")

    async def resize(self, size: int) -> None:
        if not self.properties.can_resize:
            await super().resize(size)
        await self._run(os.ftruncate, self._fd, size, doing="resize")
        self._dirty = True
        await self.refresh()

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        return await self._run(_extents, self._fd, offset, offset + length, doing="extents")

    async def aclose(self) -> None:
        if self._fd < 0:
            return
        fd = self._fd
        try:
            with trio.CancelScope(shield=True):
                if self._dirty:
                    await self._run(os.fsync, fd, doing="flush")
        finally:
            self._fd = -1
            with trio.CancelScope(shield=True):
                await self._run(os.close, fd, doing="close")

    async def _run(self, call: Callable[..., T], *args: object, doing: str) -> T:
        with local_errors(doing, self._name):
            return await trio.to_thread.run_sync(call, *args, limiter=self._threads)


async def open_file(
    path: str, name: str, *, writable: bool, can_resize: bool, threads: trio.CapacityLimiter
) -> FileVolume:
    """Open a raw file, which messages call `name`. VolumeNotFound, BackendError."""
    with local_errors("open", path):
        fd = await trio.to_thread.run_sync(_open_regular, path, writable, limiter=threads)
    return FileVolume(fd, name, writable=writable, can_resize=can_resize, threads=threads)


def _pread_all(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    missing = length - len(data)
    while missing:
        data = os.pread(fd, missing, offset + length - missing)
        if not data:
            # Somebody shortened it behind our back. A short answer would look like the end of the volume.
            raise OSError(errno.EIO, f"ends at {offset + length - missing}, before {offset + length}")
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def _pwrite_all(fd: int, offset: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        offset += written
        rest = rest[written:]


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
