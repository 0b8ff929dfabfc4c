"""Who may do what: what the kernel is told to enforce, and that what is read-only is never written, by any way.

That owner, group and mode are as configured, and what another user then may do, is in test_mount.py.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import Mount, mounted, run_volfs, wait_until
from services import skip_or_fail
from volumes import Storage, random_bytes

from volfs import api
from volfs.extents import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

SIZE = 1 << 20
FICLONE = 0x40049409
FS_IOC_SETFLAGS = 0x40086602
REFUSED = {
    errno.EROFS,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
}

MakeMount = Callable[..., Mount]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", ["", "allow_other", "allow_other,mode=0640", "allow_other,mode=0666,ro"])
def test_the_kernel_checks_permissions_whatever_the_options(mount: MakeMount, options: str) -> None:
    """And takes no program on the mount for set-user-id, and no file for a device."""
    on = mount(options=("-o", options) if options else ())
    (line,) = (it for it in Path("/proc/self/mountinfo").read_text().splitlines() if f" {on.path} " in it)
    per_mount = line.split()[5]
    kind, name, per_system = line.partition(" - ")[2].split()
    assert (kind, name) == ("fuse.volfs", "volfs")
    assert {"nosuid", "nodev"} <= set(per_mount.split(","))
    assert "default_permissions" in per_system.split(",")
    assert ("allow_other" in per_system.split(",")) is ("allow_other" in options)


@pytest.mark.parametrize("mode", ["0666", "0602", "0777"])
def test_a_mount_that_everybody_could_write_to_is_refused(tmp_path: Path, mode: str) -> None:
    (tmp_path / "mnt").mkdir()
    command = [
        "mount",
        tmp_path / "mnt",
        "--socket",
        tmp_path / "s" / "control",
        "-o",
        f"allow_other,mode={mode}",
    ]
    done = run_volfs(*command)
    assert done.returncode == 2
    assert "expected a mode that not everybody may write with" in done.stderr


# Read-only


def _mapping(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(number, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            mapped[:4] = b"EVIL"
    finally:
        os.close(number)


def _by_reader(call: Callable[[int], object]) -> Callable[[Path], object]:
    """Something done to a descriptor that only reads."""

    def do(path: Path) -> None:
        number = os.open(path, os.O_RDONLY)
        try:
            call(number)
        finally:
            os.close(number)

    return do


def _opened(flags: int) -> Callable[[Path], object]:
    def do(path: Path) -> None:
        number = os.open(path, flags, 0o600)
        try:
            os.pwrite(number, b"EVIL", 0)
        finally:
            os.close(number)

    return do


def _reopened(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        _opened(os.O_RDWR)(Path(f"/proc/self/fd/{number}"))
    finally:
        os.close(number)


def _tool(*command: str) -> Callable[[Path], object]:
    def do(path: Path) -> None:
        done = subprocess.run(
            [word.replace("PATH", str(path)) for word in command],
            capture_output=True,
            check=False,
            input=b"EVIL" * 1024,
        )
        if done.returncode:
            raise OSError(errno.EPERM, done.stderr.decode())

    return do


def _copied(number: int) -> None:
    with open("/proc/self/exe", "rb") as source:
        os.copy_file_range(source.fileno(), number, 4096, 0, 0)


def _sent(number: int) -> None:
    with open("/proc/self/exe", "rb") as source:
        os.sendfile(number, source.fileno(), 0, 4096)


def _spliced(number: int) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"EVIL")
        os.splice(reader, number, 4, offset_dst=0)
    finally:
        os.close(reader)
        os.close(writer)


WAYS: dict[str, Callable[[Path], object]] = {
    "open to write": _opened(os.O_WRONLY),
    "open to read and write": _opened(os.O_RDWR),
    "open to append": _opened(os.O_WRONLY | os.O_APPEND),
    "open directly": _opened(os.O_WRONLY | os.O_DIRECT),
    "open to create": _opened(os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    "open and truncate": _opened(os.O_WRONLY | os.O_TRUNC),
    "open to read, and truncate": lambda path: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC)),
    "open a descriptor again": _reopened,
    "truncate": lambda path: os.truncate(path, 0),
    "truncate to more": lambda path: os.truncate(path, 2 * SIZE),
    "truncate a reader": _by_reader(lambda number: os.ftruncate(number, 0)),
    "write by a reader": _by_reader(lambda number: os.pwrite(number, b"EVIL", 0)),
    "punch by a reader": _by_reader(lambda number: fallocate(number, PUNCH_HOLE | KEEP_SIZE, 0, 4096)),
    "zero by a reader": _by_reader(lambda number: fallocate(number, ZERO_RANGE, 0, 4096)),
    "allocate by a reader": _by_reader(lambda number: os.posix_fallocate(number, 0, 2 * SIZE)),
    "copy a range to a reader": _by_reader(_copied),
    "send a file to a reader": _by_reader(_sent),
    "splice to a reader": _by_reader(_spliced),
    "clone to a reader": _by_reader(lambda number: fcntl.ioctl(number, FICLONE, number)),
    "change flags": _by_reader(lambda number: fcntl.ioctl(number, FS_IOC_SETFLAGS, struct.pack("l", 0))),
    "map": _mapping,
    "set an attribute": lambda path: os.setxattr(path, "user.volfs.read_only", b"no"),
    "set an attribute of one's own": lambda path: os.setxattr(path, "user.x", b"x"),
    "set capabilities": lambda path: os.setxattr(path, "security.capability", bytes(20)),
    "remove an attribute": lambda path: os.removexattr(path, "user.volfs.read_only"),
    "chmod": lambda path: path.chmod(0o666),
    "chown": lambda path: os.chown(path, 65534, 65534),
    "touch": lambda path: os.utime(path, (0, 0)),
    "remove": os.unlink,
    "rename": lambda path: path.rename(path.with_name("another")),
    "link": lambda path: path.with_name("another").hardlink_to(path),
    "make": lambda path: path.with_name("another").touch(),
    "make a directory": lambda path: path.with_name("another").mkdir(),
    "make a node": lambda path: os.mknod(path.with_name("another")),
    "dd": _tool("dd", "of=PATH", "conv=notrunc"),
    "the fallocate tool": _tool("fallocate", "-z", "-l", "4096", "PATH"),
}


def refusal(do: Callable[[Path], object], path: Path) -> int | None:
    """The errno of who tries it; None when it was done."""
    try:
        do(path)
    except OSError as exc:
        return exc.errno
    return None


def assert_read_only(path: Path, disk: Path, daemon: int) -> None:
    """Nothing changes the volume by this path; the daemon has it open, but cannot write itself."""
    content = disk.read_bytes()
    reader = os.open(path, os.O_RDONLY)
    try:
        for descriptor in Path(f"/proc/{daemon}/fd").iterdir():
            if os.path.realpath(descriptor) == str(disk):
                told = Path(f"/proc/{daemon}/fdinfo/{descriptor.name}").read_text()
                assert int(told.split("flags:")[1].split()[0], 8) & os.O_ACCMODE == os.O_RDONLY
                break
        else:
            raise AssertionError("the daemon has the volume not open")
        for way, do in WAYS.items():
            assert refusal(do, path) in REFUSED, way
            assert disk.read_bytes() == content, way
        assert path.stat().st_size == SIZE
        assert os.pread(reader, SIZE, 0) == content
    finally:
        os.close(reader)
    assert not path.stat().st_mode & 0o222


@pytest.fixture
def disk(volumes: Path) -> Path:
    path = volumes / "disk"
    path.write_bytes(random_bytes(SIZE))
    return path


def configuration(directory: Path, disk: Path, mount: str = "", backend: str = "") -> tuple[str, ...]:
    path = directory / "volfs.toml"
    path.write_text(
        f"[mount]\n{mount}\n[backends.files]\ndriver = 'file'\npath = '{disk.parent}'\nresize = true\n{backend}\n"
    )
    return "--config", str(path)


@pytest.mark.parametrize("where", ["mount", "option", "backend"])
def test_a_read_only_daemon_cannot_be_talked_into_writing(
    mount: MakeMount, disk: Path, tmp_path: Path, where: str
) -> None:
    """By no system call, though truncate is a resize here; by no attach, however it asks."""
    if os.geteuid() != 0:
        skip_or_fail("root", "whom the mode of the file does not keep from writing")
    read_only = {"mount": ("read_only = true", ""), "option": ("", ""), "backend": ("", "read_only = true")}[
        where
    ]
    options = configuration(tmp_path, disk, *read_only)
    on = mount(options=(*options, "-o", "ro") if where == "option" else options)
    pid = on.process.pid
    assert_read_only(on.path / "files" / "disk", disk, pid)
    for name, source in (
        ("url", f"file:{disk}"),
        ("other", f"file:{disk.parent}/../{disk.parent.name}/disk"),
    ):
        done = on.volfs("attach", source, "--name", name)
        assert done.returncode == 0, done.stderr
        assert_read_only(on.path / "attached" / name, disk, pid)
    attached, client = api.attach(f"file:{disk}", "blank", blank=True, socket_path=str(on.socket))
    assert_read_only(Path(attached.path), disk, pid)
    client.close()
    on.volfs("copy", "/proc/self/exe", on.path / "files" / "disk")
    assert disk.read_bytes() == random_bytes(SIZE)


def test_a_connection_info_that_is_read_only_stays_it_beside_one_that_is_not(
    mount: MakeMount, storage: Storage, tmp_path: Path
) -> None:
    """Also while the same volume is open for writing by its other name."""
    stored = storage.make("block", SIZE, random_bytes(SIZE))
    on = mount()
    paths = {}
    for mode in ("ro", "rw"):
        info = {"driver_volume_type": "local", "data": {"device_path": stored.url[6:], "access_mode": mode}}
        env = {"VOLFS_SOCKET": str(on.socket)}
        done = run_volfs("attach", "--connection-info", "-", "--name", mode, env=env, input=json.dumps(info))
        assert done.returncode == 0, done.stderr
        paths[mode] = Path(done.stdout.strip())
    with paths["rw"].open("r+b", 0) as writer:
        for way, do in WAYS.items():
            assert refusal(do, paths["ro"]) in REFUSED, way
        assert stored.read() == random_bytes(SIZE)
        writer.write(b"ours")
        os.fsync(writer.fileno())
    assert stored.read()[:4] == b"ours"


@pytest.mark.parametrize("driver", ["rbd", "iscsi"])
def test_a_read_only_mount_opens_no_volume_to_write(mount: MakeMount, storage: Storage, driver: str) -> None:
    """Of a storage that would let it: nothing is written, and RBD has no watcher, as of one that might write."""
    content = random_bytes(SIZE)
    stored = storage.make(driver, SIZE, content)
    on = mount(stored.prefix, options=("-o", "ro"), env=stored.environment)
    paths = [on.path.joinpath(driver, *stored.place)]
    done = on.volfs("attach", stored.url, "--name", "attached")
    assert done.returncode == 0, done.stderr
    for path in (*paths, Path(done.stdout.strip())):
        with path.open("rb") as reader:
            assert reader.read() == content
            assert driver != "rbd" or stored.users() == []
            for way, do in WAYS.items():
                assert refusal(do, path) in REFUSED, way
    wait_until(lambda: not api.status(socket_path=str(on.socket)).open, "it is closed")
    assert stored.read() == content


def test_a_daemon_that_may_not_write_has_the_error_of_the_storage(mount: MakeMount, tmp_path: Path) -> None:
    """A mode that lets somebody write is no right at the storage."""
    disk = tmp_path / "files" / "disk"
    disk.parent.mkdir()
    disk.write_bytes(random_bytes(SIZE))
    if os.geteuid() != 0:
        skip_or_fail("root", "to mount read-only")
    subprocess.run(["mount", "--bind", disk.parent, disk.parent], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", disk.parent], check=True)
        with mounted(tmp_path / "d", [f"file:{disk.parent}"]) as on:
            with pytest.raises(OSError) as caught:  # noqa: PT011
                os.open(on.path / "file" / "disk", os.O_RDWR)
            assert caught.value.errno == errno.EROFS
    finally:
        subprocess.run(["umount", disk.parent], check=True)
