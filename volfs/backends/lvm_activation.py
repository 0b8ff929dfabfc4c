"""Logical volumes that this process has activated, and owes their deactivation.

A volume that was active before is not ours to deactivate. One that we activated is counted, whichever backend and
name it is opened by, and deactivated after its last close; a record in the journal says so to the next daemon, should
this one be killed. Before the record is made nothing is activated, and before the volume is inactive it is not removed.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from volfs import journal
from volfs.backends import lvm
from volfs.errors import BackendError, VolfsError, VolumeNotFound

log = logging.getLogger(__name__)

DRIVER = "block"


@dataclass(slots=True)
class _Unit:
    """What is activated by one command: a logical volume, or an origin with its snapshots."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0
    waiting: int = 0  # tasks that have it or wait for it
    record: journal.Record | None = None  # None: it was active before


class Activations:
    """The units in use by this process, by full name."""

    def __init__(self) -> None:
        self._units: dict[str, _Unit] = {}

    async def acquire(self, full_name: str, unit_name: str | None, timeout: float) -> lvm.LogicalVolume:
        """Have the logical volume active; the caller owes a `release` of the unit of the one that is returned.

        `unit_name` is what its unit was when somebody last looked, which saves a look. VolumeNotFound, BackendError;
        what fails or is cancelled leaves it as it was.
        """
        while True:
            if unit_name is None:
                unit_name = (await lvm.logical_volume(full_name, timeout)).unit
            unit = self._units.setdefault(unit_name, _Unit())
            unit.waiting += 1
            try:
                async with unit.lock:
                    # As it is now that nobody of us changes it.
                    volume = await lvm.logical_volume(full_name, timeout)
                    if volume.unit == unit_name:
                        if not volume.active:
                            await self._activate(unit, volume, timeout)
                        unit.users += 1
                        return volume
            finally:
                self._leave(unit_name, unit)
            unit_name = volume.unit  # another volume has got the name since

    async def release(self, unit_name: str, timeout: float) -> None:
        """Give up a use of it. BackendError when it was the last one and the volume cannot be deactivated."""
        unit = self._units[unit_name]
        unit.waiting += 1
        try:
            with trio.CancelScope(shield=True):
                async with unit.lock:
                    unit.users -= 1
                    record = unit.record
                    if not unit.users and record is not None:
                        unit.record = None
                        await _undo(unit_name, record, timeout)
        finally:
            self._leave(unit_name, unit)

    async def _activate(self, unit: _Unit, volume: lvm.LogicalVolume, timeout: float) -> None:
        if (
            unit.record is not None
        ):  # somebody else has deactivated what we had active: the record is still right
            await lvm.activate(volume.full_name, timeout)
            return
        facts = {"logical_volume": volume.unit, "uuid": volume.uuid}
        with trio.CancelScope(shield=True):  # a record that is made has an owner
            record = await trio.to_thread.run_sync(journal.record, DRIVER, facts)
        try:
            await lvm.activate(volume.full_name, timeout)
            await trio.lowlevel.checkpoint_if_cancelled()
        except BaseException:
            try:
                with trio.CancelScope(shield=True):
                    await _undo(volume.unit, record, timeout)
            except VolfsError as exc:
                log.warning("%s", exc)
            raise
        unit.record = record

    def _leave(self, unit_name: str, unit: _Unit) -> None:
        unit.waiting -= 1
        if not unit.users and not unit.waiting:
            del self._units[unit_name]


ACTIVATIONS = Activations()  # of all backends: what is active is so for the whole machine


async def clean_up(facts: Mapping[str, Any], timeout: float) -> None:
    """Deactivate what a dead process left active, and its record tells of. What is inactive or gone is fine."""
    name, uuid = facts.get("logical_volume"), facts.get("uuid")
    if not isinstance(name, str) or not isinstance(uuid, str):
        raise VolfsError("expected the name and the UUID of a logical volume", errno.EINVAL)
    try:
        volumes = await lvm.logical_volumes(name.partition("/")[0], timeout)
    except VolumeNotFound:
        return
    for volume in volumes:  # found by what it is, as it may have another name now
        if volume.uuid == uuid and volume.active:
            await lvm.deactivate(volume.unit, timeout)


async def _undo(unit_name: str, record: journal.Record, timeout: float) -> None:
    """Deactivate it. If that cannot be, the record is left to the next start of a daemon."""
    try:
        try:
            await lvm.deactivate(unit_name, timeout)
        except VolumeNotFound:  # removed behind our back
            pass
        await trio.to_thread.run_sync(record.remove)
    except BackendError as exc:
        await trio.to_thread.run_sync(record.release)
        if exc.errno != errno.EBUSY:
            raise
        # Whoever has it open relies on it now; our bytes are stable, and our descriptor is closed.
        log.warning("%s stays active, somebody else has it open: %s", unit_name, exc)
