"""Driver `block`: local block devices and logical volumes, opened in place: nothing is attached, nothing copied.

Devices are given one by one, as a directory of device nodes, or as an LVM volume group. A logical volume is one by
whatever path it is named: LVM tells what it is, and it is activated while it is open, if it was not active before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec
import trio

from volfs.backends import lvm, lvm_activation
from volfs.backends.base import Backend, Entry, Settings, Source, VolumeInfo
from volfs.backends.block_device import BlockDevice, open_device
from volfs.backends.local import device_properties, local_errors, normal_path, volume_path
from volfs.backends.lvm_activation import ACTIVATIONS
from volfs.backends.lvm_reports import Reports
from volfs.errors import BackendError, SourceError, VolumeNotFound
from volfs.identity import local_identity, logical_volume_identity, logical_volume_uuid, sys_directory

THREADS = 8  # that list and look
CLEAN_UP_SECONDS = 30.0


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
    volume_group: str | None = None

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
        if self.volume_group is None:
            if self.path is None and not self.devices:
                raise ValueError(
                    "path: expected a directory of devices, or devices = [...], or volume_group = ..."
                )
        elif self.path is not None or self.devices:
            raise ValueError("volume_group: expected neither path nor devices beside it")
        elif not lvm.is_group_name(self.volume_group):
            raise ValueError(f"volume_group: expected the name of one, not {self.volume_group!r}")


class BlockBackend(Backend):
    driver = "block"
    settings_type = BlockSettings
    settings: BlockSettings
    describes = ("active", "lv_attr", "origin", "pool", "data_percent")

    def __init__(self, name: str, settings: BlockSettings) -> None:
        super().__init__(name, settings)
        self._threads = trio.CapacityLimiter(THREADS)
        self._reports = Reports(settings.timeout)

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

    @classmethod
    async def clean_up(cls, facts: Mapping[str, Any]) -> None:
        await lvm_activation.clean_up(facts, CLEAN_UP_SECONDS)

    def serves(self, source: Source) -> bool:
        if not isinstance(source, BlockSource):
            return False
        if self.settings.volume_group is not None:
            return (lvm.full_name_of(source.path) or "").partition("/")[0] == self.settings.volume_group
        return source.path in self.settings.devices or os.path.dirname(source.path) == self.settings.path

    async def list(self, path: Sequence[str]) -> list[Entry]:
        if path:
            raise VolumeNotFound(f"{self.name}/{'/'.join(path)}: not a directory of volumes")
        if self.settings.volume_group is not None:
            volumes = await self._reports.volumes(self.settings.volume_group)
            return [self._info_of(volume, BlockSource(path=volume.path)) for volume in volumes]
        with local_errors("list", self.name):
            paths = await trio.to_thread.run_sync(self._paths, limiter=self._threads)
        infos: list[Entry] = []
        for each in paths:
            try:
                infos.append(await self.stat(BlockSource(path=each)))
            except VolumeNotFound:  # gone since, or another kind of file
                continue
        return infos

    async def lookup(self, path: Sequence[str]) -> Entry:
        for device in self.settings.devices:
            if [os.path.basename(device)] == list(path):
                return await self.stat(BlockSource(path=device))
        group = self.settings.volume_group
        directory = self.settings.path if group is None else f"/dev/{group}"
        if directory is None or len(path) != 1:
            raise VolumeNotFound(f"{'/'.join(path)}: no such device in {self.name}")
        return await self.stat(BlockSource(path=os.path.join(directory, path[0])))

    async def stat(self, source: Source) -> VolumeInfo:
        assert isinstance(source, BlockSource)
        full_name = await self._full_name(source)
        if full_name is None:
            with local_errors("stat", source.path):
                return await trio.to_thread.run_sync(self._info, source, limiter=self._threads)
        volume = await self._reports.volume(full_name)
        if self.settings.volume_group is not None:
            source = msgspec.structs.replace(source, path=volume.path)
        return self._info_of(volume, source)

    async def open(self, source: Source, *, writable: bool) -> BlockDevice:
        assert isinstance(source, BlockSource)
        timeout = self.settings.timeout
        read_only = BackendError(f"{source.url}: read-only", errno.EROFS)
        if writable and (source.read_only or self.settings.read_only):
            raise read_only
        full_name = await self._full_name(source)
        if full_name is None:
            if writable and (await self.stat(source)).read_only:
                raise read_only
            return await open_device(source.path, name=source.url, writable=writable, timeout=timeout)
        volume = await ACTIVATIONS.acquire(full_name, self._reports.unit(full_name), timeout)
        try:
            if writable and not volume.writable:
                raise read_only
            return await open_device(
                volume.path,
                name=source.url,
                writable=writable,
                timeout=timeout,
                closed=partial(self._release, volume.unit),
                resize=None if volume.is_copy_on_write else partial(self._resize, volume),
            )
        except BaseException:
            await self._release(volume.unit)
            raise
        finally:
            self._reports.forget()

    async def _release(self, unit: str) -> None:
        try:
            await ACTIVATIONS.release(unit, self.settings.timeout)
        finally:
            self._reports.forget()

    async def _resize(self, volume: lvm.LogicalVolume, size: int) -> None:
        if size % volume.extent_size:
            raise BackendError(
                f"{volume.full_name}: expected a multiple of {volume.extent_size} bytes, not {size}",
                errno.EINVAL,
            )
        try:
            await lvm.resize(volume.full_name, size, self.settings.timeout)
        finally:
            self._reports.forget()

    async def _full_name(self, source: BlockSource) -> str | None:
        """The logical volume that the path is of; None when it is another device, or nobody here knows of LVM."""
        if self.settings.volume_group is not None:
            return lvm.full_name_of(source.path)
        with local_errors("stat", source.path):
            return await trio.to_thread.run_sync(_full_name, source.path, limiter=self._threads)

    def _paths(self) -> Sequence[str]:
        paths = [*self.settings.devices]
        if self.settings.path is not None:
            with os.scandir(self.settings.path) as entries:
                paths += [entry.path for entry in entries]
        return paths

    def _info(self, source: BlockSource) -> VolumeInfo:
        status = os.stat(source.path)
        if not stat.S_ISBLK(status.st_mode):
            raise VolumeNotFound(f"{source.path}: not a block device")
        properties = device_properties(status)
        return VolumeInfo(
            name=source.name,
            source=source,
            size=properties.size,
            mtime_ns=status.st_mtime_ns,
            read_only=not properties.writable or source.read_only or self.settings.read_only,
            identity=local_identity(status),
        )

    def _info_of(self, volume: lvm.LogicalVolume, source: BlockSource) -> VolumeInfo:
        percent = volume.data_percent
        details = {
            "active": "yes" if volume.active else "no",
            "lv_attr": volume.attributes,
            "origin": volume.origin,
            "pool": volume.pool,
            "data_percent": "" if percent is None else f"{percent:g}",
        }
        return VolumeInfo(
            name=source.name,
            source=source,
            size=volume.size,
            mtime_ns=volume.created * 10**9,
            allocated=volume.allocated,
            read_only=not volume.writable or source.read_only or self.settings.read_only,
            identity=logical_volume_identity(volume.uuid),
            details={key: value for key, value in details.items() if value},
        )


def _full_name(path: str) -> str | None:
    """That of the logical volume which the node is, or which it would be of if it were there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return lvm.full_name_of(path) if lvm.is_installed() else None
    if not stat.S_ISBLK(status.st_mode) or logical_volume_uuid(status) is None or not lvm.is_installed():
        return None
    return lvm.mapped_name(sys_directory(status).joinpath("dm/name").read_text().strip())
