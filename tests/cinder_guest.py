"""A whole Cinder in the guest, with Ceph and stock LVM behind LIO and the kernel's initiator; volumes encrypted or not.

It is asked by its API, as the one of scripts/openstack, which takes too long to start in the guest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import encryption
from kernel_targets import CONFIGFS, daemon, free_portals, sessions, succeed
from lvm import VolumeGroup, volume_group
from openstack import GIB, CinderError, Openstack, StoredFile, StoredImage
from services import Services
from volumes import write_file

from volfs import api
from volfs.control import StatusReply
from volfs.errors import ControlError

KEY = secrets.token_hex(32)  # of all encrypted volumes; the passphrase is the same digits
ENCRYPTION = {
    "provider": "luks",
    "cipher": "aes-xts-plain64",
    "key_size": 256,
    "control_location": "front-end",
}
GROUP_SIZE = 8 * GIB
BACKENDS = ("ceph", "lvm")
# Name, backend and whether it is encrypted; of the first volumes migrate anywhere.
TYPES = (
    ("any", "", False),
    ("ceph", "ceph", False),
    ("lvm", "lvm", False),
    ("ceph-luks", "ceph", True),
    ("lvm-luks", "lvm", True),
)
ISCSI_PORT = 3260
CEPH_DIRECTORY = Path("/etc/ceph")


def configuration(directory: Path, services: Services, group: VolumeGroup, port: int) -> str:
    """A cinder.conf."""
    etc = Path(sys.prefix) / "etc" / "cinder"
    return f"""\
[DEFAULT]
host = volfs
my_ip = 127.0.0.1
auth_strategy = noauth
transport_url = fake://
osapi_volume_listen = 127.0.0.1
osapi_volume_listen_port = {port}
report_interval = 0
service_down_time = 86400
periodic_interval = 0
rpc_response_timeout = 180
api_paste_config = {etc}/api-paste.ini
resource_query_filters_file = {etc}/resource_filters.json
rootwrap_config = {etc}/rootwrap.conf
state_path = {directory}/state
enabled_backends = {",".join(BACKENDS)}
volume_manager = volfs.cinder.manager.VolumeManager
log_file = {directory}/log
[database]
connection = sqlite:///{directory}/cinder.sqlite
[oslo_concurrency]
lock_path = {directory}/lock
[oslo_messaging_notifications]
driver = noop
[key_manager]
backend = cinder.keymgr.conf_key_mgr.ConfKeyManager
fixed_key = {KEY}
[volfs]
socket = {directory}/volfs/control
config_file = {directory}/volfs.toml
detach_timeout = 60
[ceph]
volume_backend_name = ceph
volume_driver = cinder.volume.drivers.rbd.RBDDriver
rbd_pool = volumes
rbd_ceph_conf = {services.ceph_conf}
rbd_user = {services.user}
rbd_secret_uuid = 457eb676-33da-42ec-9a8c-9293d545c337
[lvm]
volume_backend_name = lvm
volume_driver = cinder.volume.drivers.lvm.LVMVolumeDriver
volume_group = {group.name}
lvm_type = default
volume_clear_size = 1
target_helper = lioadm
target_ip_address = 127.0.0.1
target_port = {ISCSI_PORT}
target_prefix = iqn.2026-01.org.volfs:
volumes_dir = {directory}/volumes
"""


@dataclass(frozen=True)
class StoredLogicalVolume(StoredFile):
    """A volume of the lvm backend, which has it active as long as it is there."""

    group: VolumeGroup

    def write(self, data: bytes, offset: int = 0) -> None:
        write_file(self.path, data, offset)

    def exists(self) -> bool:
        return self.path.name in self.group.volumes()

    def resize(self, size: int) -> None:
        succeed("lvresize", "--force", "--yes", "--size", f"{size}b", f"{self.group.name}/{self.path.name}")

    @contextlib.contextmanager
    def device(self) -> Iterator[Path]:
        yield self.path


@dataclass(frozen=True)
class MappedImage(StoredImage):
    """A volume of the ceph backend."""

    @contextlib.contextmanager
    def device(self) -> Iterator[Path]:
        """Of the kernel's own client, which can only read."""
        succeed("modprobe", "rbd")
        command = ("rbd", "map", "--options", "ms_mode=prefer-crc", "--read-only", self.spec)
        device = self.services.run(*command).decode().strip()
        try:
            yield Path(device)
        finally:
            self.services.run("rbd", "unmap", device)


@dataclass
class GuestCinder(Openstack):
    """Volumes of the type `any` migrate anywhere; of the others each names its backend."""

    group: VolumeGroup = field(kw_only=True)
    port: int = field(kw_only=True)
    look_seconds: ClassVar[float] = 1.0  # each takes a tenth of one from what is waited for

    @property
    def socket(self) -> str:
        return str(self.var / "volfs" / "control")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {
            "Content-Type": "application/json",
            "OpenStack-API-Version": "volume 3.70",
            "X-Auth-Token": "admin:admin",
        }
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/v3{path}"
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise CinderError(f"{method} {path}: {error.code} {error.read().decode()}") from None
        return json.loads(text) if text else None

    def answers(self) -> bool:
        try:
            self.call("GET", "/types")
        except OSError:
            return False
        return True

    def make_type(self, name: str, backend: str = "", *, encrypted: bool = False) -> None:
        specs = {"volume_backend_name": backend} if backend else {}
        made = self.call("POST", "/types", {"volume_type": {"name": name, "extra_specs": specs}})
        if encrypted:
            self.call("POST", f"/types/{made['volume_type']['id']}/encryption", {"encryption": ENCRYPTION})

    def where(self, volume: str) -> MappedImage | StoredLogicalVolume:
        shown = self.show(volume)
        backend = shown["os-vol-host-attr:host"].partition("#")[2]
        name = f"volume-{shown['os-vol-mig-status-attr:name_id'] or volume}"
        if backend == "ceph":
            return MappedImage(self.services, "volumes", name, shown["size"] * GIB)
        return StoredLogicalVolume(self.group.path(name), self.group)

    def configure(self, settings: str) -> None:
        """Have volfs.toml say this; the daemon starts anew when it is needed."""
        self.stop_daemon()
        (self.var / "volfs.toml").write_text(settings)

    def stop_daemon(self) -> None:
        if status := self.status():
            api.unmount(status.mountpoint)

    def status(self) -> StatusReply | None:
        """Of the daemon; None when none runs."""
        try:
            return api.status(socket_path=self.socket)
        except ControlError as exc:
            if exc.errno != errno.ECONNREFUSED:
                raise
            return None

    def left(self) -> dict[str, list[str]]:
        """What attaching and copying may leave."""
        status = self.status()
        images = self.services.run("rbd", "ls", "volumes").decode().split()
        targets = CONFIGFS / "iscsi"
        return {
            "attached": [*map(str, status.attached), *map(str, status.open)] if status else [],
            "maps": [path.name for path in Path("/dev/mapper").glob("crypt-*")],
            "loops": [
                line for line in succeed("losetup", "-n", "-O", "BACK-FILE").split() if "/volfs/" in line
            ],
            "links": [str(path) for path in Path("/dev/disk/by-id").glob("os-brick*")],
            "sessions": sessions(),
            "targets": [path.name for path in targets.glob("iqn.*:volume-*")],
            "volumes": [name for name in (*images, *self.group.volumes()) if name.startswith("volume-")],
            "keys": [str(path) for path in Path(tempfile.gettempdir()).glob("brickrbd_*")],
            "configurations": sorted(os.listdir(CEPH_DIRECTORY)),
        }

    def log_path(self, daemon: str = "") -> Path:
        return self.var / "log"


@contextlib.contextmanager
def running_cinder(directory: Path, services: Services) -> Iterator[GuestCinder]:
    """For as long as it lasts. Who uses it leaves no volume behind."""
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(volume_group(directory, GROUP_SIZE))
        (portal,) = free_portals(1)
        cinder = GuestCinder(directory, services, {}, group=group, port=int(portal.rpartition(":")[2]))
        Path(cinder.socket).parent.mkdir(mode=0o700)
        CEPH_DIRECTORY.mkdir(exist_ok=True)
        keyring = CEPH_DIRECTORY / f"ceph.client.{services.user}.keyring"  # where os-brick has it
        keyring.symlink_to(services.keyring)
        stack.callback(keyring.unlink)
        cinder.configure("")
        conf = directory / "cinder.conf"
        conf.write_text(configuration(directory, services, group, cinder.port))
        program = Path(__file__).with_name("cinder_in_one.py")
        # With Cinder's own tools as well.
        path = f"{encryption.quick_passphrases(directory / 'bin')}:{Path(sys.executable).parent}"
        command = ("env", f"PATH={path}", sys.executable, str(program), "--config-file", str(conf))
        stack.enter_context(daemon(*command, ready=cinder.answers))
        for name, backend, encrypted in TYPES:
            cinder.make_type(name, backend, encrypted=encrypted)
        yield cinder
        cinder.stop_daemon()
