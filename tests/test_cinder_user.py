"""cinder-volume by a user who is not root, as distributions run it: what needs root goes through sudo and rootwrap.

scripts/openstack's cinder-volume makes way for one of this user. All that it finds in /etc (its configuration, sudo's,
fuse.conf, the keys of Ceph) lies in a layer over /etc that no other process sees.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cinder_daemon import fill_everywhere
from mounts import wait_until
from openstack import GIB, CinderError, Openstack, StoredFile, script
from services import TOP, skip_or_fail
from test_unprivileged import BECOME, READ_ALL

from volfs.cinder import options

pytestmark = pytest.mark.slow

USER = "nobody"
BIN = TOP / ".venv" / "bin"
ROOTWRAP = "/etc/cinder/rootwrap.conf"
SECONDS = 60
STOP_SECONDS = 10
DATA = GIB // 16


class CinderVolume:
    """One of an unprivileged user, in a directory of its own, with the backends ceph and local."""

    def __init__(self, openstack: Openstack, top: Path) -> None:
        self.openstack, self.top = openstack, top
        self.since = datetime.datetime.now(datetime.UTC).replace(tzinfo=None, microsecond=0)
        self.log, self.local, self.socket = top / "log", top / "local", top / "run" / "control"
        top.chmod(0o755)
        for name in ("state", "local", "run"):
            (top / name).mkdir(mode=0o700)
            shutil.chown(top / name, USER, "nogroup")
        for name in ("etc", "layer", "python"):
            (top / name).mkdir()
        for module, path in (("cinder_drivers.py", TOP / "tests"), ("volfs", TOP)):
            (top / "python" / module).symlink_to(path / module)
        self._write_etc()

    def _write_etc(self) -> None:
        place = script.Place(self.openstack.var)
        keyring = f"/etc/ceph/{script.read_state(place)['cluster']}.client.volfs.keyring"
        ceph_conf = re.sub("(?m)^keyring = .*$", f"keyring = {keyring}", place.services.conf.read_text())
        self._write("ceph/ceph.conf", ceph_conf)
        self._write(keyring, place.services.keyring("client.volfs").read_text(), secret=True)
        self._write("fuse.conf", "user_allow_other\n")
        rule = f"{USER} ALL=(root) NOPASSWD: {BIN}/cinder-rootwrap {ROOTWRAP} *\n"
        self._write("sudoers.d/cinder", f'Defaults:{USER} secure_path="{BIN}:/usr/sbin:/usr/bin"\n{rule}')
        packaged = TOP / ".venv" / "etc"
        for filters in (
            packaged / "cinder" / "rootwrap.d" / "volume.filters",
            packaged / "os-brick" / "rootwrap.d" / "os-brick.filters",
            Path(options.__file__).with_name("volfs.filters"),
        ):
            self._write(f"cinder/rootwrap.d/{filters.name}", filters.read_text())
        directories = f"{BIN},/usr/sbin,/usr/bin,/sbin,/bin"
        self._write(
            ROOTWRAP, f"[DEFAULT]\nfilters_path = /etc/cinder/rootwrap.d\nexec_dirs = {directories}\n"
        )
        self._write("cinder/volfs.toml", "[mount]\nallow_other = true\n")
        stock = re.sub(r"(?m)^helper_command = .*\n", "", place.cinder_conf.read_text())
        self._write("cinder/cinder.conf", stock + self._settings(), secret=True)

    def _settings(self) -> str:
        """Of an option that is there twice the last one counts."""
        return f"""
[DEFAULT]
enabled_backends = ceph,local
state_path = {self.top}/state
rootwrap_config = {ROOTWRAP}
volume_manager = volfs.cinder.manager.VolumeManager
[oslo_concurrency]
lock_path = {self.top}/state/lock
[ceph]
rbd_ceph_conf = /etc/ceph/ceph.conf
[local]
volfs_test_directory = {self.local}
[volfs]
socket = {self.socket}
config_file = /etc/cinder/volfs.toml
"""

    def _write(self, name: str, text: str, *, secret: bool = False) -> None:
        """Below what is to be /etc."""
        path = self.top / "etc" / name.removeprefix("/etc/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o400 if secret else 0o444)
        if secret:
            shutil.chown(path, USER)

    def is_up(self) -> bool:
        """The scheduler knows of both backends of this cinder-volume."""
        late = self.openstack.late_backends(self.since)
        return {"ceph", "local"}.isdisjoint(late)

    def daemons(self) -> list[int]:
        """The processes of the volfs daemon that it has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                argv = path.read_bytes().decode().split("\0")
                if f"{self.socket}.mnt" in argv and "mount" in argv:
                    found.append(int(path.parent.name))
        return found

    def start(self) -> subprocess.Popen[bytes]:
        program = str(BIN / "cinder-volume")
        reachable = subprocess.run([*BECOME, "test", "-x", program], check=False).returncode == 0
        become = [*BECOME, *([] if reachable else READ_ALL)]
        command = [*become, program, "--config-file", "/etc/cinder/cinder.conf", "--debug"]
        layer, etc = shlex.quote(str(self.top / "layer")), shlex.quote(str(self.top / "etc"))
        text = f"""set -e
            mount -t tmpfs tmpfs {layer}
            mkdir {layer}/up {layer}/work
            mount -t overlay overlay -o lowerdir=/etc,upperdir={layer}/up,workdir={layer}/work /etc
            cp -a {etc}/. /etc/
            chmod 0440 /etc/sudoers.d/cinder
            mknod {layer}/fuse c 10 229
            chmod 0666 {layer}/fuse
            mount --bind {layer}/fuse /dev/fuse
            exec {shlex.join(command)}"""
        place = script.Place(self.openstack.var)
        environment = place.environment(script.read_state(place))
        environment.pop("CEPH_ARGS", None)
        environment |= {"HOME": str(self.top / "state"), "PYTHONPATH": str(self.top / "python")}
        environment |= {"CEPH_CONF": "/etc/ceph/ceph.conf"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", text],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.top,
            )


@pytest.fixture
def cinder_volume(openstack: Openstack) -> Iterator[CinderVolume]:
    for program in ("sudo", "fusermount3", "unshare"):
        if not shutil.which(program):
            skip_or_fail("openstack", f"{program} is not installed")
    place = script.Place(openstack.var)
    # Not tmp_path: pytest closes it to others, as it should.
    top = Path(tempfile.mkdtemp(prefix="volfs-cinder-"))
    try:
        script.stop_daemons(place, ("cinder-volume",))
        mine = CinderVolume(openstack, top)
        process = mine.start()
        try:
            wait_until(lambda: process.poll() is not None or mine.is_up(), "both backends are up", SECONDS)
            assert process.poll() is None, mine.log.read_text()
            yield mine
        finally:
            for pid in mine.daemons():
                os.kill(pid, signal.SIGTERM)  # neither its mount nor its socket is for this process
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        openstack.restart()
        shutil.rmtree(top)


@pytest.mark.thorough
def test_an_unprivileged_cinder_volume_migrates_by_a_dd_of_root(
    openstack: Openstack, cinder_volume: CinderVolume
) -> None:
    volume = openstack.create_volume("ceph")
    fill_everywhere(openstack, volume, DATA)
    source, digest = openstack.where(volume), openstack.where(volume).sha256()
    openstack.retype(volume, "local")
    try:
        openstack.wait_moved(volume, "local")
    except CinderError as error:
        pytest.fail(f"{error}\n{cinder_volume.log.read_text()[-20_000:]}")
    log = cinder_volume.log.read_text()
    (target,) = map(StoredFile, cinder_volume.local.iterdir())
    assert target.sha256() == digest
    assert target.allocated() <= DATA + 4 * 1024**2
    assert target.path.owner() == USER
    wait_until(lambda: not source.exists(), "the source is removed", SECONDS)
    assert f"volfs: rbd volume {volume} is {cinder_volume.socket}.mnt/" in log
    assert (
        f"Running cmd (subprocess): sudo cinder-rootwrap {ROOTWRAP} dd if={cinder_volume.socket}.mnt/" in log
    )
    (daemon,) = cinder_volume.daemons()
    assert Path(f"/proc/{daemon}").owner() == USER
    openstack.delete(volume)
