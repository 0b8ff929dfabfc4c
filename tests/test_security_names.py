"""Names are data: those of backends and of clients, and what somebody has put at the paths that volfs uses.

Whatever a name is made of, it leads nowhere but to what it names: not out of the mount or the runtime directory, not
into a second line of a log or of an output. A link where volfs keeps its files is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import Mount, is_mounted, mounted, run_volfs
from services import Services, skip_or_fail
from volumes import Storage, raises

from volfs import api, journal
from volfs.control import Attach, Attached, Client
from volfs.control_server import control_socket
from volfs.errors import BackendError, ControlError, MountError, SourceError

NOBODY = 65534
ODD_NAMES = [
    b"a\xffb",
    b"-rf",
    b"a\nb",
    b"\x1b[2J",
    b"x" * 255,
    b" ",
    b"...",
    b"\xe2\x80\xae",
    b"$(x)",
    b"a'b\"",
    b"%s",
]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ volfs\[\d+\] [A-Z]+ \S.*")

MakeMount = Callable[..., Mount]

pytestmark = pytest.mark.slow


@pytest.fixture
def odd(volumes: Path) -> Path:
    """A directory of the file driver with names that only a file system would take."""
    for number, name in enumerate(ODD_NAMES):
        Path(os.fsdecode(os.fsencode(volumes) + b"/" + name)).write_bytes(b"%04d" % number)
    return volumes


def assert_one_line_each(text: str) -> None:
    """Nothing in it moves a cursor, or begins a line of its own."""
    for line in text.splitlines():
        assert line.isprintable(), line


# Names of backends


def test_a_volume_of_any_name_is_listed_opened_and_told_of(mount: MakeMount, odd: Path) -> None:
    on = mount(f"file:{odd}", options=("-v",))
    directory = os.fsencode(on.path / "file")
    assert sorted(os.listdir(directory)) == sorted(ODD_NAMES)
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(ODD_NAMES):
            file = stack.enter_context(open(directory + b"/" + name, "rb"))
            assert file.read() == b"%04d" % number
            assert os.getxattr(file.name, "user.volfs.source") == b"file:" + os.fsencode(odd) + b"/" + name
        shown = on.volfs("status")
        assert shown.returncode == 0, shown.stderr
        assert len(shown.stdout.splitlines()) == 1 + len(ODD_NAMES)
        assert_one_line_each(shown.stdout)
        opened = json.loads(on.volfs("status", "--json").stdout)["open"]
        assert len({it["source"] for it in opened}) == len(ODD_NAMES)
        assert all(it["source"].startswith(f"file:{odd}/") for it in opened)
    listed = on.volfs("ls", on.path / "file")
    assert len(listed.stdout.splitlines()) == len(ODD_NAMES)
    assert_one_line_each(listed.stdout)
    assert all(map(LOG_LINE.fullmatch, on.log.splitlines())), on.log


def test_an_image_whose_name_is_no_text_hides_no_others(
    mount: MakeMount, storage: Storage, services: Services
) -> None:
    stored = storage.make("rbd", 1 << 20, b"content")
    pool = stored.place[0]
    odd = [b"odd\xff", b"odd\x1b[2J", b"--odd"]
    import rbd

    with services.open_pool(pool) as ioctx:
        try:
            for name in odd:
                services.run("rbd", "create", "--size", "1M", "--pool", pool, "--image", os.fsdecode(name))
            on = mount(stored.prefix, env=stored.environment)
            names = os.listdir(os.fsencode(on.path / "rbd" / pool))
            assert {os.fsencode(stored.place[-1]), b"odd\x1b[2J", b"--odd"} <= set(names)
            assert on.path.joinpath("rbd", *stored.place).read_bytes()[:7] == b"content"
            with raises(errno.ENOENT):
                os.stat(os.fsencode(on.path / "rbd" / pool) + b"/odd\xff")
            for arguments in (("ls", stored.prefix), ("ls", on.path / "rbd" / pool)):
                done = on.volfs(*arguments)
                assert done.returncode == 0, done.stderr
                assert_one_line_each(done.stdout)
                assert stored.place[-1] in done.stdout
            assert all(map(LOG_LINE.fullmatch, on.log.splitlines())), on.log
        finally:
            for name in odd:
                services.run("rbd", "rm", "--no-progress", "--pool", pool, "--image", os.fsdecode(name))
            assert not {os.fsdecode(name) for name in odd} & set(rbd.RBD().list(ioctx))


# Names of clients


def test_a_client_names_a_file_of_the_mount_or_nothing(mount: MakeMount, volumes: Path) -> None:
    (volumes / "disk").write_bytes(b"content")
    on = mount(options=("-v",))
    attached = on.path / "attached"
    outside = {path: path.stat().st_mtime_ns for path in (on.path.parent, Path(tempfile.gettempdir()) / "..")}
    with contextlib.closing(Client(str(on.socket))) as client:
        for name in ["../x", "/etc/x", "a/b", "..", ".", "", "a\0b", "x" * 256, "ü" * 128]:
            with pytest.raises(SourceError):
                client.call(Attach(source=f"file:{volumes}/disk", name=name), Attached)
        assert os.listdir(attached) == []
        names = ["-rf", "a\nb", "\x1b[2J", "x" * 255, "\u202e", "file:x", "$(x)", "%s"]
        for name in names:
            told = client.call(Attach(source=f"file:{volumes}/disk", name=name), Attached)
            assert told.path == str(attached / name)
            assert (attached / name).read_bytes() == b"content"
        assert sorted(os.listdir(attached)) == sorted(names)
        for form in ((), ("--json",)):
            assert_one_line_each(on.volfs("status", *form).stdout)
        for name in names:
            api.detach(name, socket_path=str(on.socket))
    assert os.listdir(attached) == []
    assert outside == {path: path.stat().st_mtime_ns for path in outside}
    assert all(map(LOG_LINE.fullmatch, on.log.splitlines())), on.log


def test_a_link_in_the_directory_of_files_is_no_volume(
    mount: MakeMount, volumes: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (volumes / "link").symlink_to(secret)
    (volumes / "up").symlink_to("..")
    os.mkfifo(volumes / "fifo")
    on = mount(f"file:{volumes}")
    assert os.listdir(on.path / "file") == []
    for name in ("link", "up", "fifo"):
        with raises(errno.ENOENT):
            os.stat(on.path / "file" / name)
        assert on.volfs("attach", f"file:{volumes}/{name}").returncode == 1


def test_a_link_that_takes_the_place_of_a_volume_is_never_followed(
    mount: MakeMount, volumes: Path, tmp_path: Path
) -> None:
    """However quickly, between the look at it and its open."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    disk, link, file = volumes / "disk", tmp_path / "link", tmp_path / "file"
    on = mount(f"file:{volumes}")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            link.symlink_to(secret)
            link.rename(disk)
            file.write_bytes(b"volume")
            file.rename(disk)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        for _ in range(400):
            try:
                seen.add((on.path / "file" / "disk").read_bytes())
            except OSError as exc:
                seen.add(errno.errorcode[exc.errno or 0].encode())
    finally:
        stop.set()
        thread.join()
    assert b"volume" in seen
    assert seen <= {b"volume", b"ENOENT", b"ELOOP", b"ESTALE", b""}, seen


# What somebody has put at the paths that volfs uses


def assert_refused(done: subprocess.CompletedProcess[str], word: str) -> None:
    assert done.returncode == 1
    assert re.fullmatch(r"volfs: [^\n]+\n", done.stderr), done.stderr
    assert word in done.stderr


@pytest.mark.parametrize("command", ["attach", "mount"])
@pytest.mark.parametrize("planted", ["link", "open", "owner"])
def test_a_runtime_directory_that_is_not_ours_alone_is_refused_untouched(
    tmp_path: Path, volumes: Path, planted: str, command: str
) -> None:
    """As anybody may plant it in /tmp before the first start."""
    (volumes / "disk").write_bytes(b"content")
    victim, base, mountpoint = tmp_path / "victim", tmp_path / "run", tmp_path / "mnt"
    for path in (victim, base, mountpoint):
        path.mkdir(mode=0o700)
    runtime = base / "volfs"
    match planted:
        case "link":
            runtime.symlink_to(victim)
        case "open":
            runtime.mkdir()
            runtime.chmod(0o777)
        case "owner":
            if os.geteuid() != 0:
                skip_or_fail("root", "only root can give a directory away")
            runtime.mkdir(mode=0o700)
            os.chown(runtime, NOBODY, NOBODY)
    arguments = (
        ["attach", f"file:{volumes}/disk"] if command == "attach" else ["mount", str(mountpoint), "--daemon"]
    )
    done = run_volfs(*arguments, env={"XDG_RUNTIME_DIR": str(base), "VOLFS_SOCKET": ""})
    assert_refused(done, str(runtime))
    assert os.listdir(victim) == []
    assert os.listdir(runtime) == []
    assert not is_mounted(mountpoint)


@pytest.mark.parametrize("name", ["control", "control.lock", "control.log", "control.start", "journal"])
def test_a_link_among_the_files_of_the_runtime_directory_is_not_followed(
    tmp_path: Path, volumes: Path, name: str
) -> None:
    """Whoever could put it there is this user; it still may come from a backup, or a mistake."""
    (volumes / "disk").write_bytes(b"content")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    runtime = tmp_path / "run" / "volfs"
    runtime.mkdir(mode=0o700, parents=True)
    (runtime / name).symlink_to(victim)
    environment = {"XDG_RUNTIME_DIR": str(runtime.parent), "VOLFS_SOCKET": ""}
    try:
        if name == "journal":
            before = dict(os.environ)
            os.environ.update(environment)
            try:
                with pytest.raises(BackendError, match="expected a directory of user"):
                    journal.record("file", {})
            finally:
                os.environ.clear()
                os.environ.update(before)
        else:
            assert_refused(run_volfs("attach", f"file:{volumes}/disk", env=environment), name)
    finally:
        run_volfs("umount", runtime / "control.mnt", "--force", env=environment)
    assert victim.read_text() == "precious"
    assert (runtime / name).is_symlink()


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "device", "huge"])
def test_what_is_no_record_in_the_journal_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    journal.record("file", {"x": 1}).release()
    victim = tmp_path / "victim"
    victim.write_text('{"driver": "file", "facts": {}}')
    path = tmp_path / "volfs" / "journal" / "a.json"  # before the one that is right
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(victim)
        case "device":
            if os.geteuid() != 0:
                skip_or_fail("root", "only root makes devices")
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
    (found,) = journal.orphans()
    assert found.facts == {"x": 1}
    found.remove()
    assert os.path.lexists(path)
    assert victim.exists()


def test_a_socket_below_a_link_or_beside_one_is_made_where_it_was_asked_for(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(ControlError), control_socket(str(tmp_path / "link" / "control")):
        pass
    assert os.listdir(victim) == []


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """An ordinary directory that has the attribute by which a mount names its daemon; anybody can make one."""
    path = tmp_path / "named"
    path.mkdir()
    try:
        os.setxattr(path, "user.volfs.control", b"x")
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        skip_or_fail("xattr", "this file system has no extended attributes of users")
    return path


def test_a_directory_that_names_a_daemon_does_not_unmount_it(mount: MakeMount, named: Path) -> None:
    on = mount()
    os.setxattr(named, "user.volfs.control", os.fsencode(on.socket))
    done = on.volfs("umount", named)
    assert done.stderr == f"volfs: {named}: not on a volfs mount\n"
    assert done.returncode == 1
    assert is_mounted(on.path)


def test_a_mount_that_names_the_daemon_of_another_does_not_unmount_it(
    mount: MakeMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = mount(), mount()
    monkeypatch.setattr(api, "control_of", lambda _: str(mine.socket))  # what their file system answers
    with pytest.raises(MountError) as caught:
        api.unmount(str(theirs.path))
    assert str(caught.value) == f"{theirs.path}: the daemon that it names serves {mine.path}"
    assert is_mounted(mine.path)
    assert is_mounted(theirs.path)


def test_a_file_that_has_a_volumes_attributes_is_an_ordinary_one(
    mount: MakeMount, volumes: Path, named: Path
) -> None:
    """rsync -X and cp -a take them along: what is behind the end of the copy is still cut off."""
    (volumes / "disk").write_bytes(b"content")
    on = mount(f"file:{volumes}")
    copy = named / "copy"
    copy.write_bytes(bytes(100))
    os.setxattr(copy, "user.volfs.source", b"file:/x")
    done = on.volfs("copy", on.path / "file" / "disk", copy)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == b"content"


def test_a_link_for_a_mountpoint_mounts_where_it_leads_and_nowhere_else(tmp_path: Path) -> None:
    """As mount(8) does; and what is not an empty directory there is refused, as without a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "to-full").symlink_to("full")
    (tmp_path / "to-nothing").symlink_to("nothing")
    for name in ("to-full", "to-nothing"):
        done = run_volfs("mount", tmp_path / name, "--socket", tmp_path / "s" / "control")
        assert_refused(done, name)
    (tmp_path / "d").mkdir()
    with mounted(tmp_path / "d", [], mountpoint=tmp_path / "link") as on:
        assert is_mounted(tmp_path / "real")
        assert os.listdir(on.path) == ["attached"]
    assert not is_mounted(tmp_path / "real")
