"""Volumes on storages that only the guest has: behind the kernel's iSCSI initiator, and in a volume group."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kernel_targets import free_portals, succeed
from lvm import VolumeGroup, volume_group
from services import MIB, lun
from volumes import IscsiVolume, Storage, StoredVolume, processes_with, write_file

GROUP_SIZE = 256 * MIB


@dataclass(kw_only=True)
class KernelIscsiVolume(IscsiVolume):
    """Of the same target software, on the portal of the backend whose initiator is the kernel."""

    backend = "kernel"


@dataclass(kw_only=True)
class LogicalVolume(StoredVolume):
    """One that is not active but while it is read or written here."""

    driver = "block"
    backend = "lvm"
    group: VolumeGroup = field(repr=False)

    @property
    def name(self) -> str:
        return self.place[-1]

    @property
    def path(self) -> Path:
        return self.group.path(self.name)

    @property
    def active(self) -> bool:
        return self.path.exists()

    def read(self) -> bytes:
        with self.activated() as path:
            # By O_DIRECT: the disk's own bytes, whatever is in the page cache.
            command = ["dd", f"if={path}", "bs=1M", "iflag=direct", "status=none"]
            return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout

    def write(self, data: bytes, offset: int = 0) -> None:
        with self.activated() as path:
            write_file(path, data, offset)

    @contextmanager
    def activated(self) -> Iterator[Path]:
        if self.active:
            yield self.path
            return
        self.group.activate(self.name)
        try:
            yield self.path
        finally:
            self.group.activate(self.name, False)

    def resize(self, size: int) -> None:
        succeed("lvresize", "--yes", "--force", "--size", f"{size}b", f"{self.group.name}/{self.name}")
        self.size = size

    def users(self) -> list[str]:
        return processes_with(self.path) if self.active else []

    def protect(self) -> str:
        succeed("lvchange", "--permission", "r", f"{self.group.name}/{self.name}")
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
        return LogicalVolume(
            size=size,
            prefix=f"block:/dev/{group.name}",
            place=(name,),
            url=f"block:{path}",
            undo=undo,
            group=group,
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
