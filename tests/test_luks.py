"""Encrypted volumes: os-brick's encryptor on a file of the mount, and what it may not do to the mount.

The encryptor replaces the path it is given by a link to the decrypted device. Nothing on the mount is replaced, so a
caller gives it a link from outside. In the guest (marker vm), which has dm-crypt.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import encryption
import pytest
from connectors import processutils, set_up_os_brick
from guest_volumes import GuestStorage
from kernel_targets import succeed
from migrations import GARBAGE, assert_holds, sparse_content
from mounts import Mount, mounted, wait_until
from os_brick import encryptors
from services import MIB
from volumes import StoredVolume, write_file

from volfs import api, copy_volume_data, open_volume
from volfs.backends.brick_commands import Commands
from volfs.cinder.connector import VolfsConnector

pytestmark = pytest.mark.vm(seconds=10)

SIZE = 8 * MIB
CONTENT = sparse_content(SIZE - encryption.HEADER, seed=1)
CLOSE_SECONDS = 30.0


class Key:
    """A secret of Barbican's, as its client hands it out. os-brick takes the hexadecimal digits as passphrase."""

    def __init__(self) -> None:
        self._bytes = secrets.token_bytes(16)

    def managed_type(self) -> str:
        return "symmetric"

    def get_encoded(self) -> bytes:
        return self._bytes

    @property
    def passphrase(self) -> str:
        return self._bytes.hex()

    def get(self, context: object, key_id: str) -> Key:
        """The part of the key manager, which has no other."""
        return self


class LocalConnector(VolfsConnector):
    """For a volume that the host has already."""

    protocol = "local"


@pytest.fixture(scope="module", autouse=True)
def os_brick() -> None:
    set_up_os_brick()


@pytest.fixture(autouse=True)
def quick_passphrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", encryption.quick_passphrases(tmp_path / "bin"))


@pytest.fixture(scope="module")
def mount(guest_storage: GuestStorage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("m"), [], env=guest_storage.environment("rbd")) as mount:
        yield mount


@pytest.fixture(autouse=True)
def client(mount: Mount, guest_storage: GuestStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a client of the daemon. At the end nothing is left of any volume."""
    monkeypatch.setenv("VOLFS_SOCKET", str(mount.socket))
    for name, value in guest_storage.environment("rbd").items():
        monkeypatch.setenv(name, value)
    before = left()
    yield
    try:
        wait_until(lambda: left() == before, "nothing is left", CLOSE_SECONDS)
    finally:
        assert left() == before  # which tells what, when it is not
    status = api.status()
    assert (status.attached, status.open) == ([], [])


def left() -> dict[str, list[str]]:
    """What an encryptor and the programs that it runs may leave."""
    return {
        "maps": [path.name for path in Path("/dev/mapper").glob("crypt-*")],
        "loops": succeed("losetup", "--noheadings", "--output", "NAME,BACK-FILE").splitlines(),
        "links": [str(path) for path in Path("/dev/disk/by-id").glob("os-brick*")],
    }


def attach(mount: Mount, url: str) -> Path:
    attached, client = api.attach(url, socket_path=str(mount.socket))
    client.close()
    return Path(attached.path)


def encryptor_of(path: Path, key: Key) -> Any:
    info = {"driver_volume_type": "local", "data": {"device_path": str(path), "encrypted": True}}
    return encryptors.get_volume_encryptor(
        root_helper="sudo",
        connection_info=info,
        keymgr=key,
        execute=Commands(
            CLOSE_SECONDS
        ),  # the same commands; os-brick's way to start them takes 0.3 s each in here
        control_location="front-end",
        provider=encryptors.LUKS,
        encryption_key_id="1",
    )


Encrypted = Callable[[Mount, StoredVolume, Key, Path], Any]


@contextmanager
def by_a_link_of_the_callers(mount: Mount, volume: StoredVolume, key: Key, directory: Path) -> Iterator[Path]:
    """As the README tells."""
    path = attach(mount, volume.url)
    link = directory / "disk"
    link.symlink_to(path)
    encryptor = encryptor_of(link, key)
    encryptor.attach_volume(None)
    try:
        yield link
    finally:
        encryptor.detach_volume()
        link.unlink()
        api.detach(str(path), wait=CLOSE_SECONDS)


@contextmanager
def by_the_connector_s_link(mount: Mount, volume: StoredVolume, key: Key, directory: Path) -> Iterator[Path]:
    """As volfs's own connectors have it: they make a link for the encryptor."""
    properties = {"device_path": volume.url.removeprefix("block:"), "encrypted": True}
    connector = LocalConnector("sudo", socket_path=str(mount.socket))
    device_info = connector.connect_volume(properties)
    link = Path(device_info["path"])
    encryptor = encryptor_of(link, key)
    encryptor.attach_volume(None)
    try:
        yield link
    finally:
        encryptor.detach_volume()
        connector.disconnect_volume(properties, device_info)


def decrypted(volume: StoredVolume, key: Key, directory: Path) -> bytes:
    """What the storage holds, decrypted without volfs."""
    stored = directory / "stored"
    stored.write_bytes(volume.read())
    with encryption.decrypted(stored, key.passphrase, "--readonly") as device:
        return device.read_bytes()


@pytest.mark.parametrize(
    ("encrypted_kind", "plain_kind", "encrypted"),
    [("rbd", "lvm", by_a_link_of_the_callers), ("lvm", "rbd", by_the_connector_s_link)],
    ids=["rbd", "lvm"],
)
def test_a_volume_is_encrypted_and_migrated_to_a_plain_one_and_back(
    mount: Mount,
    guest_storage: GuestStorage,
    tmp_path: Path,
    encrypted_kind: str,
    plain_kind: str,
    encrypted: Encrypted,
) -> None:
    """A plain volume is copied to a new encrypted one, which is copied to another plain one, and changed."""
    key = Key()
    volume = guest_storage.make(encrypted_kind, SIZE)
    source = guest_storage.make(plain_kind, SIZE, CONTENT)
    target = guest_storage.make(plain_kind, SIZE, GARBAGE * SIZE)
    with encrypted(mount, volume, key, tmp_path) as link:
        assert link.resolve().parent == Path("/dev")  # that of dm-crypt
        with open_volume(source.url) as reader, link.open("r+b", 0) as writer:
            copy_volume_data(reader, writer, len(CONTENT), verify=True)
            os.fsync(writer.fileno())
    assert volume.read().startswith(encryption.SIGNATURE)
    assert decrypted(volume, key, tmp_path) == CONTENT
    with encrypted(mount, volume, key, tmp_path) as link:
        done = mount.volfs("copy", link, target.url, "--verify")
        assert done.returncode == 0, done.stderr
        write_file(link, b"changed", 7000)
    assert_holds(target, CONTENT, GARBAGE * encryption.HEADER)
    changed = CONTENT[:7000] + b"changed" + CONTENT[7007:]
    assert decrypted(volume, key, tmp_path) == changed
    assert [each.users() for each in (volume, source, target)] == [[], [], []]


def test_the_mount_is_not_to_be_replaced_by_an_encryptor(mount: Mount, guest_storage: GuestStorage) -> None:
    """Given the volume's own path, it fails; the file is there as before, and its own detach cleans up."""
    volume = guest_storage.make("rbd", SIZE)
    path = attach(mount, volume.url)
    encryptor = encryptor_of(path, Key())
    with pytest.raises(processutils.ProcessExecutionError, match="Operation not permitted"):
        encryptor.attach_volume(None)
    assert path.is_file()
    assert not path.is_symlink()
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes().startswith(encryption.SIGNATURE)
    encryptor.detach_volume()
    api.detach(str(path), wait=CLOSE_SECONDS)
