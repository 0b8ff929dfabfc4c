"""Volume groups of LVM on loop devices, for tests marked `vm`: the host may have no device mapper."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kernel_targets import succeed
from services import MIB, loop

GroupFactory = Callable[..., "VolumeGroup"]


@dataclass(frozen=True)
class VolumeGroup:
    name: str
    device: Path  # its one physical volume

    def create(self, name: str, size: int, *options: str) -> Path:
        """A logical volume, active; `options` go to lvcreate."""
        succeed("lvcreate", "--yes", "--name", name, "--size", f"{size}b", *options, self.name)
        return self.path(name)

    def create_thin(self, name: str, size: int, pool: str = "pool", pool_size: int = 64 * MIB) -> Path:
        """A thin volume; the pool is made with the first one."""
        if pool not in self.volumes():
            succeed("lvcreate", "--yes", "--type", "thin-pool", "-n", pool, "-L", f"{pool_size}b", self.name)
        succeed("lvcreate", "--yes", "--thin", "-n", name, "-V", f"{size}b", f"{self.name}/{pool}")
        return self.path(name)

    def path(self, name: str) -> Path:
        return Path("/dev") / self.name / name

    def activate(self, name: str, active: bool = True) -> None:
        succeed("lvchange", "--activate", "y" if active else "n", f"{self.name}/{name}")

    def volumes(self) -> dict[str, dict[str, Any]]:
        """What lvs tells of each."""
        shown = succeed("lvs", "--reportformat", "json", "-o", "lv_name,lv_active,lv_size", self.name)
        return {row["lv_name"]: row for row in json.loads(shown)["report"][0]["lv"]}

    def active(self) -> set[str]:
        return {name for name, row in self.volumes().items() if row["lv_active"] == "active"}


@contextlib.contextmanager
def volume_group(directory: Path, size: int) -> Iterator[VolumeGroup]:
    """On a loop device of a sparse file; removed with all that is in it."""
    name = f"vg-{secrets.token_hex(4)}"
    with loop(directory, size) as device:
        # Else udev activates all that is in it when it sees the new group, at some time after that.
        succeed("vgcreate", "--yes", "--setautoactivation", "n", name, device)
        try:
            yield VolumeGroup(name, device)
        finally:
            succeed("vgremove", "--force", "--yes", name)
            succeed("pvremove", device)


@pytest.fixture
def new_group(tmp_path: Path) -> Iterator[GroupFactory]:
    """new_group(size): see `volume_group`."""
    with contextlib.ExitStack() as stack:
        yield lambda size=256 * MIB: stack.enter_context(volume_group(tmp_path, size))
