"""What LVM says of volume groups, asked once for many who want to know: each lvs reads the metadata of all disks."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from volfs.backends import lvm
from volfs.errors import VolumeNotFound

FRESH_SECONDS = 0.5  # `ls -l` asks of each volume


@dataclass(slots=True)
class _Report:
    lock: trio.Lock = field(default_factory=trio.Lock)
    asked: float = float("-inf")  # trio's clock
    volumes: list[lvm.LogicalVolume] = field(default_factory=list)


class Reports:
    """The logical volumes of volume groups, as they were `FRESH_SECONDS` ago at the most. Any task may ask."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._reports: dict[str, _Report] = {}
        self._units: dict[str, str] = {}  # by full name

    async def volumes(self, group: str) -> list[lvm.LogicalVolume]:
        """Those that hold somebody's data. VolumeNotFound, BackendError."""
        report = self._reports.setdefault(group, _Report())
        async with report.lock:
            now = trio.current_time()
            if now - report.asked > FRESH_SECONDS:
                found = await lvm.logical_volumes(group, self._timeout)
                report.volumes, report.asked = [volume for volume in found if volume.is_volume], now
                self._units |= {volume.full_name: volume.unit for volume in report.volumes}
        return report.volumes

    async def volume(self, full_name: str) -> lvm.LogicalVolume:
        group, _, name = full_name.partition("/")
        for volume in await self.volumes(group):
            if volume.name == name:
                return volume
        raise VolumeNotFound(f"{full_name}: no such logical volume")

    def unit(self, full_name: str) -> str | None:
        """What the volume's unit was when it was last heard of, however long ago that is."""
        return self._units.get(full_name)

    def forget(self) -> None:
        """Something was changed."""
        self._reports.clear()
