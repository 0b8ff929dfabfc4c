"""Fresh volumes on any driver, and their bytes as the storage itself has them, past volfs.

`Storage.make(driver, ...)` is the one way to a volume for a test; conftest.py offers it as `make_volume`. What a driver
needs and is not there is a skip, or a failure where VOLFS_REQUIRE names it.
"""

from __future__ import annotations

import abc
import errno
import hashlib
import os
import random
import re
import secrets
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from services import (
    MIB,
    Image,
    Lun,
    Services,
    image,
    loop,
    lun,
    skip_or_fail,
)

from volfs.backends import backend_class
from volfs.backends.base import Backend, BackendVolume, Extent, Source
from volfs.source import parse_connection_info, parse_prefix, parse_source

# Every driver, and iSCSI with both sizes of sectors: (name of the variant, driver, how to make a volume).
VARIANTS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("rbd", "rbd", {}),
    ("iscsi-512", "iscsi", {"sector_size": 512}),
    ("iscsi-4096", "iscsi", {"sector_size": 4096}),
    ("block", "block", {}),
    ("file", "file", {}),
)
BRICK = ("brick", "brick", {})  # which has no listing and no URLs


def variants(quick: Collection[str] = (), only: Collection[str] = ()) -> list[Any]:
    """VARIANTS, or some, as a fixture's params; those that are not needed while writing code are slow."""
    return [
        pytest.param(variant, marks=[] if variant[0] in quick else [pytest.mark.slow], id=variant[0])
        for variant in VARIANTS
        if not only or variant[0] in only
    ]


def random_bytes(length: int, seed: int = 0) -> bytes:
    """The same ones for the same seed."""
    return random.Random(seed).randbytes(length)


@contextmanager
def raises(number: int) -> Iterator[pytest.ExceptionInfo[OSError]]:
    """The block raises an OSError (ours are such, too) with this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what tells
        yield caught
    assert errno.errorcode.get(caught.value.errno or 0) == errno.errorcode[number], caught.value


def assert_same(found: bytes, expected: bytes | bytearray, offset: int, when: str) -> None:
    """These bytes, read at `offset`, are the expected ones; a failure tells where they begin and end to differ."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{when}: {len(found)} bytes at {offset}, not {len(expected)}"
    wrong = [at for at, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    first, last = wrong[0], wrong[-1]
    raise AssertionError(
        f"{when}: {len(wrong)} of {len(found)} bytes at {offset} are wrong, from {offset + first} to {offset + last}:"
        f" {found[first : first + 16].hex()}..., not {bytes(expected[first : first + 16]).hex()}..."
    )


async def all_extents(volume: BackendVolume, offset: int, length: int) -> list[Extent]:
    """The extents of the range, asked for until it is covered; each answer keeps to the contract."""
    found: list[Extent] = []
    end = offset + length
    at = offset
    while at < end:
        answer = await volume.extents(at, end - at)
        assert answer, f"no extent at {at} of {offset}+{length}"
        for extent in answer:
            assert extent.offset == at, f"gap or overlap at {at}: {answer}"
            assert extent.length > 0, f"empty extent at {at}: {answer}"
            at = extent.end
            assert at <= end, f"beyond {end}: {answer}"
        found += answer
    return found


async def assert_holes_are_zero(
    volume: BackendVolume, model: bytes | bytearray, offset: int, length: int, when: str
) -> None:
    """No extent of the range hides a byte of the model that is not zero."""
    for extent in await all_extents(volume, offset, length):
        if not extent.data:
            content = bytes(model[extent.offset : extent.end])
            assert_same(bytes(len(content)), content, extent.offset, f"{when}: hole {extent}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(kw_only=True)
class StoredVolume(abc.ABC):
    """A volume on its storage. All methods go past volfs."""

    driver: ClassVar[str]
    size: int
    prefix: str  # what is mounted to see it in a listing
    place: tuple[str, ...]  # its path below a backend of that prefix
    url: str
    environment: dict[str, str] = field(default_factory=dict, repr=False)  # of a client that uses it
    undo: ExitStack = field(repr=False)  # removes it

    @property
    def backend(self) -> str:
        """What a mount of the prefix calls the backend."""
        return self.driver

    @property
    def source(self) -> Source:
        return self.source_of(self.url)

    def source_of(self, url: str) -> Source:
        """The source that a URL, beginning as that of this volume, names."""
        return parse_source(url, self.environment)

    def make_backend(self) -> Backend:
        """A backend of the prefix. On the trio loop; the caller closes it."""
        driver, settings, _ = parse_prefix(self.prefix, self.environment)
        return backend_class(driver)(driver, settings)

    def sha256(self) -> str:
        return sha256(self.read())

    def remove(self) -> None:
        """From the storage; an error when somebody has it open there. Happens at the end of the test otherwise."""
        self.undo.close()

    @abc.abstractmethod
    def read(self) -> bytes:
        """All that is stable on the storage."""

    @abc.abstractmethod
    def write(self, data: bytes, offset: int = 0) -> None: ...

    @abc.abstractmethod
    def resize(self, size: int) -> None:
        """In place, as its operator would do; clients that have it open keep it open."""

    @abc.abstractmethod
    def users(self) -> list[str]:
        """Who has it open, as the storage tells: a watcher, a session, a process."""

    def evict(self) -> None:  # noqa: B027 - most storages notice by themselves
        """Make the storage give up users that died, where it would wait for them; as an operator may."""

    @abc.abstractmethod
    def protect(self) -> str:
        """The URL of a volume with the present content that the storage lets nobody write."""


@dataclass(kw_only=True)
class RbdVolume(StoredVolume):
    driver = "rbd"
    image: Image

    def read(self) -> bytes:
        return self.image.read()

    def write(self, data: bytes, offset: int = 0) -> None:
        self.image.write(data, offset)

    def resize(self, size: int) -> None:
        self.image.resize(size)
        self.size = size

    def users(self) -> list[str]:
        return self.image.watchers()

    def evict(self) -> None:
        for address in self.users():
            self.image.services.run("ceph", "osd", "blocklist", "add", address)

    def protect(self) -> str:
        return self.url + self.image.snapshot("protected")


@dataclass(kw_only=True)
class IscsiVolume(StoredVolume):
    driver = "iscsi"
    services: Services = field(repr=False)
    lun: Lun

    def read(self) -> bytes:
        return self.lun.backing.read_bytes()

    def write(self, data: bytes, offset: int = 0) -> None:
        write_file(self.lun.backing, data, offset)

    def resize(self, size: int) -> None:
        # tgtd looks at a file's size when it opens it, and lets go of it only while the LUN is offline.
        os.truncate(self.lun.backing, size)
        for change in ("online=0", f"path={self.lun.backing}", "online=1"):
            self._update(change)
        self.size = size

    def users(self) -> list[str]:
        return re.findall(r"Initiator: (\S+)", self._target())

    def protect(self) -> str:
        self._update("readonly=1")
        return self.url

    def _update(self, change: str) -> None:
        (number,) = re.findall(r"^Target (\d+)", self._target())
        unit = ("--mode", "logicalunit", "--tid", number, "--lun", str(self.lun.number))
        self.services.run("tgtadm", "--lld", "iscsi", "--op", "update", *unit, "--params", change)

    def _target(self) -> str:
        """What tgtd tells of the target."""
        shown = self.services.run("tgtadm", "--lld", "iscsi", "--mode", "target", "--op", "show").decode()
        targets = re.split(r"^(?=Target \d)", shown, flags=re.MULTILINE)
        (found,) = (target for target in targets if f": {self.lun.iqn}\n" in target)
        return found


@dataclass(kw_only=True)
class BlockVolume(StoredVolume):
    driver = "block"
    device: Path

    @property
    def backing(self) -> Path:
        return backing_file(self.device)

    def read(self) -> bytes:
        return self.backing.read_bytes()  # of the disk, so to say; what is not flushed is not there

    def write(self, data: bytes, offset: int = 0) -> None:
        write_file(self.device, data, offset)

    def resize(self, size: int) -> None:
        os.truncate(self.backing, size)
        subprocess.run(["losetup", "--set-capacity", self.device], check=True)
        self.size = size

    def users(self) -> list[str]:
        return processes_with(self.device)

    def protect(self) -> str:
        subprocess.run(["blockdev", "--setro", self.device], check=True)
        self.undo.callback(subprocess.run, ["blockdev", "--setrw", self.device], check=True)
        return self.url


@dataclass(kw_only=True)
class BrickVolume(BlockVolume):
    """What os-brick gives for GPFS: a path that is there already. It needs no more of the kernel than loop devices."""

    driver = "brick"

    def source_of(self, url: str) -> Source:
        rest = url.removeprefix(self.url)
        data = {"device_path": f"{self.device}{rest}", "volume_id": self.place[-1] + rest}
        return parse_connection_info({"driver_volume_type": "gpfs", "data": data}, {})

    def make_backend(self) -> Backend:
        cls = backend_class(self.driver)
        return cls(self.driver, cls.settings_for(self.source))


@dataclass(kw_only=True)
class FileVolume(StoredVolume):
    driver = "file"
    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()

    def write(self, data: bytes, offset: int = 0) -> None:
        write_file(self.path, data, offset)

    def resize(self, size: int) -> None:
        os.truncate(self.path, size)
        self.size = size

    def users(self) -> list[str]:
        return processes_with(self.path)

    def protect(self) -> str:
        if os.geteuid() != 0:
            skip_or_fail("root", "only root can mount a file read-only")
        subprocess.run(["mount", "--bind", self.path, self.path], check=True)
        self.undo.callback(subprocess.run, ["umount", self.path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", self.path], check=True)
        return self.url


class Storage:
    """Makes volumes and removes them at the end. `directory` is for those that live on this machine."""

    def __init__(self, request: pytest.FixtureRequest, directory: Path, stack: ExitStack) -> None:
        self._request = request
        self._stack = stack
        self._files = directory / "files"
        self._devices = directory / "devices"  # links to loop devices, as /dev/<volume group> has them
        self._loops = directory / "loops"
        for path in (self._files, self._devices, self._loops):
            path.mkdir()

    @property
    def services(self) -> Services:
        found = self._request.getfixturevalue("services")
        assert isinstance(found, Services)
        return found

    def environment(self, driver: str) -> dict[str, str]:
        """Of a client that uses the volumes of a driver that are made here."""
        return ceph_environment(self.services) if driver == "rbd" else {}

    def prefix(self, driver: str) -> str:
        """What is mounted to see the volumes of a driver that are made here."""
        match driver:
            case "rbd":
                return "rbd:volumes"
            case "iscsi":
                return f"iscsi://{self.services.portal}"
            case "block":
                return f"block:{self._devices}"
        return f"file:{self._files}"

    def make(self, driver: str, size: int = 8 * MIB, content: bytes = b"", **options: Any) -> StoredVolume:
        """A new volume of zeros that begins with `content`.

        `options`: of `services.image` and `services.lun`, and `sector_size` of `services.loop`.
        """
        undo = self._stack.enter_context(ExitStack())
        made = self._makers()[driver](undo, size, **options)
        if content:
            made.write(content)
        return made

    def _makers(self) -> dict[str, Callable[..., StoredVolume]]:
        return {
            "rbd": self._make_rbd,
            "iscsi": self._make_iscsi,
            "block": self._make_block,
            "file": self._make_file,
            "brick": self._make_brick,
        }

    def _make_rbd(self, undo: ExitStack, size: int, **options: Any) -> RbdVolume:
        made = undo.enter_context(image(self.services, size, **options))
        return RbdVolume(
            size=size,
            prefix=f"rbd:{made.pool}",
            place=tuple(filter(None, (made.pool, made.namespace, made.name))),
            url=made.url,
            environment=self.environment("rbd"),
            undo=undo,
            image=made,
        )

    def _make_iscsi(self, undo: ExitStack, size: int, **options: Any) -> IscsiVolume:
        made = undo.enter_context(lun(self.services, size, **options))
        return IscsiVolume(
            size=size,
            prefix=self.prefix("iscsi"),
            place=(made.iqn, str(made.number)),
            url=made.url,
            environment=made.environment,
            undo=undo,
            services=self.services,
            lun=made,
        )

    def _make_block(self, undo: ExitStack, size: int, **options: Any) -> BlockVolume:
        device = undo.enter_context(loop(self._loops, size, **options))
        link = self._devices / f"device-{secrets.token_hex(4)}"
        link.symlink_to(device)
        undo.callback(link.unlink)
        return BlockVolume(
            size=size,
            prefix=self.prefix("block"),
            place=(link.name,),
            url=f"block:{link}",
            undo=undo,
            device=device,
        )

    def _make_brick(self, undo: ExitStack, size: int, **options: Any) -> BrickVolume:
        device = undo.enter_context(loop(self._loops, size, **options))
        name = f"volume-{secrets.token_hex(4)}"
        url = f"brick:gpfs/{name}"
        return BrickVolume(size=size, prefix="", place=(name,), url=url, undo=undo, device=device)

    def _make_file(self, undo: ExitStack, size: int) -> FileVolume:
        path = self._files / f"file-{secrets.token_hex(4)}"
        with path.open("xb") as file:
            file.truncate(size)
        undo.callback(path.unlink, missing_ok=True)
        return FileVolume(
            size=size,
            prefix=self.prefix("file"),
            place=(path.name,),
            url=f"file:{path}",
            undo=undo,
            path=path,
        )


def ceph_environment(services: Services) -> dict[str, str]:
    """How a client that is not the administrator reaches the private Ceph, whose configuration knows the keyring."""
    return {"CEPH_CONF": str(services.ceph_conf), "CEPH_ARGS": f"--id {services.user}"}


def write_file(path: Path, data: bytes, offset: int) -> None:
    """Write and make stable, past a page cache that others may look into."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            offset, rest = offset + written, rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def backing_file(loop_device: Path) -> Path:
    return Path(Path(f"/sys/block/{loop_device.name}/loop/backing_file").read_text().strip())


def cinder_data(volume: StoredVolume) -> dict[str, Any]:
    """`data` of the volume's connection info, as Cinder 29 makes it: nothing of a keyring or of a configuration."""
    common: dict[str, Any] = {
        "volume_id": "5f1d2e0c-0d2f-4c7e-9c52-0b6a0d5ad1f1",
        "access_mode": "rw",
        "encrypted": False,
        "qos_specs": None,
        "cacheable": False,
    }
    if isinstance(volume, IscsiVolume):
        portal = volume.services.portal
        iqn, number = volume.place
        return common | {
            "target_discovered": False,
            "target_portal": portal,
            "target_iqn": iqn,
            "target_lun": int(number),
        }
    assert isinstance(volume, RbdVolume)
    services = volume.image.services
    mons = services.json("ceph", "mon", "dump", "--format", "json")["mons"]
    host, port = mons[0]["addr"].split("/")[0].rsplit(":", 1)
    return common | {
        "name": "/".join(volume.place),
        "hosts": [host],
        "ports": [port],
        "cluster_name": "ceph",
        "auth_enabled": True,
        "auth_username": services.user,
        "secret_type": "ceph",
        "secret_uuid": "0d9c2d3e-54ae-4ac3-8fd4-6f4d9a0f5b3a",
        "discard": True,
    }


def processes_with(path: Path) -> list[str]:
    """The processes, by id, that have a file or device open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path.resolve()):
                found.append(link.parts[2])
        except OSError:  # closed, or ended, meanwhile
            continue
    return found
