"""open_volume and close_volume on a driver, as Cinder's Generic Volume Migration specification has them.

The drivers are Cinder's own for Ceph, in this process, with real pools; no service of Cinder's runs here.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import rbd as librbd
from connectors import set_up_os_brick
from migrations import GARBAGE, sparse_content
from mounts import Mount, mounted
from services import MIB, Image, Services
from volumes import ceph_environment

from volfs import VolumeNotFound, api

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Cinder's libraries will not have in future versions
    from cinder import context, exception, objects

    objects.register_all()
    from cinder import privsep
    from cinder.volume import configuration, driver
    from cinder.volume.drivers import rbd
    from oslo_config import cfg

    from volfs.cinder import options
    from volfs.cinder.driver import OpenVolume
    from volfs.cinder.manager import bytes_to_copy, is_blank

GIB = 1 << 30
CONTEXT = context.get_admin_context()


class Driver(OpenVolume, rbd.RBDDriver):  # type: ignore[misc]
    """Cinder's, with the methods of the specification."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("m"), ()) as mount:
        yield mount


@pytest.fixture
def rbd_driver(services: Services, daemon: Mount, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """At the end nothing is attached, and nobody has a volume open."""
    set_up_os_brick()
    privsep.sys_admin_pctxt.set_client_mode(False)
    for name, value in ceph_environment(services).items():
        monkeypatch.setenv(name, value)
    cfg.CONF([], project="cinder", default_config_files=[])
    options.register(cfg.CONF)
    cfg.CONF.set_override("socket", str(daemon.socket), options.GROUP)
    yield make_driver(services, "volumes")
    status = api.status(socket_path=str(daemon.socket))
    assert (status.attached, status.open) == ([], [])
    cfg.CONF.reset()


def make_driver(services: Services, pool: str) -> Driver:
    settings = configuration.Configuration(driver.volume_opts, config_group=f"ceph-{pool}")
    settings.append_config_values(rbd.RBD_OPTS)
    for key, value in (
        ("rbd_ceph_conf", str(services.ceph_conf)),
        ("rbd_user", services.user),
        ("rbd_pool", pool),
    ):
        cfg.CONF.set_override(key, value, settings.config_group)
    made = Driver(configuration=settings, host=f"host@{pool}")
    made.do_setup(None)
    return made


Create = Callable[[], Any]


@pytest.fixture
def create(rbd_driver: Driver) -> Iterator[Create]:
    """A volume of 1 GiB, as Cinder's database would have it."""
    with ExitStack() as stack:

        def create() -> Any:
            volume = objects.Volume(
                CONTEXT,
                id=str(uuid.uuid4()),
                _name_id=None,
                size=1,
                display_name="",
                volume_type_id=None,
                encryption_key_id=None,
                multiattach=False,
                metadata={},
                admin_metadata={},
            )
            rbd_driver.create_volume(volume)
            stack.callback(rbd_driver.delete_volume, volume)
            return volume

        yield create


def image(services: Services, volume: Any) -> Image:
    return Image(services, "volumes", volume.name, GIB)


def test_an_open_volume_is_a_file_object(services: Services, rbd_driver: Driver, create: Create) -> None:
    volume = create()
    file = rbd_driver.open_volume(CONTEXT, volume)
    assert file.write(b"first bytes") == 11
    assert file.seek(0, os.SEEK_END) == GIB
    rbd_driver.close_volume(CONTEXT, volume, file)
    assert file.closed
    assert image(services, volume).watchers() == []
    with services.open_pool("volumes") as pool, librbd.Image(pool, volume.name, read_only=True) as opened:
        assert opened.read(0, 11) == b"first bytes"


def test_a_copy_needs_no_more_than_open_and_close(
    services: Services, rbd_driver: Driver, create: Create
) -> None:
    """Also onto a volume that has other data where the source has none."""
    source, target = create(), create()
    content = sparse_content(8 * MIB, seed=1)
    image(services, source).write(content, offset=GIB - len(content))
    image(services, target).write(GARBAGE * MIB, offset=5 * MIB)
    rbd_driver.copy_volume_data(CONTEXT, source, target)
    assert image(services, target).sha256() == image(services, source).sha256()
    assert [image(services, volume).watchers() for volume in (source, target)] == [[], []]


def test_a_source_that_is_not_there_leaves_the_target_closed(
    services: Services, rbd_driver: Driver, create: Create
) -> None:
    source, target = create(), create()
    services.run("rbd", "rm", "--no-progress", image(services, source).spec)
    with pytest.raises(VolumeNotFound):
        rbd_driver.copy_volume_data(CONTEXT, source, target)
    assert image(services, target).watchers() == []


def test_only_what_was_opened_is_closed(rbd_driver: Driver, create: Create, tmp_path: Path) -> None:
    volume = create()
    file = rbd_driver.open_volume(CONTEXT, volume, "rb")
    rbd_driver.close_volume(CONTEXT, volume, file)
    with pytest.raises(ValueError, match="was not opened by open_volume"):
        rbd_driver.close_volume(CONTEXT, volume, file)
    with (
        open(tmp_path / "other", "wb") as other,
        pytest.raises(ValueError, match="not opened by open_volume"),
    ):
        rbd_driver.close_volume(CONTEXT, volume, other)


@pytest.mark.parametrize(
    "what",
    [
        {"migration_status": "target:1", "encryption_key_id": str(uuid.uuid4())},  # it begins with a header
        {"migration_status": None, "encryption_key_id": None},  # it is reverted to a snapshot, and has data
    ],
)
def test_a_volume_that_may_hold_something_is_not_taken_for_blank(what: dict[str, Any]) -> None:
    """Before its backend is asked: what dd would leave out there is what it holds."""
    assert not is_blank(CONTEXT, objects.Volume(CONTEXT, id=str(uuid.uuid4()), **what))


@pytest.mark.parametrize("protocol", ["rbd", "iscsi"])
@pytest.mark.parametrize("decrypt", [False, True])
@pytest.mark.parametrize("key", [None, "key"])
def test_all_of_an_encrypted_image_is_copied_with_its_header(
    tmp_path: Path, protocol: str, decrypt: bool, key: str | None
) -> None:
    """Whether a path or a handle of os-brick's leads to it."""
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, GIB + MIB)
    volume = {"size": 1, "encryption_key_id": key}
    with path.open("rb") as handle:
        for where in (str(path), handle):
            attached = {"conn": {"driver_volume_type": protocol}, "device": {"path": where}}
            with_header = protocol == "rbd" and key is not None and not decrypt
            assert bytes_to_copy(volume, attached, decrypt=decrypt) == GIB + with_header * MIB
            assert handle.tell() == 0


def test_an_encrypted_image_of_unknown_size_is_not_copied(tmp_path: Path) -> None:
    path = f"{tmp_path}/hidden"
    attached = {"conn": {"driver_volume_type": "rbd"}, "device": {"path": path}}
    with pytest.raises(exception.VolumeBackendAPIException, match=path):
        bytes_to_copy({"size": 1, "encryption_key_id": "key"}, attached, decrypt=False)
