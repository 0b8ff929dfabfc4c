"""Fixtures that more than one module uses."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guest
import pytest
from cinder_daemon import socket  # noqa: F401
from commands import run  # noqa: F401
from disks import disk, make_disk, own_disk, shared_disk  # noqa: F401
from guest_volumes import guest_storage  # noqa: F401
from hypothesis import settings
from kernel_targets import iscsid, kernel_target, multipathd  # noqa: F401
from lvm import new_group  # noqa: F401
from mounts import Mount, mounted
from openstack import new_volume, openstack  # noqa: F401
from services import (  # noqa: F401
    loop_device,
    new_image,
    new_lun,
    new_namespace,
    rbd_image,
    services,
)
from volumes import Storage, StoredVolume

from volfs.native import load_first

load_first(
    "rbd_image"
)  # before a test loads python-rbd for its own ends: a driver in this process needs that order

# How long an example takes depends on what else this machine does; pytest-timeout ends one that hangs.
settings.register_profile("volfs", deadline=None)
settings.load_profile("volfs")

MakeVolume = Callable[..., StoredVolume]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(guest.plugin(config), "volfs-guest")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`thorough` is for who asks for it by `-m`. The guest runs what it is told to."""
    if guest.INSIDE or "thorough" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Mount]]:
    """Mount: `mount(*prefixes, options=(), env=None)` and more of `mounted`. Unmounted after the test."""
    with contextlib.ExitStack() as stack:

        def make(*prefixes: str, **how: Any) -> Mount:
            return stack.enter_context(mounted(tmp_path_factory.mktemp("m"), prefixes, **how))

        yield make


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """Where the volumes of one test come from."""
    with contextlib.ExitStack() as stack:
        yield Storage(request, tmp_path_factory.mktemp("storage"), stack)


@pytest.fixture(scope="module")
def module_storage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Storage]:
    """Where volumes come from that the tests of a module share."""
    with contextlib.ExitStack() as stack:
        yield Storage(request, tmp_path_factory.mktemp("storage"), stack)


@pytest.fixture
def make_volume(storage: Storage) -> MakeVolume:
    """make_volume(driver, size, content, **options): see `Storage.make`."""
    return storage.make


@pytest.fixture(autouse=True, scope="module")
def _no_leaks() -> Iterator[None]:
    """What a module's tests left open is its failure, and not that of whoever runs when it is collected."""
    yield
    gc.collect()


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """An empty directory for the file driver."""
    directory = tmp_path / "volumes"
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def everything(module_storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of all drivers, for the tests of a module."""
    prefixes = [module_storage.prefix(driver) for driver in ("rbd", "iscsi", "block", "file")]
    env = module_storage.environment("rbd")
    with mounted(tmp_path_factory.mktemp("m"), prefixes, env=env) as mount:
        yield mount
