"""Volumes on storages that only the guest has: behind the kernel's iSCSI initiator, and in a volume group."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kernel_targets import free_portals, succeed
from lvm import VolumeGroup, volume_group
from services import MIB, lun
from volumes import IscsiVolume, Storage, StoredVolume, backing_file, processes_with, write_file

GROUP_SIZE = 256 * MIB


@dataclass(kw_only=True)
class KernelIscsiVolume(IscsiVolume):
    """Of the same target software, on the portal of the backend whose initiator is the kernel."""

    backend = "kernel"


@dataclass(kw_only=True)
class LogicalVolume(StoredVolume):
    """A linear one, inactive when made.

    Read and written where it is on the disk, below LVM: who had it open, or changed what is active, would be in the
    way of volfs, which is to deactivate it.
    """

    driver = "block"
    backend = "lvm"
    group: VolumeGroup = field(repr=False)
    offset: int  # on the disk

    @property
    def path(self) -> Path:
        return self.group.path(self.place[-1])

    @property
    def full_name(self) -> str:
        return f"{self.group.name}/{self.place[-1]}"

    @property
    def active(self) -> bool:
        return self.path.exists()

    def read(self) -> bytes:
        with backing_file(self.group.device).open("rb") as disk:
            disk.seek(self.offset)
            return disk.read(self.size)

    def write(self, data: bytes, offset: int = 0) -> None:
        write_file(backing_file(self.group.device), data, self.offset + offset)

    def resize(self, size: int) -> None:
        options = ("--yes", "--force", "--alloc", "contiguous")
        succeed("lvresize", *options, "--size", f"{size}b", self.full_name)
        self.size = size

    def users(self) -> list[str]:
        return [f"{self.url} is active", *processes_with(self.path)] if self.active else []

    def protect(self) -> str:
        succeed("lvchange", "--permission", "r", self.full_name)
        return self.url


class GuestStorage(Storage):
    """Storage with the drivers `kernel` and `lvm` as well."""

    def __init__(self, request: pytest.FixtureRequest, directory: Path, stack: ExitStack) -> None:
        super().__init__(request, directory, stack)
        # Before any volume is made, since they go after all volumes are gone.
        # Another portal of the standing target: by its portal a URL tells which initiator is meant.
        self.kernel_portal = self._new_portal()
        self.group = stack.enter_context(volume_group(self._loops, GROUP_SIZE))

    def backends(self) -> Mapping[str, Mapping[str, Any]]:
        """A configuration with all storages, by what the volumes call their backend."""
        return {
            "rbd": {"driver": "rbd", "pools": ["volumes"]},
            "iscsi": {"driver": "iscsi", "portals": [self.services.portal]},
            "kernel": {"driver": "iscsi", "portals": [self.kernel_portal], "initiator": "kernel"},
            "lvm": {"driver": "block", "volume_group": self.group.name},
            "file": {"driver": "file", "path": self.prefix("file").removeprefix("file:")},
        }

    def _new_portal(self) -> str:
        (portal,) = free_portals(1)
        change = ("tgtadm", "--lld", "iscsi", "--mode", "portal", "--param", f"portal={portal}", "--op")
        self.services.run(*change, "new")
        self._stack.callback(self.services.run, *change, "delete")
        return portal

    def _makers(self) -> dict[str, Callable[..., StoredVolume]]:
        return {**super()._makers(), "kernel": self._make_kernel, "lvm": self._make_lvm}

    def _make_kernel(self, undo: ExitStack, size: int, **options: Any) -> KernelIscsiVolume:
        portal = self.kernel_portal
        made = undo.enter_context(lun(self.services, size, **options))
        return KernelIscsiVolume(
            size=size,
            prefix=f"iscsi://{portal}",
            place=(made.iqn, str(made.number)),
            url=f"iscsi://{portal}/{made.iqn}/{made.number}",
            undo=undo,
            services=self.services,
            lun=made,
        )

    def _make_lvm(self, undo: ExitStack, size: int) -> LogicalVolume:
        group = self.group
        name = f"disk-{secrets.token_hex(4)}"
        path = group.create(name, size)
        undo.callback(succeed, "lvremove", "--yes", f"{group.name}/{name}")
        group.activate(name, False)
        fields = "pe_start,vg_extent_size,pvseg_start"
        form = ("--segments", "--noheadings", "--units", "b", "--nosuffix", "-o", fields)
        begin, extent, number = map(int, succeed("pvs", *form, "--select", f"lv_name={name}").split())
        return LogicalVolume(
            size=size,
            prefix=f"block:/dev/{group.name}",
            place=(name,),
            url=f"block:{path}",
            undo=undo,
            group=group,
            offset=begin + number * extent,
        )


def configuration(path: Path, backends: Mapping[str, Mapping[str, Any]]) -> Path:
    """A volfs.toml."""
    lines = []
    for name, settings in backends.items():
        lines.append(f"[backends.{name}]")
        lines += [f"{key} = {value!r}" for key, value in settings.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def guest_storage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestStorage]:
    """Where the volumes of a module come from."""
    with ExitStack() as stack:
        yield GuestStorage(request, tmp_path_factory.mktemp("storage"), stack)
