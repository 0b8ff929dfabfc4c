"""Driver `file`: a directory of raw files, each a volume. The embedded default; needs no service.

Only regular files directly in the directory are volumes; links are not followed, so that no name leads out of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
import trio

from volfs.backends.base import BLOCK_UNIT, Backend, Entry, Settings, Source, VolumeInfo
from volfs.backends.local import local_errors, normal_path, volume_path
from volfs.backends.raw_file import FileVolume, open_file
from volfs.errors import BackendError, SourceError, VolumeNotFound
from volfs.identity import local_identity

THREADS = 16  # requests under way at once for one backend; more only wait for the same disk


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
        return await open_file(
            source.path, source.url, writable=writable, can_resize=writable, threads=self._threads
        )

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
