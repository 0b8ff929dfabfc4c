"""Cinder migrates and retypes volumes, encrypted ones too, between Ceph and stock LVM behind LIO, through volfs.

In the guest (marker vm), which has dm-crypt, LIO and the kernel's initiator. Volumes have a GiB at least, of which
copying takes a minute there: but where the end of a volume matters, they are made smaller behind Cinder's back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import encryption
import pytest
from cinder_guest import ISCSI_PORT, KEY, GuestCinder, MappedImage, StoredLogicalVolume, running_cinder
from kernel_targets import sessions
from migrations import sparse_content
from mounts import wait_until
from openstack import GIB, CinderError
from services import MIB, Services
from volumes import write_file

pytestmark = pytest.mark.vm(seconds=45)

SIZE = 16 * MIB
EXTENT = 4 * MIB  # of LVM
CONTENT = sparse_content(SIZE, seed=1)
CLOSE_SECONDS = 60.0
Stored = MappedImage | StoredLogicalVolume


@pytest.fixture(scope="module")
def running(
    services: Services, iscsid: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestCinder]:
    with running_cinder(tmp_path_factory.mktemp("c"), services) as cinder:
        yield cinder


@pytest.fixture
def cinder(running: GuestCinder) -> Iterator[GuestCinder]:
    """At the end nothing is left of any volume."""
    before = running.left()
    mark = running.mark()
    try:
        yield running
        wait_until(lambda: running.left() == before, "nothing is left", CLOSE_SECONDS)
    finally:
        print(running.since(mark))  # pytest shows it when the test failed
        assert running.left() == before


NewVolume = Callable[..., str]


@pytest.fixture
def new_volume(cinder: GuestCinder) -> Iterator[NewVolume]:
    """new_volume(type, content): on the storage it is as small as that. Goes away after the test."""
    made: list[str] = []

    def make(kind: str, content: bytes = b"") -> str:
        volume = cinder.create_volume(kind)
        made.append(volume)
        if content:
            stored = cinder.where(volume)
            stored.resize(len(content))
            stored.write(content)
        return volume

    yield make
    for volume in made:
        cinder.delete(volume)


def retype(cinder: GuestCinder, volume: str, kind: str, seconds: float = 180) -> Stored:
    """To the other backend; the source is gone then."""
    source = cinder.where(volume)
    cinder.retype(volume, kind)
    shown = cinder.wait_moved(volume, kind.partition("-")[0], seconds)
    assert shown["volume_type"] == kind
    wait_until(lambda: not source.exists(), "the source is removed", CLOSE_SECONDS)
    return cinder.where(volume)


def content(stored: Stored) -> bytes:
    with stored.device() as device, device.open("rb") as file:
        return file.read(SIZE)


def digest(stored: Stored) -> str:
    """Of all of it."""
    with stored.device() as device:
        return sha256(device)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decrypted(stored: Stored) -> bytes:
    """By the kernel and cryptsetup alone."""
    with (
        stored.device() as device,
        encryption.decrypted(device, KEY, "--readonly") as plain,
        plain.open("rb") as file,
    ):
        return file.read(SIZE)


def test_a_volume_is_encrypted_by_a_retype_and_decrypted_by_another(
    cinder: GuestCinder, new_volume: NewVolume
) -> None:
    volume = new_volume("lvm", CONTENT)
    stored = retype(cinder, volume, "ceph-luks")
    assert isinstance(stored, MappedImage)
    begin = content(stored)
    assert begin.startswith(encryption.SIGNATURE)
    assert decrypted(stored) == CONTENT
    stored.resize(encryption.header_size(begin) + SIZE)
    assert content(retype(cinder, volume, "lvm")) == CONTENT
    assert not cinder.show(volume)["encrypted"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ceph", "ceph-luks"])
def test_an_encrypted_logical_volume_becomes_an_image_plain_or_as_it_is(
    cinder: GuestCinder, new_volume: NewVolume, kind: str
) -> None:
    """From the first type it is decrypted; of the same encryption it is copied as it is, with its header."""
    volume = new_volume("lvm-luks")
    source = cinder.where(volume)
    source.resize(SIZE + EXTENT)
    with source.device() as device:
        encryption.encrypt(device, KEY)
        with encryption.decrypted(device, KEY) as plain:
            write_file(plain, CONTENT, 0)
    header = content(source)[: encryption.HEADER]
    stored = retype(cinder, volume, kind)
    if kind == "ceph":
        assert content(stored) == CONTENT
        assert stored.allocated() <= 2 * SIZE
    else:
        assert content(stored).startswith(header)
        assert decrypted(stored) == CONTENT


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["ceph", "ceph-luks"])
def test_a_volume_that_its_header_leaves_no_room_for_is_not_copied_at_all(
    cinder: GuestCinder, new_volume: NewVolume, first: str
) -> None:
    """A logical volume has its header inside its size, an image beside it."""
    volume = new_volume(first)
    source, mark = cinder.where(volume), cinder.mark()
    cinder.retype(volume, "lvm-luks")
    with pytest.raises(CinderError, match="stayed at volfs@ceph#ceph"):
        cinder.wait_moved(volume, "lvm")
    assert cinder.show(volume)["status"] == "available"
    assert cinder.show(volume)["volume_type"] == first
    assert source.exists()
    wait_until(lambda: len(cinder.volumes()) == 1, "the target is removed", CLOSE_SECONDS)
    assert "less than there are to copy" in cinder.since(mark)
    assert "Volume copy 10" not in cinder.since(mark)  # but for a header that is wiped


@pytest.fixture
def kernel_initiator(cinder: GuestCinder) -> Iterator[None]:
    """Has volfs log in by the kernel."""
    portals = f'portals = ["127.0.0.1:{ISCSI_PORT}"]'
    cinder.configure(f'[backends.lio]\ndriver = "iscsi"\n{portals}\ninitiator = "kernel"\n')
    yield
    cinder.configure("")


@pytest.mark.thorough
def test_a_volume_migrates_to_lio_and_back_by_the_kernel_s_initiator(
    cinder: GuestCinder, kernel_initiator: None, new_volume: NewVolume
) -> None:
    volume = new_volume("any", CONTENT)
    for _ in range(2):
        source = cinder.where(volume)
        source.resize(SIZE)
        backend = "lvm" if isinstance(source, MappedImage) else "ceph"
        cinder.migrate(volume, backend)
        wait_until(sessions, "the kernel has logged in", CLOSE_SECONDS)
        cinder.wait_moved(volume, backend)
        wait_until(lambda source=source: not source.exists(), "the source is removed", CLOSE_SECONDS)
        assert content(cinder.where(volume)) == CONTENT


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_volume_of_full_size_is_encrypted_and_decrypted(cinder: GuestCinder, new_volume: NewVolume) -> None:
    """To its last byte: the image is larger than the volume by its header."""
    volume = new_volume("lvm")
    stored = cinder.where(volume)
    for offset in (0, GIB // 2 + 12345, GIB - SIZE):
        stored.write(CONTENT, offset)
    before = digest(stored)
    stored = retype(cinder, volume, "ceph-luks", 600)
    with stored.device() as device, encryption.decrypted(device, KEY, "--readonly") as plain:
        assert sha256(plain) == before
    assert digest(retype(cinder, volume, "lvm", 600)) == before
