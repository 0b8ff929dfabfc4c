"""The daemon as a process: readiness, its ends, what reaches the backend before them, stale remains, secrets."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults import Rule, volfs_with_faults, write_rules
from mounts import VOLFS, Mount, is_mounted, mounted, require_fuse, run_volfs, wait_until
from services import MIB, Services
from volumes import Storage, StoredVolume, raises, random_bytes

from volfs import api, daemon

END_SECONDS = 20.0
BLOCK = 65536

# What these hold is stable only after a flush, and seen past volfs: a file's page cache would flatter us.
DURABLE = pytest.mark.parametrize("driver", ["rbd", "block"])


@contextmanager
def mounted_volume(directory: Path, stored: StoredVolume, *options: str) -> Iterator[tuple[Mount, Path]]:
    """A mount, and the volume's file on it."""
    with mounted(directory, [stored.prefix], options, stored.environment) as mount:
        yield mount, mount.path.joinpath(stored.driver, *stored.place)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For one mount and its control socket; short, since sockets' paths are."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture
def disk(volumes: Path) -> Path:
    path = volumes / "disk"
    path.write_bytes(random_bytes(MIB))
    return path


def assert_ends(process: subprocess.Popen[str], code: int = 0) -> None:
    assert process.wait(END_SECONDS) == code


def close_dead(file: int) -> None:
    """A file of a daemon that is gone: nothing that is done with it succeeds."""
    with raises(errno.ENOTCONN):
        os.pwrite(file, b"x", 0)
    with raises(errno.ENOTCONN):
        os.close(file)


def has_ended(pid: int) -> bool:
    """Nobody may have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def assert_refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """One line, with these words, and the exit code."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"volfs: [^\n]+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


# ---- start -----------------------------------------------------------------------------------------------------


def test_the_ready_line_comes_when_io_works(place: Path, disk: Path) -> None:
    require_fuse()
    path = place / "mnt"
    path.mkdir()
    command = [*VOLFS, "mount", str(path), f"file:{disk.parent}", "--socket", str(place / "control")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{path}: ready (file, attached)\n"
        assert (path / "file" / "disk").read_bytes() == disk.read_bytes()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 0
    assert rest == ""
    assert not is_mounted(path)
    assert not (place / "control").exists()


@pytest.mark.slow
def test_a_signal_before_it_is_ready_ends_it(place: Path, disk: Path) -> None:
    require_fuse()
    path = place / "mnt"
    path.mkdir()
    command = [*VOLFS, "mount", str(path), f"file:{disk.parent}", "--socket", str(place / "control")]
    for _ in range(5):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            wait_until(lambda: is_mounted(path), "it is mounted", END_SECONDS)
            process.send_signal(signal.SIGTERM)
            try:
                _, log = process.communicate(timeout=END_SECONDS)
            finally:
                process.kill()
        assert process.returncode == 0, log
        assert not is_mounted(path)


@pytest.mark.slow
def test_more_clients_than_descriptors_do_not_end_it(place: Path, disk: Path) -> None:
    volfs = ["prlimit", "--nofile=48:48", *VOLFS]
    with mounted(place, [f"file:{disk.parent}"], volfs=volfs) as mount:
        with ExitStack() as clients:
            for _ in range(60):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(str(mount.socket))
            wait_until(lambda: "cannot accept" in mount.log, "it runs out of descriptors")
            assert sorted(os.listdir(mount.path)) == ["attached", "file"]
        assert mount.volfs("status").returncode == 0


@pytest.mark.slow
def test_in_the_background_it_returns_when_io_works(place: Path, disk: Path) -> None:
    require_fuse()
    path, socket = place / "mnt", place / "control"
    path.mkdir()
    done = run_volfs("mount", path, f"file:{disk.parent}", "--socket", socket, "--daemon")
    assert done.returncode == 0, done.stderr
    try:
        assert done.stdout == f"{path}: ready (file, attached)\n"
        assert done.stderr == ""
        assert (path / "file" / "disk").read_bytes() == disk.read_bytes()
        pid = api.status(socket_path=str(socket)).pid
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    finally:
        ended = run_volfs("umount", path, "--force")
    assert ended.returncode == 0, ended.stderr
    assert has_ended(pid)
    assert not is_mounted(path)


@pytest.mark.slow
def test_many_starts_at_once_on_one_socket_make_one_daemon(place: Path, disk: Path) -> None:
    require_fuse()
    starts = []
    for number in range(4):
        path = place / f"m{number}"
        path.mkdir()
        command = [*VOLFS, "mount", str(path), f"file:{disk.parent}", "--socket", str(place / "control")]
        starts.append(
            subprocess.Popen(
                [*command, "--daemon"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [start.communicate(timeout=60) for start in starts]
    try:
        assert sorted(start.returncode for start in starts) == [0, 1, 1, 1], outputs
        assert sum(is_mounted(place / f"m{number}") for number in range(4)) == 1
    finally:
        for number in range(4):
            if is_mounted(place / f"m{number}"):
                assert run_volfs("umount", place / f"m{number}", "--force").returncode == 0


# ---- what a killed daemon left ---------------------------------------------------------------------------------


def kill(mount: Mount) -> None:
    mount.process.kill()
    mount.process.wait()


@pytest.mark.slow
def test_the_remains_of_a_killed_daemon_are_replaced(place: Path, disk: Path) -> None:
    with mounted(place, [f"file:{disk.parent}"]) as first:
        kill(first)
        with raises(errno.ENOTCONN):
            os.listdir(first.path)
        assert first.socket.exists()
        with mounted(place, [f"file:{disk.parent}"]) as second:
            assert second.socket == first.socket
            assert (second.path / "file" / "disk").read_bytes() == disk.read_bytes()
            assert second.volfs("status").returncode == 0
        assert not is_mounted(place / "mnt")


@pytest.mark.slow
def test_the_remains_of_a_killed_daemon_are_told_from_a_living_one(place: Path, disk: Path) -> None:
    with mounted(place, [f"file:{disk.parent}"]) as mount:
        kill(mount)
        done = mount.volfs("status")
        assert_refused(done, "no volfs daemon")
        assert_refused(run_volfs("umount", mount.path), str(mount.path))


@pytest.mark.slow
@DURABLE
def test_what_was_fsynced_survives_a_killed_daemon(place: Path, storage: Storage, driver: str) -> None:
    content = random_bytes(2 * MIB)
    stored = storage.make(driver, 2 * MIB)
    with mounted_volume(place, stored) as (mount, path):
        file = os.open(path, os.O_WRONLY)
        os.pwrite(file, content, 0)
        os.fsync(file)
        kill(mount)
        close_dead(file)
        assert stored.read() == content
        stored.evict()


# ---- ends ------------------------------------------------------------------------------------------------------

WRITER = """
import os, sys
file, blocks, size = os.open(sys.argv[1], os.O_WRONLY | int(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
number = 0
while True:
    try:
        if os.pwrite(file, bytes([number % 255 + 1]) * size, number % blocks * size) != size:
            raise OSError(5, "short")
    except OSError as error:
        print("errno", error.errno, flush=True)
        break
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("driver", "number", "direct"),
    [
        ("rbd", signal.SIGTERM, 0),
        ("block", signal.SIGINT, os.O_DIRECT),
        ("block", signal.SIGHUP, 0),
        pytest.param("rbd", signal.SIGINT, os.O_DIRECT, marks=pytest.mark.slow),
        pytest.param("block", signal.SIGTERM, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_under_writes_flushes_what_was_acknowledged(
    place: Path, storage: Storage, driver: str, number: signal.Signals, direct: int
) -> None:
    blocks = 64
    stored = storage.make(driver, blocks * BLOCK)
    with mounted_volume(place, stored) as (mount, path):
        command = [sys.executable, "-c", WRITER, path, str(direct), str(blocks), str(BLOCK)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                if line == f"{blocks + 20}\n":  # some are written twice
                    mount.process.send_signal(number)
                    break
            *lines, last = writer.stdout.read().splitlines()
        assert_ends(mount.process)
        assert last.startswith("errno "), last
    acknowledged = int(lines[-1]) if lines else blocks + 20
    data = stored.read()
    for block in range(blocks):
        latest = acknowledged - (acknowledged - block) % blocks
        if block == (acknowledged + 1) % blocks:
            continue  # was under way: either, or torn
        found = data[block * BLOCK : (block + 1) * BLOCK]
        assert found == bytes([latest % 255 + 1]) * BLOCK, f"write {latest} of {acknowledged} is lost"


@pytest.mark.slow
@DURABLE
def test_a_signal_flushes_what_is_mapped(place: Path, storage: Storage, driver: str) -> None:
    """What a program changed by mmap is still in the kernel's page cache then."""
    content = random_bytes(2 * MIB)
    stored = storage.make(driver, 2 * MIB)
    with mounted_volume(place, stored) as (mount, path):
        file = os.open(path, os.O_RDWR)
        with mmap.mmap(file, 2 * MIB) as mapping:
            mapping[:] = content
            mount.process.send_signal(signal.SIGTERM)
            assert_ends(mount.process)
            assert stored.read() == content
        close_dead(file)


@DURABLE
def test_umount_returns_when_the_data_is_on_the_backend(place: Path, storage: Storage, driver: str) -> None:
    """With a file still open, that was neither synced nor closed, and --force; and without one."""
    content = random_bytes(2 * MIB)
    stored = storage.make(driver, 2 * MIB)
    with mounted_volume(place, stored) as (mount, path):
        file = os.open(path, os.O_WRONLY)
        os.pwrite(file, content, 0)
        assert_refused(run_volfs("umount", mount.path), stored.url, "busy")
        assert mount.process.poll() is None
        os.pwrite(file, b"more", 0)
        done = run_volfs("umount", mount.path, "--force")
        assert stored.read() == b"more" + content[4:]
        assert done.returncode == 0, done.stderr
        assert stored.users() == []
        assert not is_mounted(mount.path)
        assert mount.process.poll() == 0 or mount.process.wait(0.2) == 0
        close_dead(file)


@pytest.mark.slow
def test_umount_of_an_idle_mount_ends_the_daemon(place: Path, disk: Path) -> None:
    with mounted(place, [f"file:{disk.parent}"]) as mount:
        (mount.path / "file" / "disk").write_bytes(b"written")
        done = run_volfs("umount", mount.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert_ends(mount.process)
        assert not mount.socket.exists()
        assert not is_mounted(mount.path)
        assert disk.read_bytes()[:7] == b"written"
        assert_refused(run_volfs("umount", mount.path), "not on a volfs mount")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("driver", "command"),
    [("rbd", ["umount"]), ("block", ["fusermount3", "-u"])],
    ids=["umount", "fusermount3"],
)
def test_a_plain_umount_ends_the_daemon_cleanly(
    place: Path, storage: Storage, driver: str, command: list[str]
) -> None:
    stored = storage.make(driver, MIB)
    with mounted_volume(place, stored) as (mount, path):
        with path.open("r+b") as file:
            file.write(b"written")
            assert subprocess.run([*command, mount.path], capture_output=True, check=False).returncode != 0
        subprocess.run([*command, mount.path], check=True)
        assert_ends(mount.process)
        assert stored.read()[:8] == b"written\0"
        assert stored.users() == []
        assert not mount.socket.exists()


def test_a_lazy_umount_ends_the_daemon_with_the_last_file(place: Path, disk: Path) -> None:
    with mounted(place, [f"file:{disk.parent}"]) as mount:
        with (mount.path / "file" / "disk").open("r+b", buffering=0) as file:
            subprocess.run(["umount", "--lazy", mount.path], check=True)
            assert not is_mounted(mount.path)
            file.write(b"after")
            os.fsync(file.fileno())
            assert mount.process.poll() is None
        assert_ends(mount.process)
        assert disk.read_bytes()[:5] == b"after"


@pytest.mark.slow
def test_an_idle_daemon_ends_by_itself_and_a_used_one_does_not(place: Path, disk: Path) -> None:
    with mounted(place, [f"file:{disk.parent}"], ["--exit-idle", "0.4"]) as mount:
        with (mount.path / "file" / "disk").open("rb"), pytest.raises(subprocess.TimeoutExpired):
            mount.process.wait(1.0)
        assert_ends(mount.process)
        assert "idle" in mount.log
        assert not is_mounted(mount.path)


@pytest.mark.slow
def test_an_attached_volume_keeps_an_idle_daemon(place: Path, disk: Path) -> None:
    with mounted(place, [], ["--exit-idle", "0.4"]) as mount:
        socket = str(mount.socket)
        api.attach(f"file:{disk}", socket_path=socket)[1].close()
        with pytest.raises(subprocess.TimeoutExpired):
            mount.process.wait(1.0)
        api.detach("disk", socket_path=socket)
        assert_ends(mount.process)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_what_cannot_be_flushed_is_told_and_counts(place: Path, disk: Path, how: str) -> None:
    rules = place / "rules"
    write_rules(rules)
    (place / "volfs.toml").write_text(
        f"[backends.files]\ndriver = 'faulty-file'\npath = '{disk.parent}'\nfaults = '{rules}'"
    )
    options = ["--config", str(place / "volfs.toml")]
    with mounted(place, [], options, volfs=volfs_with_faults()) as mount:
        file = os.open(mount.path / "files" / "disk", os.O_WRONLY)
        os.pwrite(file, b"x", 0)
        write_rules(rules, Rule("aclose", errno.EIO))
        if how == "umount":
            assert_refused(run_volfs("umount", mount.path, "--force"), "injected: aclose")
        else:
            mount.process.send_signal(signal.SIGTERM)
        assert_ends(mount.process, 1)
        assert "not everything reached the backend: injected: aclose" in mount.log
        assert not is_mounted(mount.path)
        close_dead(file)


def test_a_volume_that_cannot_be_closed_does_not_keep_others_from_it(
    place: Path, disk: Path, volumes: Path
) -> None:
    (volumes / "other").write_bytes(bytes(10))
    rules = place / "rules"
    write_rules(rules)
    (place / "volfs.toml").write_text(
        f"[backends.bad]\ndriver = 'faulty-file'\npath = '{volumes}'\nfaults = '{rules}'\n"
        f"[backends.good]\ndriver = 'file'\npath = '{volumes}'"
    )
    options = ["--config", str(place / "volfs.toml")]
    with mounted(place, [], options, volfs=volfs_with_faults()) as mount:
        files = [os.open(mount.path / name, os.O_WRONLY) for name in ("bad/disk", "good/other")]
        for file in files:
            os.pwrite(file, b"written", 0)
        write_rules(rules, Rule("aclose", errno.EIO))
        mount.process.send_signal(signal.SIGTERM)
        assert_ends(mount.process, 1)
        for file in files:
            close_dead(file)
    assert (volumes / "other").read_bytes()[:7] == b"written"


# ---- clients ---------------------------------------------------------------------------------------------------


def test_a_client_that_dies_leaves_nothing_attached(place: Path, disk: Path) -> None:
    with mounted(place, []) as mount:
        command = [*VOLFS, "attach", f"file:{disk}", "--hold"]
        environment = {**os.environ, "VOLFS_SOCKET": str(mount.socket)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as client:
            assert client.stdout is not None
            path = Path(client.stdout.readline().strip())
            with path.open("rb") as file:
                client.kill()
                client.wait()
                assert file.read() == disk.read_bytes()  # it stays as long as somebody has it open
                assert path.exists()
            wait_until(lambda: not path.exists(), "the attachment of the dead client is gone")
        assert api.status(socket_path=str(mount.socket)).attached == []


def test_others_may_not_use_the_control_socket(place: Path, disk: Path) -> None:
    with mounted(place, [f"file:{disk.parent}"]) as mount:
        assert mount.socket.stat().st_mode & 0o777 == 0o600
        assert mount.socket.parent.stat().st_mode & 0o077 == 0


# ---- secrets ---------------------------------------------------------------------------------------------------


def everything_shown(mount: Mount, *paths: Path) -> str:
    """What others may get to see of the daemon: log, arguments, status, and the extended attributes of these paths."""
    shown = [mount.log, Path(f"/proc/{mount.process.pid}/cmdline").read_text()]
    for form in ((), ("--json",)):
        done = mount.volfs("status", *form)
        assert done.returncode == 0, done.stderr
        shown += [done.stdout, done.stderr]
    for way in (mount.path, *(way for path in paths for way in (path, path.parent, path.parent.parent))):
        shown += [f"{name}={os.getxattr(way, name)!r}" for name in os.listxattr(way)]
    return "\n".join(shown)


def attach_info(mount: Mount, info: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**mount.environment, "VOLFS_SOCKET": str(mount.socket)}
    return run_volfs("attach", "--connection-info", "-", *arguments, env=environment, input=json.dumps(info))


@pytest.mark.slow
def test_a_chap_password_is_shown_nowhere(place: Path, storage: Storage, services: Services) -> None:
    stored = storage.make("iscsi", MIB, chap="one-way")
    user, secret = (stored.environment[f"LIBISCSI_CHAP_{key}"] for key in ("USERNAME", "PASSWORD"))
    wrong = "wrong-" + secret[::-1]
    config = place / "volfs.toml"
    config.touch(0o600)
    config.write_text(
        f'[backends.san]\ndriver = "iscsi"\nportals = ["{services.portal}"]\ntargets = ["{stored.place[0]}"]\n'
        f'chap_username = "{user}"\nchap_password = "{secret}"\n'
    )
    data = {
        "target_portal": services.portal,
        "target_iqn": stored.place[0],
        "target_lun": 1,
        "auth_method": "CHAP",
        "auth_username": user,
    }
    with mounted(place, [], ["--config", str(config), "-v"]) as mount:
        listed = mount.path.joinpath("san", *stored.place)
        assert listed.read_bytes() == stored.read()
        info = {"driver_volume_type": "iscsi", "data": data | {"auth_password": secret}}
        good = attach_info(mount, info, "--json")
        assert good.returncode == 0, good.stderr
        info = {"driver_volume_type": "iscsi", "data": data | {"auth_password": wrong}}
        bad = attach_info(mount, info, "--name", "bad")
        assert bad.returncode == 1
        url = f"iscsi://{user}%{secret}@{services.portal}/{stored.place[0]}/1"
        by_url = mount.volfs("attach", url, "--name", "by-url", "--json")
        assert by_url.returncode == 0, by_url.stderr
        shown = everything_shown(mount, listed, Path(json.loads(good.stdout)["path"]))
        for done in (good, bad, by_url):
            shown += done.stdout + done.stderr
        assert secret not in shown
        assert wrong not in shown


@pytest.mark.slow
def test_a_cephx_key_is_shown_nowhere(place: Path, storage: Storage, services: Services) -> None:
    stored = storage.make("rbd", MIB, b"content")
    match = re.search(r"key = (\S+)", services.keyring.read_text())
    assert match is not None
    key = match[1]
    wrong = key[:6] + key[6:-2].swapcase() + key[-2:]
    config = place / "volfs.toml"
    config.touch(0o600)
    config.write_text(
        f'[backends.ceph]\ndriver = "rbd"\nconf = "{services.ceph_conf}"\nid = "{services.user}"\n'
        f'key = "{key}"\npools = ["volumes"]\n'
    )
    data = {"name": stored.url.removeprefix("rbd:"), "hosts": [], "ports": [], "auth_username": services.user}
    with mounted(place, [], ["--config", str(config), "-v"], {"CEPH_CONF": str(services.ceph_conf)}) as mount:
        listed = mount.path.joinpath("ceph", *stored.place)
        assert listed.read_bytes()[:7] == b"content"
        attached = []
        for name, given in (("good", key), ("bad", wrong)):
            info = {
                "driver_volume_type": "rbd",
                "data": data | {"keyring": f"[client.volfs]\nkey = {given}\n"},
            }
            attached.append(attach_info(mount, info, "--name", name, "--json"))
        good, bad = attached
        assert good.returncode == 0, good.stderr
        assert Path(json.loads(good.stdout)["path"]).read_bytes()[:7] == b"content"
        assert bad.returncode == 1
        shown = everything_shown(mount, listed, Path(json.loads(good.stdout)["path"]))
        for done in attached:
            shown += done.stdout + done.stderr
        assert key not in shown
        assert wrong not in shown


async def test_an_unexpected_error_of_reading_ahead_is_logged_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise KeyError("features")

    await daemon._read_ahead(fail)
    assert "a bug in volfs" in caplog.text
