"""Wrong input from the user's side: names, sockets, versions, mountpoints, settings, a machine that lacks something.

Each gets one clear line and its exit code or errno, and changes nothing. What a storage refuses is in
test_storage_mistakes.py; mistakes that one module alone finds are tested with it (URLs and connection infos in
test_source.py and test_iscsi_source.py, TOML in test_config.py, the protocol in test_control.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Run, failed, ran, succeeded
from disks import opened
from fakes import fake_daemon
from holes import BOTH_ZEROINGS, fallocate
from mounts import VOLFS, Mount, is_mounted, mounted, require_fuse, wait_until
from services import MIB, skip_or_fail
from volumes import raises, random_bytes

import volfs
from volfs import api, control
from volfs.control import PROTOCOL, Welcome, encode
from volfs.errors import ControlError, SourceError
from volfs.version import VERSION

DATA = random_bytes(MIB)
NOBODY = 65534
NO_SOCKET = "{path}: expected the path of a control socket; something else is there"


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """All that is below a directory, with modes and contents: equal when nothing was changed."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(directory))] = (status.st_mode, content)
    return found


@contextlib.contextmanager
def unchanged(*directories: Path) -> Iterator[None]:
    before = [snapshot(directory) for directory in directories]
    yield
    assert [snapshot(directory) for directory in directories] == before


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of volumes: `disk` with DATA, its other names, and `small`."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "disk").write_bytes(DATA)
    (directory / "hard").hardlink_to(directory / "disk")
    (directory / "small").write_bytes(bytes(4096))
    return directory


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("d"), [f"file:{files}"]) as mount:
        yield mount


@pytest.fixture
def idle(daemon: Mount, files: Path) -> Iterator[Mount]:
    """The daemon, which a mistake must leave as it was: nothing attached or open, the volumes untouched."""
    with unchanged(files):
        yield daemon
    # A release is told to the daemon after close(2) has returned.
    wait_until(
        lambda: not (status(daemon).attached or status(daemon).open), f"nothing in use: {status(daemon)}"
    )


def status(daemon: Mount) -> control.StatusReply:
    return api.status(socket_path=str(daemon.socket))


# Names looked up below the mount

NAMES_OF_NOTHING = {
    b"\xff\xfe": errno.ENOENT,
    b"a\nb": errno.ENOENT,
    b"\x1b[31m": errno.ENOENT,
    b" ": errno.ENOENT,
    b"disk@": errno.ENOENT,
    b"x" * 255: errno.ENOENT,
    b"x" * 256: errno.ENAMETOOLONG,
    b"x" * 300: errno.ENAMETOOLONG,
    "ü".encode() * 128: errno.ENAMETOOLONG,
}


@pytest.mark.parametrize("place", ["", "file", "attached"])
def test_a_name_that_no_volume_has(idle: Mount, place: str) -> None:
    for name, number in NAMES_OF_NOTHING.items():
        path = os.path.join(os.fsencode(idle.path / place), name)
        with raises(number):
            os.stat(path)
        with raises(number):
            os.open(path, os.O_RDWR)
        with raises(errno.EPERM if number == errno.ENOENT else number):
            os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


@pytest.mark.parametrize("path", ["file/../../x", "file/../../../x", "attached/../x", "file/./x", "file//x"])
def test_a_path_that_leads_out_of_the_mount_is_the_kernels_business(idle: Mount, path: str) -> None:
    with raises(errno.ENOENT):
        os.open(f"{idle.path}/{path}", os.O_RDONLY)


def test_a_path_below_a_volume(idle: Mount) -> None:
    for path in ("file/disk/x", "file/disk/../small"):
        with raises(errno.ENOTDIR):
            os.open(f"{idle.path}/{path}", os.O_RDONLY)


# Names and sources given to the command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["attach", "file:/\udcff"],
            2,
            "expected a source of UTF-8 text, or of what JSON has: 'utf-8' codec",
        ),
        (["attach", "file:/disk", "--name", "\udcff"], 2, r"'\udcff': expected a file name of UTF-8 text"),
        (["attach", "file:/disk", "--name", "../x"], 2, "'../x': expected a file name, without '/'"),
        (["attach", "../x"], 2, "'../x': not a volume's URL; expected one that begins with rbd:"),
        (
            ["attach", "rbd:volumes/../x"],
            2,
            "rbd:volumes/../x: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]",
        ),
        (["detach", "\udcff"], 1, r"\udcff: nothing of that name, URL or path is attached"),
        (["detach", "../x"], 1, "{cwd}/x: nothing of that name, URL or path is attached"),
        (
            ["detach", "--wait", "-1", "x"],
            2,
            "Invalid value for '--wait': expected a number of seconds, not -1",
        ),
        (
            ["detach", "--wait", "nan", "x"],
            2,
            "Invalid value for '--wait': expected a number of seconds, not nan",
        ),
        (
            ["detach", "--wait", "inf", "x"],
            2,
            "Invalid value for '--wait': expected a number of seconds, not inf",
        ),
        (["info", "\udcff"], 1, r"\udcff: No such file or directory"),
        (
            ["info", "rbd:volumes/\udcff"],
            2,
            r"rbd:volumes/\udcff: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]",
        ),
        (["ls", "rbd:\udcff"], 2, r"rbd:\udcff: expected rbd:POOL[/NAMESPACE], or rbd: for all pools"),
        (["ls", "rbd:.."], 2, "rbd:..: expected rbd:POOL[/NAMESPACE], or rbd: for all pools"),
        (["ls", "file:/" + "x" * 300], 1, "/" + "x" * 300 + ": list: File name too long"),
        (["mount", "m", "rbd:.."], 2, "rbd:..: expected rbd:POOL[/NAMESPACE], or rbd: for all pools"),
        (["mount", "m", "-c", ""], 2, "'': No such file or directory"),
        (["mount", "m", "-c", "/"], 2, "/: Is a directory"),
        (
            ["mount", "m", "--exit-idle", "-1"],
            2,
            "Invalid value for '--exit-idle': expected a number of seconds, not -1",
        ),
        (["mount", "\udcff"], 1, r"{cwd2}/\udcff: expected a mountpoint whose path is UTF-8 text"),
    ],
    ids=lambda value: (
        " ".join(value)[:30].encode(errors="replace").decode() if isinstance(value, list) else ""
    ),
)
def test_a_wrong_argument(
    run: Run,
    idle: Mount,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments, VOLFS_SOCKET=str(idle.socket), VOLFS_CONFIG="")
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done
    assert done.err.startswith("volfs: " + message.format(cwd=tmp_path.parent, cwd2=tmp_path)), done.err
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_a_line_end_is_shown_on_one_line(run: Run, idle: Mount, files: Path) -> None:
    succeeded(run("attach", f"file:{files}/disk", "--name", "a\nb", VOLFS_SOCKET=str(idle.socket)))
    for command in (["status"], ["ls", str(idle.path / "attached")]):
        assert r"a\nb" in succeeded(run(*command, VOLFS_SOCKET=str(idle.socket)))
    succeeded(run("detach", "a\nb", VOLFS_SOCKET=str(idle.socket)))


def test_a_name_that_another_volume_has(run: Run, idle: Mount, files: Path) -> None:
    environment = {"VOLFS_SOCKET": str(idle.socket)}
    path = succeeded(run("attach", f"file:{files}/disk", **environment)).strip()
    failed(
        run("attach", f"file:{files}/small", "--name", "disk", **environment),
        1,
        f"attached/disk is file:{files}/disk already",
    )
    assert Path(path).read_bytes() == DATA
    succeeded(run("detach", "disk", **environment))


# Copies onto what is the source, too small, or nothing to copy to


def names_of_disk(mount: Mount, files: Path, directory: Path) -> dict[str, str]:
    """All the ways to say one volume."""
    (directory / "link").symlink_to(files / "disk")
    (directory / "hard").hardlink_to(files / "disk")
    (directory / "dir").symlink_to(files)
    return {
        "url": f"file:{files}/disk",
        "url of a hard link": f"file:{files}/hard",
        "url through a link": f"file:{directory}/dir/disk",
        "on the mount": f"{mount.path}/file/disk",
        "hard link on the mount": f"{mount.path}/file/hard",
        "attached": f"{mount.path}/attached/disk",
        "file": f"{files}/disk",
        "link": f"{directory}/link",
        "hard link": f"{directory}/hard",
    }


@pytest.mark.slow
def test_source_and_target_by_any_two_names(run: Run, idle: Mount, files: Path, tmp_path: Path) -> None:
    environment = {"VOLFS_SOCKET": str(idle.socket)}
    names = names_of_disk(idle, files, tmp_path)
    succeeded(run("attach", names["url"], "--name", "disk", **environment))
    ways = list(names)
    pairs = [(one, other) for number, one in enumerate(ways) for other in (ways[0], ways[number - 1], one)]
    for one, other in pairs:
        done = run("copy", "-q", names[one], names[other], **environment)
        assert (done.code, done.err) == (1, "volfs: source and target are the same volume\n"), (
            one,
            other,
            done,
        )
    succeeded(run("detach", "disk", **environment))


def test_a_device_by_two_nodes(run: Run, tmp_path: Path, loop_device: Callable[..., Path]) -> None:
    device = loop_device(MIB)
    (tmp_path / "link").symlink_to(device)
    os.mknod(tmp_path / "node", 0o600 | 0o060000, device.stat().st_rdev)
    for other in ("link", "node"):
        failed(
            run("copy", "-q", str(device), str(tmp_path / other)), 1, "source and target are the same volume"
        )


@pytest.mark.parametrize("target", ["file:{files}/small", "{mount}/file/small"])
def test_a_target_that_is_too_small(run: Run, idle: Mount, files: Path, target: str) -> None:
    named = target.format(files=files, mount=idle.path)
    done = run("copy", "-q", f"{files}/disk", named, VOLFS_SOCKET=str(idle.socket))
    failed(done, 1, f"the target is too small: 4096 bytes, expected at least {MIB}")


@pytest.mark.parametrize("target", ["/dev/null", "/dev/full", "{tmp}/fifo", "{tmp}/socket"])
def test_a_target_that_has_no_size(run: Run, files: Path, tmp_path: Path, target: str) -> None:
    """The command compares sizes; a program that wants to write to a pipe has `copy_volume_data`."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        named = target.format(tmp=tmp_path)
        done = run("copy", "-q", f"{files}/disk", named)
    failed(done, 1, f"{named}: expected a file, a volume or a block device")


# Sockets at which nobody serves


def at(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "stale":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))


@pytest.mark.parametrize("command", [["status"], ["ls"], ["detach", "x"], ["attach", "file:/etc/passwd"]])
@pytest.mark.parametrize("kind", ["file", "directory", "fifo"])
def test_a_path_that_is_no_socket(run: Run, tmp_path: Path, kind: str, command: list[str]) -> None:
    path = tmp_path / "control"
    at(path, kind)
    with unchanged(tmp_path):
        failed(run(*command, VOLFS_SOCKET=str(path)), 1, NO_SOCKET.format(path=path))


@pytest.mark.parametrize("kind", ["file", "directory", "fifo"])
def test_a_socket_is_not_made_over_something_else(run: Run, files: Path, tmp_path: Path, kind: str) -> None:
    require_fuse()
    tmp_path.chmod(0o700)
    path, mountpoint = tmp_path / "control", tmp_path / "mnt"
    mountpoint.mkdir()
    at(path, kind)
    with unchanged(tmp_path):
        done = run("mount", mountpoint, f"file:{files}", "--socket", path)
        failed(done, 1, NO_SOCKET.format(path=path))
    assert not is_mounted(mountpoint)


@pytest.mark.parametrize("command", [["status"], ["ls"], ["detach", "x"], ["attach", "file:/etc/passwd"]])
def test_a_socket_that_nobody_answers_at(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Somebody listens, and says nothing: the deadline is named, and no second daemon is started."""
    monkeypatch.setattr(control, "TIMEOUT", 0.05)
    with fake_daemon(tmp_path, wait=True) as path, unchanged(tmp_path):
        done = run(*command, VOLFS_SOCKET=path)
    failed(done, 1, f"the volfs daemon at {path} did not answer within 0.05 s")


def test_a_stale_socket_is_no_daemon(run: Run, tmp_path: Path) -> None:
    at(tmp_path / "control", "stale")
    with unchanged(tmp_path):
        done = run("status", VOLFS_SOCKET=str(tmp_path / "control"))
    failed(done, 1, f"no volfs daemon answers at {tmp_path}/control: Connection refused")


@pytest.mark.slow
def test_a_socket_that_this_user_may_not_use(files: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No second daemon is started beside it."""
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can become somebody else")
    with mounted(tmp_path_factory.mktemp("d"), [f"file:{files}"]) as mount:
        for path in (mount.socket, mount.socket.parent):
            path.chmod(0o755 if path.is_dir() else 0o600)
        as_nobody = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", "--inh-caps", "+dac_read_search"]
        for command in (["status"], ["attach", f"file:{files}/disk"]):
            done = subprocess.run(
                [*as_nobody, "--ambient-caps", "+dac_read_search", *VOLFS, *command],
                env={**os.environ, "VOLFS_SOCKET": str(mount.socket)},
                capture_output=True,
                text=True,
                check=False,
            )
            failed(ran(done), 1, f"no volfs daemon answers at {mount.socket}: Permission denied")
        assert sorted(path.name for path in mount.socket.parent.iterdir()) == [
            *("control", "control.lock", "mnt", "volfs.log")
        ]


# Another version at the other end


@pytest.mark.parametrize("command", [["status"], ["attach", "file:/etc/passwd"], ["detach", "x"]])
@pytest.mark.parametrize(("protocol", "use"), [(PROTOCOL + 1, "use volfs 9.9, or "), (PROTOCOL - 1, "")])
def test_a_daemon_of_another_version(
    run: Run, tmp_path: Path, command: list[str], protocol: int, use: str
) -> None:
    welcome = Welcome(protocol=protocol, version="9.9", mountpoint="/mnt", pid=1)
    with fake_daemon(tmp_path, encode(welcome)) as path, unchanged(tmp_path):
        done = run(*command, VOLFS_SOCKET=path)
    failed(
        done,
        1,
        f"the daemon at {path} (volfs 9.9) speaks protocol {protocol}, this volfs {VERSION} protocol {PROTOCOL}: "
        f"{use}end that daemon by `kill {os.getpid()}`, which flushes and unmounts, and mount again",
    )


def test_a_client_of_another_version(idle: Mount) -> None:
    """It is told of ours before anything else, and nothing that it asks for is done."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
        client.connect(str(idle.socket))
        client.sendall(b'{"type":"Hello","protocol":%d,"version":"9.9"}\n' % (PROTOCOL + 1))
        assert f'"protocol":{PROTOCOL},"version":"{VERSION}"'.encode() in answers.readline()
        client.sendall(b'{"type":"Unmount","force":true}\n')
        told = answers.readline().decode()
        assert f"the client (volfs 9.9) speaks protocol {PROTOCOL + 1}, the daemon (volfs {VERSION}" in told
        assert answers.readline() == b""
    assert is_mounted(idle.path)


# Mountpoints

MOUNTPOINTS: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "missing": (lambda path: None, "No such file or directory", errno.ENOENT),
    "file": (lambda path: path.touch(), "expected a directory to mount on", errno.ENOTDIR),
    "link to nothing": (lambda path: path.symlink_to("x"), "No such file or directory", errno.ENOENT),
    "not empty": (
        lambda path: (path.mkdir(), (path / "precious").touch()),
        "expected an empty directory; its files would be hidden",
        errno.ENOTEMPTY,
    ),
}


@pytest.mark.parametrize(("make", "message", "number"), MOUNTPOINTS.values(), ids=MOUNTPOINTS)
@pytest.mark.parametrize(
    "background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "daemon"]
)
def test_a_mountpoint_that_cannot_be_used(
    run: Run, tmp_path: Path, make: Callable[[Path], Any], message: str, number: int, background: bool
) -> None:
    require_fuse()
    tmp_path.chmod(0o700)
    path, socket_path = tmp_path / "mnt", tmp_path / "control"
    make(path)
    before = snapshot(tmp_path)
    done = run("mount", path, *(["--daemon"] if background else []), "--socket", socket_path)
    failed(done, 1, f"{path}: {message}")
    assert {
        key: value for key, value in snapshot(tmp_path).items() if not key.startswith("control.l")
    } == before


def test_a_mountpoint_that_is_taken(run: Run, idle: Mount, files: Path, tmp_path: Path) -> None:
    done = run("mount", idle.path, f"file:{files}", "--socket", tmp_path / "control")
    failed(done, 1, f"{idle.path}: something is mounted there already")
    assert list(tmp_path.iterdir()) == []
    assert (idle.path / "file" / "disk").read_bytes() == DATA


def test_a_second_daemon_at_a_socket(run: Run, idle: Mount, files: Path, tmp_path: Path) -> None:
    done = run("mount", tmp_path, f"file:{files}", "--socket", idle.socket)
    failed(
        done,
        1,
        f"another volfs daemon serves {idle.socket}; use it, or give this one a socket of its own (--socket)",
    )
    assert not is_mounted(tmp_path)
    assert (idle.path / "file" / "disk").read_bytes() == DATA


@pytest.mark.slow
def test_the_mount_of_a_killed_daemon(
    run: Run, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every command says so in the same words; `umount --force` tidies up."""
    with mounted(tmp_path_factory.mktemp("d"), [f"file:{files}"]) as mount:
        mount.process.kill()
        mount.process.wait()
        disk = mount.path / "file" / "disk"
        dead = "the volfs daemon of this mount is dead"
        for command in (["ls", mount.path], ["info", disk], ["copy", "-q", disk, "/nonexistent"]):
            failed(run(*command), 1, f"{command[-1] if len(command) == 2 else disk}: {dead}")
        failed(run("umount", mount.path), 1, f"{mount.path}: {dead}; unmount it with --force")
        no_daemon = f"no volfs daemon answers at {mount.socket}: Connection refused"
        for command in (["status"], ["detach", "x"]):
            failed(run(*command, VOLFS_SOCKET=str(mount.socket)), 1, no_daemon)
        with raises(errno.ENOTCONN):
            disk.open("rb")
        succeeded(run("umount", "--force", mount.path))
        assert not is_mounted(mount.path)
        assert list(mount.path.iterdir()) == []


# Secrets that others may read

SAN = '[backends.san]\ndriver = "iscsi"\nportals = ["192.0.2.7"]\n'
HOLDS = {
    "chap_password": SAN + 'chap_username = "u"\nchap_password = "s3cret"\n',
    "mutual_chap_password": SAN
    + 'chap_username = "u"\nchap_password_file = "{none}"\nmutual_chap_username = "t"\nmutual_chap_password = "s3cret"',
    "key": '[backends.san]\ndriver = "rbd"\nkey = "s3cret"\n',
    "arguments": '[backends.san]\ndriver = "rbd"\narguments = ["--key=s3cret"]\n',
}
NAMES = {
    "chap_password_file": SAN + 'chap_username = "u"\nchap_password_file = "{file}"\n',
    "keyring": '[backends.san]\ndriver = "rbd"\nkeyring = "{file}"\n',
}
HARMLESS = {
    "no secret": SAN,
    "a user": '[backends.san]\ndriver = "rbd"\nid = "cinder"\narguments = ["--keyfile-like", "x"]\n',
    "a missing keyring": '[backends.san]\ndriver = "rbd"\nkeyring = "{none}"\n',
}
MODES = [(0o604, "everybody"), (0o640, "its group"), (0o600, ""), (0o400, "")]


def warned(run: Run, directory: Path, toml: str) -> list[str]:
    """The warnings of a mount that fails for another reason, which is the last line."""
    config = directory / "volfs.toml"
    config.write_text(toml)
    done = run("mount", directory / "nowhere", "-c", config, "--socket", directory / "control")
    *warnings, last = done.err.splitlines()
    assert (done.code, done.out, last) == (1, "", f"volfs: {directory}/nowhere: No such file or directory")
    assert "s3cret" not in done.err
    return warnings


@pytest.mark.parametrize(
    ("key", "mode", "who"),
    [
        *((key, 0o644, "everybody") for key in (*HOLDS, *NAMES)),
        *((key, mode, who) for key in ("key", "keyring") for mode, who in MODES),
    ],
)
def test_a_secret_that_others_may_read(run: Run, tmp_path: Path, key: str, mode: int, who: str) -> None:
    named = tmp_path / "it's secret"
    named.write_text("s3cret")
    toml = {**HOLDS, **NAMES}[key].format(file=named, none=tmp_path / "none")
    (tmp_path / "volfs.toml").touch()
    (tmp_path / "volfs.toml").chmod(mode if key in HOLDS else 0o644)
    named.chmod(mode)
    file = tmp_path / "volfs.toml" if key in HOLDS else named
    quoted = str(file) if key in HOLDS else f"'{tmp_path}/it'\"'\"'s secret'"
    line = f"volfs: warning: {file}: {who} may read the secret of backends.san.{key}: chmod 600 {quoted}"
    assert warned(run, tmp_path, toml) == ([line] if who else [])


@pytest.mark.parametrize("toml", HARMLESS.values(), ids=HARMLESS)
def test_a_configuration_without_a_secret_may_be_read(run: Run, tmp_path: Path, toml: str) -> None:
    assert warned(run, tmp_path, toml.format(none=tmp_path / "none")) == []


def test_a_group_may_be_how_the_daemon_reads_it(run: Run, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can give a file away")
    (tmp_path / "volfs.toml").touch(0o640)
    os.chown(tmp_path / "volfs.toml", NOBODY, 0)
    assert warned(run, tmp_path, HOLDS["key"]) == []


@pytest.mark.parametrize("key", ["conf", "keyring"])
def test_a_relative_path_in_a_configuration(run: Run, tmp_path: Path, key: str) -> None:
    """A daemon in the background would look for it elsewhere."""
    (tmp_path / "volfs.toml").write_text(f'[backends.ceph]\ndriver = "rbd"\n{key} = "ceph.x"\n')
    done = run("mount", tmp_path, "-c", tmp_path / "volfs.toml")
    failed(done, 2, f"{tmp_path}/volfs.toml: backends.ceph.{key}: expected an absolute path, not 'ceph.x'")


# A machine without something

BLOCKED = """
import os, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["BLOCKED"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ceph", "needs"),
    [
        ("rados,rbd", "python3-rados and python3-rbd"),
        ("rados", "python3-rados and python3-rbd"),
        ("rbd", "python3-rados and python3-rbd"),
        ("volfs.native.rbd_image", "librbd (apt install librbd-dev"),
    ],
)
def test_without_librbd_and_libiscsi_the_other_drivers_work(
    files: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, ceph: str, needs: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    environment = {"PYTHONPATH": str(tmp_path), "BLOCKED": f"{ceph},volfs.native.libiscsi"}
    prefixes = [f"file:{files}", "rbd:volumes", "iscsi://192.0.2.7"]
    with mounted(tmp_path_factory.mktemp("d"), prefixes, env=environment) as mount:
        assert sorted(os.listdir(mount.path)) == ["attached", "file", "iscsi", "rbd"]
        assert (mount.path / "file" / "disk").read_bytes() == DATA
        for place, source, line in (
            ("rbd/volumes", "rbd:volumes/x", f"the rbd driver needs {needs}"),
            (
                "iscsi",
                "iscsi://192.0.2.7/iqn.x/1",
                "the iscsi driver needs libiscsi (apt install libiscsi-dev",
            ),
        ):
            with raises(errno.EOPNOTSUPP):
                os.listdir(mount.path / place)
            assert line in mount.log
            done = ran(mount.volfs("attach", source))
            assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
            assert done.err.startswith(f"volfs: {line}"), done.err
        assert succeeded(ran(mount.volfs("attach", f"file:{files}/disk")))
        assert (mount.path / "attached" / "disk").read_bytes() == DATA


HELPER = (
    "without the compiled helper fuse_session: no holes (all is data, none can be made), no copies inside the daemon,"
    " at most 12 buffered requests at once"
)


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [True, False])
def test_without_the_helper_below_pyfuse3_the_mount_works_and_says_so(
    files: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, blocked: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    name = "volfs.native.fuse_session" if blocked else "nothing"
    environment = {"PYTHONPATH": str(tmp_path), "BLOCKED": name}
    with mounted(tmp_path_factory.mktemp("d"), [f"file:{files}"], env=environment) as mount:
        path = mount.path / "file" / "disk"
        with path.open("r+b", buffering=0) as file:  # which writes through the page cache
            assert file.write(DATA[::-1]) == len(DATA)
        assert (files / "disk").read_bytes() == DATA[::-1]
        assert "user.volfs.size" in os.listxattr(path)
        with raises(errno.ENODATA):
            os.getxattr(path, "security.capability")
        small = path.with_name("small")
        with opened(path, os.O_RDWR) as file, opened(small, os.O_RDWR) as target:
            for mode in (0, *BOTH_ZEROINGS.values()):
                if blocked:  # as the kernel answers for a file system that cannot
                    with raises(errno.EOPNOTSUPP):
                        fallocate(file, mode, 0, 100)
                else:
                    fallocate(file, mode, 0, 100)
            assert os.pread(file, 100, 0) == (DATA[::-1][:100] if blocked else bytes(100))
            assert os.pwrite(file, DATA[::-1], 0) == len(DATA)
            assert os.lseek(file, 5, os.SEEK_DATA) == 5
            assert os.lseek(file, 5, os.SEEK_HOLE) == len(DATA)
            assert os.copy_file_range(file, target, 4096, 1, 0) == 4096
        assert (files / "small").read_bytes() == DATA[::-1][1:4097]
        assert (files / "disk").read_bytes() == DATA[::-1]
        assert mount.log.count(HELPER) == blocked, mount.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hide", "message"),
    [
        (
            "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9",
            "/dev/fuse is missing: load the kernel's fuse module (modprobe fuse)",
        ),
        ("mount --bind /dev/null /dev/fuse", None),
    ],
    ids=["missing", "something else"],
)
@pytest.mark.parametrize("way", ["mount", "mount --daemon", "attach"])
def test_without_dev_fuse(files: Path, tmp_path: Path, hide: str, message: str | None, way: str) -> None:
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can hide devices")
    tmp_path.chmod(0o700)
    (tmp_path / "mnt").mkdir()
    verb, *options = way.split()
    what = [f"{tmp_path}/mnt", f"file:{files}"] if verb == "mount" else [f"file:{files}/disk"]
    command = [*VOLFS, verb, *what, *options, "--socket", str(tmp_path / "control")]
    # What is mounted is to stay in there, also below a root that is no mount of its own (a chroot).
    script = f'mount --make-rprivate /dev && {hide} && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    last = done.stderr.splitlines()[-1]
    before = "volfs: cannot start a volfs daemon: " if verb == "attach" else "volfs: "
    if message:
        assert done.stderr == f"{before}{message}\n"
    else:  # libfuse has its say, too
        assert last.startswith(before)
        assert "/dev/fuse" in last
    assert not (tmp_path / "control").exists()
    assert not is_mounted(tmp_path / "mnt")


# The Python calls


@pytest.mark.parametrize(
    ("source", "mode", "number", "message"),
    [
        ("file:{files}/nosuch", "rb", errno.ENOENT, "{files}/nosuch: no such file or device"),
        ("file:{files}/nosuch", "wb", errno.ENOENT, "{files}/nosuch: no such file or device"),
        ("file:{files}", "rb", errno.ENOENT, "{files}: not a regular file of {parent}"),
        (
            "file:{files}/" + "x" * 256,
            "rb",
            errno.ENAMETOOLONG,
            "{files}/" + "x" * 256 + ": stat: File name too long",
        ),
        (
            "rbd:volumes/a/b/c",
            "rb",
            errno.EINVAL,
            "rbd:volumes/a/b/c: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]",
        ),
    ],
    ids=["missing", "not made", "directory", "long", "syntax"],
)
def test_open_volume(idle: Mount, files: Path, source: str, mode: str, number: int, message: str) -> None:
    with raises(number) as caught:
        volfs.open_volume(source.format(files=files), mode, socket_path=str(idle.socket))
    assert str(caught.value) == message.format(files=files, parent=files.parent)


def test_open_volume_where_no_daemon_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with unchanged(tmp_path), pytest.raises(ControlError, match="Not a directory"):
        volfs.open_volume("file:/etc/passwd", socket_path=str(tmp_path / "file" / "control"))
    with unchanged(tmp_path), pytest.raises(SourceError):
        volfs.open_volume("nbd:x", socket_path=str(tmp_path / "control"))
