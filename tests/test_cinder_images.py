"""Images of Glance from and to volumes, by a Cinder that attaches them by volfs for that.

Bytes are compared behind Cinder's and Glance's back.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cinder_daemon import assert_nothing_attached, fill_everywhere, sessions, settings, status_of
from mounts import wait_until
from openstack import GIB, CinderError, Openstack, fill
from services import MIB
from volumes import random_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first one starts what it needs of Cinder

PROTOCOLS = {
    "ceph": "rbd",
    "san": "iscsi",
}  # of the backends whose volumes volfs attaches; others are "local"
USE = ("volfs.use_for=copies,images",)
EXTRAS = ("images",)
SECONDS = 120
DATA = GIB // 16

NewVolume = Callable[..., str]


@pytest.fixture(scope="module")
def through_volfs(openstack: Openstack, socket: str) -> Iterator[Openstack]:
    with openstack.configured(*settings(socket, *USE), extras=EXTRAS):
        yield openstack
        openstack.delete_images()


@pytest.fixture
def cinder(through_volfs: Openstack, socket: str) -> Iterator[Openstack]:
    """At the end nothing is attached or exported."""
    yield through_volfs
    assert_nothing_attached(socket)
    assert sessions(through_volfs) == []


def attached(log: str) -> list[tuple[str, str]]:
    """Protocol and id of the volumes that volfs has attached."""
    return re.findall(r"volfs: (\w+) volume (\S+) is /", log)


def upload(cinder: Openstack, volume: str, disk_format: str, by_volfs: str | None) -> str:
    """The id of an image of a volume, which was attached by volfs alone, as this protocol, or without it."""
    mark = cinder.mark()
    image = cinder.upload(volume, disk_format)
    cinder.wait_status(volume, "available", SECONDS)
    log = cinder.since(mark)
    assert cinder.image_status(image) == "active", log
    assert attached(log) == ([(by_volfs, volume)] if by_volfs else []), log
    assert ("rbd export" in log) == (by_volfs is None), log
    assert cinder.where(volume).users() == []
    return image


def make_from(cinder: Openstack, new_volume: NewVolume, kind: str, image: str, by_volfs: str | None) -> str:
    """The id of a volume that was made from an image, and attached by volfs alone for that, or without it."""
    mark = cinder.mark()
    volume = new_volume(kind, imageRef=image)
    log = cinder.since(mark)
    assert attached(log) == ([(by_volfs, volume)] if by_volfs else []), log
    assert "Traceback" not in log
    assert cinder.where(volume).users() == []
    return volume


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def zero_padded(content: bytes, size: int) -> str:
    digest = hashlib.sha256(content)
    for _ in range((size - len(content)) // MIB):
        digest.update(bytes(MIB))
    digest.update(bytes((size - len(content)) % MIB))
    return digest.hexdigest()


def test_a_raw_image_has_the_bytes_of_its_volume(cinder: Openstack, new_volume: NewVolume) -> None:
    volume = new_volume("ceph")
    fill_everywhere(cinder, volume, DATA)
    image = upload(cinder, volume, "raw", "rbd")
    assert sha256(cinder.image_path(image)) == cinder.where(volume).sha256()


@pytest.mark.parametrize("kind", [pytest.param("ceph", marks=pytest.mark.thorough), "san"])
def test_a_qcow2_image_of_a_volume_becomes_a_volume_on_any_backend(
    cinder: Openstack, new_volume: NewVolume, kind: str
) -> None:
    """And the volume stays as small as its data. Converted by qemu-img, from path to file and from file to path."""
    volume = new_volume(kind)
    fill_everywhere(cinder, volume, DATA)
    digest = cinder.where(volume).sha256()
    image = upload(cinder, volume, "qcow2", PROTOCOLS[kind])
    info = subprocess.check_output(["qemu-img", "info", cinder.image_path(image)], text=True)
    assert "file format: qcow2" in info
    for backend in ("san", "local") if kind == "ceph" else ("ceph",):
        copy = cinder.where(make_from(cinder, new_volume, backend, image, PROTOCOLS.get(backend)))
        assert copy.sha256() == digest, backend
        assert copy.allocated() <= DATA + 4 * MIB, backend


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ceph", "san"])
def test_a_volume_larger_than_its_image_has_zeros_behind_it(
    cinder: Openstack, new_volume: NewVolume, kind: str
) -> None:
    content = random_bytes(20 * MIB + 512, 1)
    stored = cinder.where(make_from(cinder, new_volume, kind, cinder.make_image(content), PROTOCOLS[kind]))
    assert stored.size == GIB
    assert stored.sha256() == zero_padded(content, GIB)
    assert stored.allocated() <= 24 * MIB


@pytest.mark.parametrize("kind", [pytest.param("ceph", marks=pytest.mark.thorough), "san"])
def test_a_volume_with_old_data_gets_the_zeros_of_a_new_image(
    cinder: Openstack, new_volume: NewVolume, kind: str
) -> None:
    content = random_bytes(MIB, 1) + bytes(30 * MIB) + random_bytes(MIB, 2)
    old = random_bytes(40 * MIB, 3)
    image, volume = cinder.make_image(content), new_volume(kind)
    stored, mark = cinder.where(volume), cinder.mark()
    stored.write(old)
    cinder.call("POST", f"/volumes/{volume}/action", {"os-reimage": {"image_id": image}})
    wait_until(lambda: attached(cinder.since(mark)) == [(PROTOCOLS[kind], volume)], "it is attached", SECONDS)
    cinder.wait_status(volume, "available")
    assert stored.sha256() == zero_padded(content + old[len(content) :], GIB)


@pytest.mark.thorough
def test_a_daemon_that_is_killed_fails_the_upload_and_the_next_one_succeeds(
    cinder: Openstack, socket: str, new_volume: NewVolume
) -> None:
    volume = new_volume("ceph")
    fill(cinder.where(volume), DATA)
    mark, image = cinder.mark(), cinder.upload(volume)
    wait_until(lambda: bool((status := status_of(socket)) and status.open), "it is read", SECONDS)
    status = status_of(socket)
    assert status is not None
    os.kill(status.pid, signal.SIGKILL)
    cinder.wait_status(volume, "available", SECONDS)
    assert cinder.image_status(image) == "", cinder.since(mark)
    assert cinder.messages(volume)
    upload(cinder, volume, "qcow2", "rbd")


@pytest.mark.thorough
def test_without_a_daemon_images_fail_with_a_clear_line(
    openstack: Openstack, tmp_path: Path, new_volume: NewVolume
) -> None:
    nowhere = str(tmp_path / "control")
    with openstack.configured(*settings(nowhere, "volfs.start_daemon=false", *USE), extras=EXTRAS):
        volume = new_volume("ceph")
        mark, image = openstack.mark(), openstack.upload(volume)
        openstack.wait_status(volume, "available")
        assert openstack.image_status(image) == ""
        assert f"no volfs daemon answers at {nowhere}" in openstack.since(mark)
        assert len(openstack.messages(volume)) == 1
        assert openstack.where(volume).users() == []
        mark = openstack.mark()
        with pytest.raises(CinderError, match="is error and not available"):
            new_volume("san", imageRef=openstack.make_image(random_bytes(MIB)))
        assert f"no volfs daemon answers at {nowhere}" in openstack.since(mark)
        assert sessions(openstack) == []
        openstack.delete_images()


NO_DAEMON = ("volfs.start_daemon=false", "volfs.without_daemon=stock")


@pytest.mark.thorough
@pytest.mark.parametrize("options", [(), (*NO_DAEMON, *USE)], ids=["for copies alone", "without a daemon"])
def test_images_are_moved_as_ever_without_volfs(
    openstack: Openstack, tmp_path: Path, new_volume: NewVolume, options: tuple[str, ...]
) -> None:
    with openstack.configured(*settings(str(tmp_path / "control"), *options), extras=EXTRAS):
        content = random_bytes(20 * MIB)
        volume = make_from(openstack, new_volume, "ceph", openstack.make_image(content), None)
        assert openstack.where(volume).sha256() == zero_padded(content, GIB)
        upload(openstack, volume, "qcow2", None)
        openstack.delete_images()
