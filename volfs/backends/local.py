"""A file descriptor of this machine as an open volume: what the file and block drivers have in common.

Requests run in threads, since Linux has no asynchronous buffered I/O. They carry no deadline: a thread inside the
kernel cannot be called back, and one that writes must not be left behind unnoticed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from volfs.backends.base import BackendVolume, Properties
from volfs.errors import BackendError, VolfsError, VolumeNotFound

T = TypeVar("T")

THREADS = 16  # requests under way at once for one backend; more only wait for the same disk


class LocalVolume(BackendVolume):
    """An open file or block device. Owns its descriptor."""

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        writable: bool,
        block_size: int,
        can_resize: bool,
        threads: trio.CapacityLimiter,
    ) -> None:
        self._fd = fd
        self._name = name
        self._threads = threads
        self._dirty = False
        self.properties = Properties(_end(fd), block_size, writable, can_resize)

    async def pread(self, offset: int, length: int) -> bytes:
        return await self._run(_pread_all, self._fd, offset, length, doing="read")

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        self._dirty = True
        await self._run(_pwrite_all, self._fd, offset, data, doing="write")

    async def flush(self) -> None:
        # fdatasync also makes a new size stable when it is needed to read the data back (fsync(2)).
        await self._run(os.fdatasync, self._fd, doing="flush")

    async def refresh(self) -> Properties:
        size = await self._run(_end, self._fd, doing="size")
        self.properties = Properties(
            size, self.properties.block_size, self.properties.writable, self.properties.can_resize
        )
        return self.properties

    async def resize(self, size: int) -> None:
        if not self.properties.can_resize:
            await super().resize(size)
        await self._run(os.ftruncate, self._fd, size, doing="resize")
        self._dirty = True
        await self.refresh()

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
                await self._run(os.close, fd, doing="close")  # the last close of a device writes it out

    async def _run(self, call: Callable[..., T], *args: object, doing: str) -> T:
        with local_errors(doing, self._name):
            return await trio.to_thread.run_sync(call, *args, limiter=self._threads)


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


def _end(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_END)  # works for files and block devices alike


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
