"""volfs for a user who is not root: nothing of it needs more than /dev/fuse and fusermount3."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounts import VOLFS
from services import skip_or_fail

NOBODY = "65534"
# The checkout may be below a directory that is closed to others, such as root's own: let this user read and search
# all, and nothing else. (Not by a bind mount: who tidies up after a killed test would delete the checkout.)
BECOME = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
READ_ALL = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]


@dataclass
class User:
    """Somebody without privileges, with a directory and a runtime directory of their own."""

    directory: Path

    def run(self, *command: str | Path, become: list[str] = BECOME) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*become, *map(str, command)],
            env={"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self.directory / "run")},
            cwd="/",
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def volfs(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        reachable = self.run("test", "-x", VOLFS[0]).returncode == 0
        return self.run(*VOLFS, *arguments, become=BECOME if reachable else [*BECOME, *READ_ALL])


@pytest.fixture
def user() -> Iterator[User]:
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can become somebody else")
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    # Not tmp_path: pytest closes it to others, as it should.
    directory = Path(tempfile.mkdtemp(prefix="volfs-user-"))
    try:
        for path in (directory, directory / "run", directory / "volumes", directory / "mnt"):
            path.mkdir(exist_ok=True)
            shutil.chown(path, int(NOBODY), int(NOBODY))
            path.chmod(0o700)
        os.chmod("/dev/fuse", 0o666)  # what udev does, where one runs
        yield User(directory)
    finally:
        os.chmod("/dev/fuse", mode)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith(str(directory)):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(directory)


@pytest.mark.slow
def test_an_unprivileged_user_mounts_writes_and_unmounts(user: User) -> None:
    volume = user.directory / "volumes" / "disk"
    user.run("truncate", "-s", "4M", volume)

    done = user.volfs("mount", user.directory / "mnt", f"file:{user.directory / 'volumes'}", "--daemon")
    assert done.returncode == 0, done.stderr
    path = user.directory / "mnt/file/disk"
    done = user.run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=4", "conv=notrunc")
    assert done.returncode == 0, done.stderr
    done = user.volfs("umount", user.directory / "mnt")
    assert done.returncode == 0, done.stderr

    assert volume.stat().st_size == 4 << 20
    assert any(volume.read_bytes())


@pytest.mark.slow
def test_a_daemon_is_started_on_demand_for_an_unprivileged_user(user: User) -> None:
    user.run("truncate", "-s", "1M", user.directory / "volumes" / "disk")

    done = user.volfs("attach", f"file:{user.directory / 'volumes/disk'}")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert user.run("stat", "-c", "%s", path).stdout.strip() == str(1 << 20)
    assert user.volfs("detach", "disk").returncode == 0
    assert user.volfs("umount", path.parent.parent).returncode == 0


@pytest.mark.slow
def test_root_may_not_look_into_a_users_mount_but_the_user_may(user: User) -> None:
    user.run("truncate", "-s", "1M", user.directory / "volumes" / "disk")
    mountpoint = user.directory / "mnt"
    done = user.volfs("mount", mountpoint, f"file:{user.directory / 'volumes'}", "--daemon")
    assert done.returncode == 0, done.stderr

    assert user.run("ls", mountpoint / "file").stdout.split() == ["disk"]
    with pytest.raises(PermissionError):
        os.listdir(mountpoint / "file")  # FUSE's own rule, without allow_other
    assert user.volfs("umount", mountpoint).returncode == 0


def test_without_access_to_dev_fuse_one_line_says_so(user: User) -> None:
    os.chmod("/dev/fuse", 0o600)
    done = user.volfs("mount", user.directory / "mnt", f"file:{user.directory / 'volumes'}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "volfs: /dev/fuse: this user may not open it; root can allow it: chmod 0666 /dev/fuse"
    ]
