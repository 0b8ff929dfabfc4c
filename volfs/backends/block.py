"""Driver `block`: local block devices and logical volumes, opened in place: nothing is attached, nothing copied.

Devices are given one by one, or as a directory of device nodes such as /dev/mapper or /dev/<volume group>.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import trio

from volfs.backends.base import BLOCK_UNIT, Backend, Entry, Settings, Source, VolumeInfo
from volfs.backends.local import THREADS, LocalVolume, local_errors, normal_path, volume_path
from volfs.errors import BackendError, SourceError, VolumeNotFound
from volfs.identity import local_identity

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
BLKSSZGET = 0x1268  # logical block size, linux/fs.h


class BlockSource(Source, frozen=True, kw_only=True):
    """A block device. `path` is absolute."""

    driver: ClassVar[str] = "block"
    path: str

    @property
    def url(self) -> str:
        return f"block:{self.path}"

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


class BlockSettings(Settings, frozen=True, kw_only=True):
    """A backend of driver `block`."""

    path: str | None = None  # a directory of device nodes
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            if self.path is not None:
                msgspec.structs.force_setattr(self, "path", normal_path(self.path))
        except ValueError as exc:
            raise ValueError(f"path: {exc}") from exc
        try:
            msgspec.structs.force_setattr(self, "devices", tuple(map(normal_path, self.devices)))
        except ValueError as exc:
            raise ValueError(f"devices: {exc}") from exc
        if self.path is None and not self.devices:
            raise ValueError("path: expected a directory of devices, or devices = [...]")


class BlockBackend(Backend):
    driver = "block"
    settings_type = BlockSettings
    settings: BlockSettings

    def __init__(self, name: str, settings: BlockSettings) -> None:
        super().__init__(name, settings)
        self._threads = trio.CapacityLimiter(THREADS)

    @classmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> BlockSource:
        path = volume_path(rest)
        if path is None:
            raise SourceError(f"block:{rest}: expected block:/PATH, the absolute path of a block device")
        return BlockSource(path=path)

    @classmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> tuple[BlockSettings, tuple[str, ...]]:
        if not rest.startswith("/") or "\0" in rest:
            raise SourceError(f"block:{rest}: expected block:/PATH, a block device or a directory of them")
        path = os.path.normpath(rest)
        return (BlockSettings(path=path) if os.path.isdir(path) else BlockSettings(devices=(path,))), ()

    @classmethod
    def parse_connection(
        cls, protocol: str, data: Mapping[str, Any], environment: Mapping[str, str]
    ) -> BlockSource:
        path = volume_path(data.get("device_path"))
        if path is None:
            raise SourceError("connection info of type local: data.device_path: expected an absolute path")
        return BlockSource(path=path, read_only=data.get("access_mode") == "ro")

    @classmethod
    def settings_for(cls, source: Source) -> BlockSettings:
        assert isinstance(source, BlockSource)
        return BlockSettings(devices=(source.path,))

    def serves(self, source: Source) -> bool:
        return isinstance(source, BlockSource) and (
            source.path in self.settings.devices or os.path.dirname(source.path) == self.settings.path
        )

    async def list(self, path: Sequence[str]) -> list[Entry]:
        if path:
            raise VolumeNotFound(f"{self.name}/{'/'.join(path)}: not a directory of volumes")
        with local_errors("list", self.name):
            return [*await trio.to_thread.run_sync(self._scan, limiter=self._threads)]

    async def lookup(self, path: Sequence[str]) -> Entry:
        for device in self.settings.devices:
            if [os.path.basename(device)] == list(path):
                return await self.stat(BlockSource(path=device))
        if self.settings.path is None or len(path) != 1:
            raise VolumeNotFound(f"{'/'.join(path)}: no such device in {self.name}")
        return await self.stat(BlockSource(path=os.path.join(self.settings.path, path[0])))

    async def stat(self, source: Source) -> VolumeInfo:
        assert isinstance(source, BlockSource)
        with local_errors("stat", source.path):
            return await trio.to_thread.run_sync(self._info, source, limiter=self._threads)

    async def open(self, source: Source, *, writable: bool) -> LocalVolume:
        assert isinstance(source, BlockSource)
        if writable and (await self.stat(source)).read_only:
            raise BackendError(f"{source.url}: read-only", errno.EROFS)
        with local_errors("open", source.path):
            fd, block_size = await trio.to_thread.run_sync(
                _open_device, source.path, writable, limiter=self._threads
            )
        return LocalVolume(
            fd,
            source.url,
            writable=writable,
            block_size=block_size,
            # fallocate(2) of a device takes whole blocks. Whole pages here, since older kernels let a write to one
            # part of a page read in the other part while that is zeroed on the disk, and write its old bytes back.
            zero_unit=max(block_size, PAGE_SIZE),
            can_resize=False,
            threads=self._threads,
        )

    def _scan(self) -> Sequence[Entry]:
        paths = list(self.settings.devices)
        if self.settings.path is not None:
            with os.scandir(self.settings.path) as entries:
                paths += [entry.path for entry in entries]
        infos: list[Entry] = []
        for path in paths:
            try:
                infos.append(self._info(BlockSource(path=path)))
            except (FileNotFoundError, VolumeNotFound):  # gone since, or another kind of file
                continue
        return infos

    def _info(self, source: BlockSource) -> VolumeInfo:
        status = os.stat(source.path)
        if not stat.S_ISBLK(status.st_mode):
            raise VolumeNotFound(f"{source.path}: not a block device")
        # Read from sysfs: opening a device to learn its size would make multipath and udev look at it again.
        sys = Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
        ro = sys.joinpath("ro").read_text().strip() == "1"
        return VolumeInfo(
            name=source.name,
            source=source,
            size=int(sys.joinpath("size").read_text()) * BLOCK_UNIT,
            mtime_ns=status.st_mtime_ns,
            read_only=ro or source.read_only or self.settings.read_only,
            identity=local_identity(status),
        )


def _open_device(path: str, writable: bool) -> tuple[int, int]:
    fd = os.open(path, os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY))
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
        (block_size,) = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, b"\0" * 4))
    except BaseException:
        os.close(fd)
        raise
    return fd, block_size
