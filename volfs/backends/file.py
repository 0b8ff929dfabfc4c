"""Driver `file`: a directory of raw files, each a volume. The embedded default; needs no service.

Only regular files directly in the directory are volumes; links are not followed, so that no name leads out of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeVar

import msgspec
import trio

from volfs.backends.base import BLOCK_UNIT, Backend, Entry, Extent, Properties, Settings, Source, VolumeInfo
from volfs.backends.local import LocalVolume, end_of, local_errors, normal_path, volume_path
from volfs.errors import BackendError, SourceError, VolumeNotFound
from volfs.identity import local_identity

T = TypeVar("T")

THREADS = 16  # requests under way at once for one backend; more only wait for the same disk
MAX_EXTENTS = 1000  # in one answer; a file written here and there has millions


class FileSource(Source, frozen=True, kw_only=True):
    """A raw file. `path` is absolute."""

    driver: ClassVar[str] = "file"
    path: str

    @property
    def url(self) -> str:
        return f"file:{self.path}"

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


class FileSettings(Settings, frozen=True, kw_only=True):
    """A backend of driver `file`."""

    path: str  # the directory

    def __post_init__(self) -> None:
        try:
            msgspec.structs.force_setattr(self, "path", normal_path(self.path))
        except ValueError as exc:
            raise ValueError(f"path: {exc}") from exc


class FileVolume(LocalVolume):
    """An open raw file, by way of the page cache. Owns its descriptor.

    Requests carry no deadline: a thread inside the kernel cannot be called back, and one that writes must not be left
    behind unnoticed.
    """

    def __init__(self, fd: int, name: str, *, writable: bool, threads: trio.CapacityLimiter) -> None:
        properties = Properties(end_of(fd), 1, writable, can_resize=writable)
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


class FileBackend(Backend):
    driver = "file"
    settings_type = FileSettings
    settings: FileSettings

    def __init__(self, name: str, settings: FileSettings) -> None:
        super().__init__(name, settings)
        self._threads = trio.CapacityLimiter(THREADS)

    @classmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> FileSource:
        path = volume_path(rest)
        if path is None:
            raise SourceError(f"file:{rest}: expected file:/PATH, the absolute path of a file")
        return FileSource(path=path)

    @classmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> tuple[FileSettings, tuple[str, ...]]:
        if not rest.startswith("/") or "\0" in rest:
            raise SourceError(f"file:{rest}: expected file:/PATH, the absolute path of a directory")
        return FileSettings(path=rest), ()

    @classmethod
    def settings_for(cls, source: Source) -> FileSettings:
        assert isinstance(source, FileSource)
        return FileSettings(path=os.path.dirname(source.path))

    def serves(self, source: Source) -> bool:
        return isinstance(source, FileSource) and os.path.dirname(source.path) == self.settings.path

    async def list(self, path: Sequence[str]) -> list[Entry]:
        if path:
            raise VolumeNotFound(f"{self.settings.path}/{'/'.join(path)}: not a directory of volumes")
        with local_errors("list", self.settings.path):
            return [*await trio.to_thread.run_sync(self._scan, limiter=self._threads)]

    async def lookup(self, path: Sequence[str]) -> Entry:
        return await self.stat(FileSource(path=os.path.join(self.settings.path, *path)))

    async def stat(self, source: Source) -> VolumeInfo:
        assert isinstance(source, FileSource)
        with local_errors("stat", source.path):
            status = await trio.to_thread.run_sync(os.lstat, source.path, limiter=self._threads)
        if not stat.S_ISREG(status.st_mode) or not self.serves(source):
            raise VolumeNotFound(f"{source.path}: not a regular file of {self.settings.path}")
        return self._info(source, status)

    async def open(self, source: Source, *, writable: bool) -> FileVolume:
        assert isinstance(source, FileSource)
        if writable and (source.read_only or self.settings.read_only):
            raise BackendError(f"{source.url}: read-only", errno.EROFS)
        with local_errors("open", source.path):
            fd = await trio.to_thread.run_sync(_open_regular, source.path, writable, limiter=self._threads)
        return FileVolume(fd, source.url, writable=writable, threads=self._threads)

    def _scan(self) -> Sequence[Entry]:
        infos: list[Entry] = []
        with os.scandir(self.settings.path) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # removed since
                        continue
                    infos.append(self._info(FileSource(path=entry.path), status))
        return infos

    def _info(self, source: FileSource, status: os.stat_result) -> VolumeInfo:
        return VolumeInfo(
            name=source.name,
            source=source,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            allocated=status.st_blocks * BLOCK_UNIT,
            read_only=source.read_only or self.settings.read_only,
            identity=local_identity(status),
        )


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
