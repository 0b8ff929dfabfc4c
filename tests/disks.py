"""Volumes as files on a mount, for tests of what tools and system calls see, and running such tools.

conftest.py offers the fixtures: `disk` is the same volume for all tests of a module, `own_disk` one for a test alone,
each on every driver in turn. A module that wants other drivers defines a `make_disk` of its own with `disk_maker`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mounts import Mount, mounted, wait_until
from services import MIB
from volumes import Storage, StoredVolume, random_bytes, variants

from volfs import api
from volfs.control import StatusReply

SIZE = 5 * MIB + 4096
OBJECT = 4 * MIB  # of RBD
ATTRIBUTE_SECONDS = 3.0  # after which a change elsewhere shows without an open: twice a second, and some


@dataclass
class Disk:
    """A volume, and its file on a mount."""

    mount: Mount
    stored: StoredVolume

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def path(self) -> Path:
        return self.mount.path.joinpath(self.stored.driver, *self.stored.place)

    def fill(self, seed: int = 0) -> bytes:
        """Random bytes all over it, written past volfs."""
        content = random_bytes(self.stored.size, seed)
        self.stored.write(content)
        return content

    def status(self) -> StatusReply:
        return api.status(socket_path=str(self.mount.socket))

    def assert_released(self) -> None:
        """release(2) is told to the daemon after close(2) has returned."""
        wait_until(
            lambda: not self.status().open and not self.stored.users(),
            f"nobody has it open any more: {self.status().open}, {self.stored.users()}",
        )


MakeDisk = Callable[..., Disk]


@contextlib.contextmanager
def disks_of(variant: Any, storage: Storage, directory: Path) -> Iterator[MakeDisk]:
    """make_disk(size): volumes of one of VARIANTS, on the one mount for its driver."""
    _, driver, options = variant
    with mounted(directory, [storage.prefix(driver)], env=storage.environment(driver)) as mount:

        def make(size: int = SIZE) -> Disk:
            disk = Disk(mount, storage.make(driver, size, **options))
            wait_until(disk.path.exists, "the new volume is listed", ATTRIBUTE_SECONDS)
            return disk

        yield make


def disk_maker(params: Sequence[Any]) -> Any:
    """The fixture `make_disk` of a module, on these of `variants` in turn."""

    @pytest.fixture(scope="module", params=params)
    def make_disk(
        request: pytest.FixtureRequest, module_storage: Storage, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[MakeDisk]:
        with disks_of(request.param, module_storage, tmp_path_factory.mktemp("m")) as make:
            yield make

    return make_disk


# The kernel's side is the same for all of them, and the contract suite runs over each. The rest is for the thorough.
make_disk = disk_maker(variants(quick=("rbd", "file")))


@pytest.fixture(scope="module")
def shared_disk(make_disk: MakeDisk) -> Disk:
    return make_disk()


@pytest.fixture
def disk(shared_disk: Disk) -> Iterator[Disk]:
    """The same volume for many tests, since none can change its size. Closed after each."""
    yield shared_disk
    shared_disk.assert_released()


@pytest.fixture
def own_disk(make_disk: MakeDisk) -> Iterator[Disk]:
    """A volume for one test alone, to be resized or removed."""
    disk = make_disk()
    yield disk
    disk.stored.remove()


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """A tool; its exit code is the caller's to judge."""
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **more)


def succeed(*command: str | Path, **more: Any) -> bytes:
    done = run(*command, **more)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr.decode()}"
    return done.stdout


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
