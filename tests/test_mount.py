"""Volumes of each driver as files, through the kernel, with the tools that people use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import mmap
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from disks import ATTRIBUTE_SECONDS, OBJECT, SIZE, Disk, MakeDisk, opened, run, succeed
from faults import Rule, volfs_with_faults, write_rules
from mounts import Mount, mounted, run_volfs, wait_until
from services import MIB, ImageFactory, Services, skip_or_fail
from volumes import VARIANTS, Storage, ceph_environment, raises, random_bytes

from volfs import api
from volfs.errors import VolfsError

# ---- bytes -----------------------------------------------------------------------------------------------------

DD_READS = (
    ("bs=1M",),
    ("bs=1M", "iflag=direct"),
    ("bs=4096", "iflag=direct", "count=700", "skip=1000"),
    ("bs=1000", "iflag=skip_bytes,count_bytes", "skip=12345", "count=1234567"),
    ("bs=99999", "iflag=direct,skip_bytes,count_bytes", f"skip={OBJECT - 777}", "count=2345678"),
)


@pytest.mark.parametrize("arguments", DD_READS, ids=" ".join)
def test_dd_reads_what_the_backend_has(disk: Disk, arguments: Sequence[str]) -> None:
    content = disk.fill()
    numbers = dict(argument.split("=") for argument in arguments)
    unit = 4096 if "skip_bytes" not in numbers.get("iflag", "") else 1
    begin = int(numbers.get("skip", 0)) * unit
    end = begin + int(numbers["count"]) * unit if "count" in numbers else SIZE
    assert succeed("dd", f"if={disk.path}", "status=none", *arguments) == content[begin:end]


@pytest.mark.parametrize(
    "arguments",
    [
        ("bs=1M",),
        ("bs=1M", "oflag=direct"),
        ("bs=1M", "conv=notrunc"),
        ("bs=4M", "conv=notrunc,fsync"),
        ("bs=77777", "oflag=direct"),
        ("bs=64k", "conv=sparse,notrunc"),
    ],
    ids=" ".join,
)
def test_dd_writes_to_the_backend(disk: Disk, arguments: Sequence[str]) -> None:
    """conv=notrunc or not: the size is the backend's. Stable when dd ends, since close(2) flushes."""
    disk.stored.write(bytes(SIZE))
    content = random_bytes(SIZE - MIB, seed=len(arguments[0])) + bytes(MIB)
    succeed("dd", f"of={disk.path}", "status=none", *arguments, input=content)
    assert disk.stored.read() == content


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_any_offset_and_size(disk: Disk, direct: int) -> None:
    model = bytearray(disk.fill(1))
    ranges = [(0, 1), (1, 511), (511, 2), (4095, 4099), (OBJECT - 1, 2), (SIZE - 1, 1), (SIZE - 9999, 9999)]
    with opened(disk.path, os.O_RDWR | direct) as file:
        for offset, length in [*ranges, (12345, 3 * MIB + 1)]:
            model[offset : offset + length] = data = random_bytes(length, seed=offset)
            assert os.pwrite(file, data, offset) == length
            assert os.pread(file, length + 2, max(0, offset - 1)) == model[max(0, offset - 1) :][: length + 2]
    assert disk.stored.read() == model


def test_cmp_finds_no_difference(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "exported").write_bytes(disk.fill(2))
    succeed("cmp", disk.path, tmp_path / "exported")
    assert filecmp.cmp(disk.path, tmp_path / "exported", shallow=False)


def test_tar_takes_what_was_just_written_to_a_sparse_volume(
    mount: Callable[..., Mount], volumes: Path
) -> None:
    """What was told of its allocation before the write must not be believed after it, by any name."""
    content = random_bytes(MIB)
    for name in ("listed", "attached"):
        (volumes / name).write_bytes(b"")
        os.truncate(volumes / name, 8 * MIB)
    mounted = mount(f"file:{volumes}")
    attached = mounted.volfs("attach", f"file:{volumes}/attached").stdout.strip()
    for path in (mounted.path / "file" / "listed", Path(attached)):
        assert path.stat().st_blocks == 0
        with path.open("r+b") as file:
            file.write(content)
        assert path.stat().st_blocks * 512 >= MIB
        archive = succeed("tar", "-cSf", "-", "-C", path.parent, path.name)
        assert succeed("tar", "-xSOf", "-", input=archive) == content + bytes(7 * MIB)


def test_cp_and_tar_take_all_of_it(disk: Disk, tmp_path: Path) -> None:
    """They trust st_blocks about holes: too few, and data would be lost."""
    disk.stored.write(bytes(SIZE))
    disk.stored.write(random_bytes(100_000), 3 * MIB + 17)
    content = disk.stored.read()
    for sparse in ("auto", "always", "never"):
        succeed("cp", f"--sparse={sparse}", disk.path, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
    archive = succeed("tar", "-cSf", "-", "-C", disk.directory, disk.path.name)
    assert succeed("tar", "-xSOf", "-", input=archive) == content
    shutil.copyfile(disk.path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_cp_onto_a_volume_writes_it_and_keeps_its_size(disk: Disk, tmp_path: Path) -> None:
    old = disk.fill(3)
    new = random_bytes(2 * MIB + 1, seed=4)
    (tmp_path / "new").write_bytes(new)
    succeed("cp", tmp_path / "new", disk.path)
    assert disk.stored.read() == new + old[len(new) :]


def test_many_processes_write_disjoint_ranges_at_once(disk: Disk) -> None:
    content = random_bytes(SIZE, seed=5)
    piece = SIZE // 8 + 13
    writers = []
    for number, offset in enumerate(range(0, SIZE, piece)):
        flags = "oflag=seek_bytes" + (",direct" if number % 3 == 0 else "")
        command = ["dd", f"of={disk.path}", "bs=50007", f"seek={offset}", "conv=notrunc", flags]
        writers.append((offset, subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)))
    for offset, writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(content[offset : offset + piece])
        writer.stdin.close()
    assert [writer.wait(60) for _, writer in writers] == [0] * len(writers)
    assert disk.stored.read() == content


def test_what_one_handle_writes_another_one_reads(disk: Disk) -> None:
    """Direct and buffered, whichever was opened first, whatever the page cache holds."""
    content = bytearray(disk.fill(6))
    with (
        opened(disk.path, os.O_RDWR) as buffered,
        opened(disk.path, os.O_RDWR | os.O_DIRECT) as direct,
        opened(disk.path, os.O_RDONLY) as reader,
    ):
        for offset, writer in ((0, buffered), (5000, direct), (100, direct), (4090, buffered)):
            assert os.pread(reader, 10_000, 0) == content[:10_000]
            content[offset : offset + 20] = data = random_bytes(20, seed=offset)
            os.pwrite(writer, data, offset)
            for other in (reader, buffered, direct):
                assert os.pread(other, 10_000, 0) == content[:10_000], f"after the write at {offset}"


def test_a_shared_mapping_writes_to_the_backend(disk: Disk) -> None:
    content = bytearray(disk.fill(7))
    with opened(disk.path, os.O_RDWR) as file, mmap.mmap(file, SIZE) as mapping:
        assert mapping[:] == content
        mapping[OBJECT - 5 : OBJECT + 5] = content[OBJECT - 5 : OBJECT + 5] = b"0123456789"
        mapping.flush()
        assert os.pread(file, 10, OBJECT - 5) == b"0123456789"
        os.fsync(file)
        assert disk.stored.read() == content
        mapping[SIZE - 1] = content[SIZE - 1] = 7  # and this with munmap and close alone
    disk.assert_released()
    assert disk.stored.read() == content


def test_a_private_mapping_does_not(disk: Disk) -> None:
    content = disk.fill(8)
    with opened(disk.path, os.O_RDWR) as file, mmap.mmap(file, SIZE, flags=mmap.MAP_PRIVATE) as mapping:
        mapping[0:4] = b"mine"
        assert mapping[:] == b"mine" + content[4:]
    assert disk.stored.read() == content


def test_fsync_and_close_make_stable(disk: Disk) -> None:
    content = bytearray(disk.fill(9))
    with opened(disk.path, os.O_RDWR) as file:
        for number, stabilize in enumerate((os.fsync, os.fdatasync)):
            os.pwrite(file, b"stable", number * OBJECT)
            content[number * OBJECT :][:6] = b"stable"
            content[number * OBJECT : number * OBJECT + 6] = b"stable"
            stabilize(file)
            assert disk.stored.read() == content
        os.pwrite(file, b"closed", 77)
    content[77:83] = b"closed"
    assert disk.stored.read() == content


# ---- sizes -----------------------------------------------------------------------------------------------------


def test_opening_with_truncation_keeps_size_and_content(disk: Disk) -> None:
    content = disk.fill(10)
    with disk.path.open("wb") as file:
        assert os.fstat(file.fileno()).st_size == SIZE
        assert file.seek(0, os.SEEK_END) == SIZE
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.read() == content
    with disk.path.open("w+b") as file:
        assert file.read() == content
        file.seek(0)
        file.write(b"new")
    assert disk.path.read_bytes() == b"new" + content[3:]
    subprocess.run(["sh", "-c", ': > "$1"', "sh", disk.path], check=True)
    assert disk.path.stat().st_size == SIZE


def test_truncation_to_the_same_size_succeeds_and_to_another_is_eperm(disk: Disk) -> None:
    content = disk.fill(11)
    succeed("truncate", "-s", str(SIZE), disk.path)
    with disk.path.open("r+b") as file:
        file.truncate(SIZE)
        for size in (0, SIZE - 1, SIZE + 1):
            with raises(errno.EPERM):
                os.ftruncate(file.fileno(), size)
            with raises(errno.EPERM):
                os.truncate(disk.path, size)
            assert os.fstat(file.fileno()).st_size == SIZE
    assert disk.stored.read() == content


def test_a_write_past_the_end_is_enospc(disk: Disk) -> None:
    content = disk.fill(12)
    for flags in (os.O_WRONLY, os.O_WRONLY | os.O_DIRECT):
        with opened(disk.path, flags) as file:
            for offset in (SIZE, SIZE + 1, SIZE + 4096, 1 << 50):
                with raises(errno.ENOSPC):
                    os.pwrite(file, b"x" * 5000, offset)
            assert os.fstat(file).st_size == SIZE
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.read() == content


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_write_across_the_end_is_short_and_then_enospc(disk: Disk, direct: int) -> None:
    content = bytearray(disk.fill(13))
    with opened(disk.path, os.O_RDWR | direct) as file:
        assert os.pwrite(file, b"y" * 10_000, SIZE - 4097) == 4097
        content[-4097:] = b"y" * 4097
        with raises(errno.ENOSPC):
            os.pwrite(file, b"y" * (10_000 - 4097), SIZE)
        assert os.fstat(file).st_size == SIZE
        assert os.pread(file, 10_000, SIZE - 4097) == content[-4097:]
    assert disk.stored.read() == content


def test_dd_of_more_than_fits_writes_all_that_fits_and_fails(disk: Disk) -> None:
    content = random_bytes(SIZE + 1, seed=14)
    done = run("dd", f"of={disk.path}", "bs=1M", input=content)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert disk.stored.read() == content[:SIZE]


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_read_at_and_past_the_end_is_empty(disk: Disk, direct: int) -> None:
    content = disk.fill(15)
    with opened(disk.path, os.O_RDONLY | direct) as file:
        assert os.pread(file, 100, SIZE - 3) == content[-3:]
        for offset in (SIZE, SIZE + 1, 1 << 50):
            assert os.pread(file, 100, offset) == b""


def test_a_volume_resized_elsewhere_shows_its_size_at_the_next_open(own_disk: Disk) -> None:
    own_disk.fill(16)
    assert own_disk.path.stat().st_size == SIZE
    for size in (SIZE + OBJECT, SIZE - MIB):
        own_disk.stored.resize(size)
        with own_disk.path.open("r+b", buffering=0) as file:
            assert os.fstat(file.fileno()).st_size == size
            assert len(os.pread(file.fileno(), 2 * SIZE, 0)) == size
            os.pwrite(file.fileno(), b"end", size - 3)
        assert own_disk.stored.read()[-3:] == b"end"
        assert own_disk.path.stat().st_size == size


@pytest.mark.slow
def test_a_volume_resized_elsewhere_shows_its_size_without_an_open(own_disk: Disk) -> None:
    assert own_disk.path.stat().st_size == SIZE
    own_disk.stored.resize(SIZE + MIB)
    wait_until(lambda: own_disk.path.stat().st_size == SIZE + MIB, "stat shows it", ATTRIBUTE_SECONDS)


def test_a_volume_shrunk_while_open_is_an_error_and_no_end_of_file(own_disk: Disk) -> None:
    own_disk.fill(17)
    with opened(own_disk.path, os.O_RDWR | os.O_DIRECT) as file:
        os.pwrite(file, b"x", 0)  # librbd hears of changes at once when it owns the image's lock
        own_disk.stored.resize(OBJECT)
        with raises(errno.ENXIO if own_disk.stored.driver == "iscsi" else errno.EIO):
            os.pread(file, 4096, SIZE - 4096)
        assert len(os.pread(file, 4096, 0)) == 4096
    own_disk.assert_released()


# ---- what stat tells -------------------------------------------------------------------------------------------


def test_stat_tells_what_is_known(disk: Disk) -> None:
    disk.fill(18)
    wait_until(lambda: disk.path.stat().st_blocks * 512 >= SIZE, "stat has asked again", ATTRIBUTE_SECONDS)
    found = disk.path.stat()
    assert stat.filemode(found.st_mode) == "-rw-------"
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())
    assert found.st_size == SIZE
    assert found.st_nlink == 1
    assert stat.filemode(disk.directory.stat().st_mode) == "dr-x------"


def test_times_stand_still_while_nobody_writes(disk: Disk) -> None:
    disk.fill(19)
    before = disk.path.stat()
    disk.path.read_bytes()
    wait_until(lambda: disk.path.stat().st_mtime_ns == before.st_mtime_ns or disk.path.stat(), "stat", 0.1)
    listed = {
        line.split()[-1]
        for line in succeed("ls", "-l", "--full-time", disk.directory).decode().split("\n")[1:]
        if line
    }
    assert disk.path.name in listed
    assert disk.path.stat().st_mtime_ns == disk.path.stat().st_mtime_ns


def test_extended_attributes_tell_of_the_volume(disk: Disk) -> None:
    names = os.listxattr(disk.path)
    told = {name: os.getxattr(disk.path, name).decode() for name in names}
    assert told["user.volfs.source"] == disk.stored.url
    assert told["user.volfs.driver"] == disk.stored.driver
    assert told["user.volfs.backend"] == disk.stored.driver
    assert told["user.volfs.size"] == str(SIZE)
    assert told["user.volfs.read_only"] == "no"
    assert told["user.volfs.sessions"] == "0"
    with disk.path.open("rb"):
        assert os.getxattr(disk.path, "user.volfs.sessions") == b"1"
    shown = succeed("getfattr", "-d", disk.path).decode() if shutil.which("getfattr") else ""
    assert not shown or f'user.volfs.source="{disk.stored.url}"' in shown
    for name in ("user.volfs.nothing", "user.nothing", "security.nothing", "user.volfs."):
        with raises(errno.ENODATA):
            os.getxattr(disk.path, name)


def test_df_tells_of_the_mount(disk: Disk) -> None:
    with disk.path.open("rb"):
        found = os.statvfs(disk.path)
        assert found.f_blocks * found.f_frsize >= SIZE
        assert found.f_bfree == found.f_bavail == 0
    source, *_ = succeed("df", "--output=source", disk.path).decode().splitlines()[1:]
    assert source == "volfs"  # and no path, which Cinder would take for a device
    assert succeed("stat", "-f", "-c", "%T", disk.path).decode().startswith("fuse")


def test_listing_opens_nothing_and_leaves_nothing(disk: Disk) -> None:
    disk.stored.write(b"x")
    for command in (
        ["ls", "-lR", disk.directory],
        ["find", disk.directory, "-ls"],
        ["stat", disk.path],
        ["du", "-a", disk.directory],
    ):
        assert disk.path.name in succeed(*command).decode()
        assert disk.status().open == []
        assert disk.stored.users() == []
    for name in os.listxattr(disk.path):
        os.getxattr(disk.path, name)
    assert disk.stored.users() == []


def test_the_listing_is_live(make_disk: MakeDisk) -> None:
    disk = make_disk()
    before = set(os.listdir(disk.directory.parent)) | set(os.listdir(disk.directory))
    assert disk.path.name in before
    other = make_disk(MIB)
    assert other.path.stat().st_size == MIB
    assert other.path.name in os.listdir(other.directory)
    other.stored.remove()
    for gone in (other.path, other.directory):
        if gone != disk.directory:
            wait_until(lambda gone=gone: not gone.exists(), f"{gone} is gone", ATTRIBUTE_SECONDS)
            with contextlib.suppress(FileNotFoundError):  # a target goes with its LUN
                assert gone.name not in os.listdir(gone.parent)
    with raises(errno.ENOENT):
        other.path.open("rb")
    disk.stored.remove()


def test_what_is_not_there_is_enoent(disk: Disk) -> None:
    for path in (disk.directory / "not-there", disk.mount.path / "not-there", disk.directory / "9" / "x"):
        with raises(errno.ENOENT):
            path.stat()
        assert not path.exists()
    with raises(errno.ENOTDIR):
        (disk.path / "below").stat()


# ---- what is not allowed ---------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Path], object]] = {
    "rm": os.unlink,
    "mv": lambda path: os.rename(path, path.with_name("new")),
    "mkdir": lambda path: os.mkdir(path.with_name("new")),
    "rmdir": lambda path: os.rmdir(path.parent),
    "link": lambda path: os.link(path, path.with_name("new")),
    "symlink": lambda path: os.symlink("x", path.with_name("new")),
    "mknod": lambda path: os.mkfifo(path.with_name("new")),
    "create": lambda path: path.with_name("new").open("xb"),
    "touch": lambda path: os.utime(path),
    "utime": lambda path: os.utime(path, (1, 1)),
    "chmod": lambda path: path.chmod(0o644),
    "chown": lambda path: os.chown(path, os.getuid() + 1, -1),
    "chgrp": lambda path: os.chown(path, -1, os.getgid() + 1),
    "setfattr": lambda path: os.setxattr(path, "user.x", b"x"),
    "setfattr of ours": lambda path: os.setxattr(path, "user.volfs.size", b"1"),
    "removexattr": lambda path: os.removexattr(path, "user.volfs.size"),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_what_would_change_the_set_of_volumes_is_eperm(shared_disk: Disk, operation: str) -> None:
    with raises(errno.EPERM):
        REFUSED[operation](shared_disk.path)
    assert shared_disk.path.stat().st_size == SIZE


def test_what_changes_nothing_succeeds(disk: Disk) -> None:
    found = disk.path.stat()
    os.chown(disk.path, found.st_uid, found.st_gid)
    os.chown(disk.path, -1, -1)
    disk.path.chmod(stat.S_IMODE(found.st_mode))
    with disk.path.open("rb") as file:
        os.fchown(file.fileno(), found.st_uid, found.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))


def test_locks_work_between_processes(disk: Disk) -> None:
    with disk.path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run("flock", "-n", disk.path, "true").returncode == 1
    succeed("flock", "-n", disk.path, "true")


# ---- attached --------------------------------------------------------------------------------------------------


def attach(disk: Disk, name: str | None = None) -> Path:
    attached, client = api.attach(disk.stored.url, name, socket_path=str(disk.mount.socket))
    client.close()
    return Path(attached.path)


def detach(disk: Disk, name: str, wait: float = 5.0) -> None:
    api.detach(name, wait=wait, socket_path=str(disk.mount.socket))


def test_an_attached_volume_is_the_same_file_as_in_the_listing(disk: Disk) -> None:
    content = disk.fill(20)
    path = attach(disk, "other-name")
    assert path == disk.mount.path / "attached" / "other-name"
    assert path.stat().st_ino == disk.path.stat().st_ino
    assert os.path.samefile(path, disk.path)
    with opened(disk.path, os.O_RDONLY) as reader, opened(path, os.O_WRONLY) as writer:
        assert os.pread(reader, 10, 0) == content[:10]
        os.pwrite(writer, b"other", 0)
        assert os.pread(reader, 10, 0) == b"other" + content[5:10]
        (volume,) = disk.status().open
        assert volume.handles == 2
    detach(disk, "other-name")
    assert disk.path.exists()


def test_a_detached_name_is_gone_at_once(disk: Disk) -> None:
    path = attach(disk)
    assert path.name in succeed("ls", "-l", path.parent).decode()
    assert path.read_bytes()[:1]
    detach(disk, path.name)
    assert not path.exists()
    assert os.listdir(path.parent) == []
    with raises(errno.ENOENT):
        path.open("rb")


def test_detaching_an_open_volume_is_ebusy(disk: Disk) -> None:
    path = attach(disk)
    with path.open("rb"):
        with pytest.raises(VolfsError, match=f"still open by process {os.getpid()}$") as caught:
            detach(disk, path.name, wait=0.1)
        assert caught.value.errno == errno.EBUSY
        assert path.exists()
    detach(disk, str(path))


# ---- one mount of all ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_mount_shows_all_backends(mount: Callable[..., Mount], storage: Storage, tmp_path: Path) -> None:
    made = [
        storage.make(driver, 2 * MIB, random_bytes(2 * MIB, seed), **options)
        for seed, (_, driver, options) in enumerate(VARIANTS)
    ]
    prefixes = [storage.prefix(driver) for driver in ("rbd", "iscsi", "block", "file")]
    on = mount(*prefixes, env=storage.environment("rbd"))
    assert sorted(os.listdir(on.path)) == ["attached", "block", "file", "iscsi", "rbd"]
    disks = [Disk(on, stored) for stored in made]
    readers = [subprocess.Popen(["cat", disk.path], stdout=subprocess.PIPE) for disk in disks]
    for disk, reader in zip(disks, readers, strict=True):
        assert reader.communicate(timeout=60)[0] == disk.stored.read()
    for disk in disks:
        disk.assert_released()


# ---- RBD: namespaces, snapshots, removal -----------------------------------------------------------------------


def rbd_path(mount: Mount, *place: str) -> Path:
    return mount.path.joinpath("rbd", *place)


@pytest.mark.slow
def test_rbd_namespaces_are_directories(
    mount: Callable[..., Mount],
    services: Services,
    new_namespace: Callable[..., str],
    new_image: ImageFactory,
) -> None:
    namespace = new_namespace()
    outer, inner = new_image(MIB), new_image(2 * MIB, namespace=namespace)
    inner.write(b"inner")
    on = mount("rbd:volumes", env=ceph_environment(services))
    assert {outer.name, namespace} <= set(os.listdir(rbd_path(on, "volumes")))
    assert os.listdir(rbd_path(on, "volumes", namespace)) == [inner.name]
    path = rbd_path(on, "volumes", namespace, inner.name)
    assert path.stat().st_size == 2 * MIB
    assert path.read_bytes()[:6] == b"inner\0"
    path.write_bytes(b"outer")
    assert inner.read()[:6] == b"outer\0"
    assert os.getxattr(path, "user.volfs.source").decode() == inner.url
    with raises(errno.ENOENT):
        os.listdir(rbd_path(on, "volumes", "no-namespace"))


def test_a_prefix_of_a_namespace_shows_its_pool(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory
) -> None:
    made = new_image(MIB, pool="rbd")
    on = mount("rbd:", "rbd:rbd", env=ceph_environment(services))
    assert set(services.pools) <= set(os.listdir(on.path / "rbd"))
    assert os.listdir(on.path / "rbd-2") == ["rbd"]
    assert (on.path / "rbd-2" / "rbd" / made.name).stat().st_size == MIB
    with raises(errno.ENOENT):
        (on.path / "rbd-2" / "volumes").stat()


def test_rbd_snapshots_are_read_only_files(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory
) -> None:
    made = new_image(MIB)
    made.write(b"before")
    made.snapshot("one")
    made.write(b"after!")
    services.run("rbd", "resize", "--no-progress", "--size", f"{2 * MIB}B", made.spec)
    on = mount("rbd:volumes", env=ceph_environment(services))
    image, snapshot = rbd_path(on, "volumes", made.name), rbd_path(on, "volumes", made.name + "@one")
    assert {image.name, snapshot.name} <= set(os.listdir(image.parent))
    assert snapshot.stat().st_size == MIB
    assert image.stat().st_size == 2 * MIB
    assert stat.filemode(snapshot.stat().st_mode) == "-r--------"
    assert snapshot.read_bytes()[:6] == b"before"
    assert image.read_bytes()[:6] == b"after!"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with raises(errno.EROFS):
            os.open(snapshot, flags)
    assert os.getxattr(snapshot, "user.volfs.read_only") == b"yes"
    assert os.getxattr(snapshot, "user.volfs.source").decode() == f"{made.url}@one"
    with raises(errno.ENOENT):
        image.with_name(made.name + "@two").stat()


@pytest.mark.slow
def test_an_image_open_for_writing_cannot_be_removed_and_one_that_is_closed_can(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory
) -> None:
    made = new_image(MIB)
    on = mount("rbd:volumes", env=ceph_environment(services))
    path = rbd_path(on, "volumes", made.name)
    with path.open("r+b"):
        assert len(made.watchers()) == 1
        with pytest.raises(subprocess.CalledProcessError):
            services.run("rbd", "rm", "--no-progress", made.spec)
    wait_until(lambda: not made.watchers(), "the daemon has closed the image")
    services.run("rbd", "rm", "--no-progress", made.spec)
    with raises(errno.ENOENT):
        path.open("rb")


@pytest.mark.slow
def test_an_image_removed_while_it_is_read_is_enoent_for_the_next_open(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory
) -> None:
    """A reader leaves no watcher, so nothing keeps others from removing the image under it."""
    made, other = new_image(MIB), new_image(MIB)
    other.write(b"other")
    on = mount("rbd:volumes", env=ceph_environment(services))
    path = rbd_path(on, "volumes", made.name)
    file = os.open(path, os.O_RDONLY)
    os.read(file, 10)
    services.run("rbd", "rm", "--no-progress", made.spec)
    with raises(errno.ENOENT):
        path.open("rb")
    assert rbd_path(on, "volumes", other.name).read_bytes()[:5] == b"other"
    with raises(errno.ESTALE):  # RBD answers reads of what is gone with zeros; this tells that they were
        os.close(file)
    wait_until(lambda: not path.exists(), "stat tells so, too", ATTRIBUTE_SECONDS)


# ---- settings --------------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, text: str) -> tuple[str, str]:
    """Options that name a volfs.toml of this text."""
    path = tmp_path / "volfs.toml"
    path.write_text(text)
    return "--config", str(path)


def rbd_table(services: Services, **settings: object) -> str:
    found = {
        "conf": str(services.ceph_conf),
        "id": services.user,
        "keyring": str(services.keyring),
    } | settings
    return "\n".join(
        [
            "[backends.ceph]",
            'driver = "rbd"',
            *(f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for k, v in found.items()),
        ]
    )


@pytest.mark.slow
def test_the_backend_resizes_when_its_settings_allow_it(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory, volumes: Path, tmp_path: Path
) -> None:
    (volumes / "disk").write_bytes(random_bytes(MIB))
    made = new_image(MIB)
    config = f"{rbd_table(services, resize=True)}\n[backends.files]\ndriver = 'file'\npath = '{volumes}'\nresize = true"
    on = mount(options=write_config(tmp_path, config))
    for path, size in (
        (on.path / "files" / "disk", lambda: (volumes / "disk").stat().st_size),
        (on.path / "ceph" / "volumes" / made.name, lambda: len(made.read())),
    ):
        with path.open("r+b") as file:
            file.truncate(2 * MIB)
            assert os.fstat(file.fileno()).st_size == size() == 2 * MIB
            os.pwrite(file.fileno(), b"end", 2 * MIB - 3)
        assert path.read_bytes()[-4:] == b"\0end"
        os.truncate(path, MIB // 2)  # by name, with no handle
        assert path.stat().st_size == size() == MIB // 2
        succeed("truncate", "-s", "+1M", path)
        assert path.stat().st_size == size() == MIB // 2 + MIB
        with path.open("wb"):  # and still this never is a resize
            assert path.stat().st_size == MIB // 2 + MIB


def test_a_backend_may_be_read_only(mount: Callable[..., Mount], volumes: Path, tmp_path: Path) -> None:
    (volumes / "disk").write_bytes(b"content")
    config = f"[backends.files]\ndriver = 'file'\npath = '{volumes}'\nread_only = true"
    path = mount(options=write_config(tmp_path, config)).path / "files" / "disk"
    assert stat.filemode(path.stat().st_mode) == "-r--------"
    assert path.read_bytes() == b"content"
    with raises(errno.EROFS):
        path.open("r+b")


def test_the_whole_mount_may_be_read_only(mount: Callable[..., Mount], volumes: Path) -> None:
    (volumes / "disk").write_bytes(b"content")
    path = mount(f"file:{volumes}", options=("-o", "ro")).path / "file" / "disk"
    assert stat.filemode(path.stat().st_mode) == "-r--------"
    assert path.read_bytes() == b"content"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with raises(errno.EROFS):
            os.open(path, flags)
    with raises(errno.EPERM):
        os.truncate(path, 3)
    assert (volumes / "disk").read_bytes() == b"content"


def test_owner_and_mode_are_as_configured(mount: Callable[..., Mount], volumes: Path) -> None:
    (volumes / "disk").write_bytes(b"content")
    on = mount(f"file:{volumes}", options=("-o", "uid=65534,gid=65533,mode=0640"))
    found = (on.path / "file" / "disk").stat()
    assert (found.st_uid, found.st_gid) == (65534, 65533)
    assert stat.filemode(found.st_mode) == "-rw-r-----"
    assert stat.filemode((on.path / "file").stat().st_mode) == "dr-xr-x---"


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint that other users can reach, which nothing below pytest's directory is."""
    if os.geteuid() != 0:
        skip_or_fail("root", "to become another user")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        (Path(directory) / "mnt").mkdir()
        yield Path(directory) / "mnt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reads", "writes"),
    [
        ("mode=0666", False, False),  # FUSE keeps others out without allow_other, root's daemon or not
        ("allow_other", False, False),
        ("allow_other,mode=0644", True, False),
        ("allow_other,uid=nobody", True, True),
        ("allow_other,uid=nobody,ro", True, False),
        ("allow_other,gid=nogroup,mode=0640", True, False),
    ],
)
def test_another_user_may_do_what_the_options_say(
    public: Path, mount: Callable[..., Mount], volumes: Path, options: str, reads: bool, writes: bool
) -> None:
    (volumes / "disk").write_bytes(b"content")
    on = mount(f"file:{volumes}", options=("-o", options), mountpoint=public)
    path = on.path / "file" / "disk"
    other: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    assert (run("cat", path, **other).stdout == b"content") is reads
    assert (run("dd", f"of={path}", "conv=notrunc", input=b"CON", **other).returncode == 0) is writes
    assert (volumes / "disk").read_bytes() == (b"CONtent" if writes else b"content")


@pytest.mark.slow
def test_attaching_finds_the_configured_backend_and_its_files(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory, storage: Storage, tmp_path: Path
) -> None:
    """The client need not know how the storage is reached; what it gets is the listing's file, not a second one."""
    made, stored = new_image(MIB), storage.make("iscsi", MIB, chap="one-way")
    account = stored.environment
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text(account["LIBISCSI_CHAP_PASSWORD"])
    config = f"""{rbd_table(services)}
[backends.san]
driver = "iscsi"
portals = ["{services.portal}"]
targets = ["{stored.place[0]}"]
chap_username = "{account["LIBISCSI_CHAP_USERNAME"]}"
chap_password_file = "{secret}"
"""
    on = mount(options=write_config(tmp_path, config))
    for url, listed in (
        (made.url, on.path / "ceph" / "volumes" / made.name),
        (stored.url, on.path.joinpath("san", *stored.place)),
    ):
        done = on.volfs("attach", url)
        assert done.returncode == 0, done.stderr
        assert os.path.samefile(done.stdout.strip(), listed)
        assert listed.stat().st_size == MIB


@pytest.mark.slow
def test_attaching_with_the_account_that_is_configured_gives_the_listed_file(
    mount: Callable[..., Mount], services: Services, storage: Storage, tmp_path: Path
) -> None:
    stored = storage.make("iscsi", MIB, chap="one-way")
    on = mount(f"iscsi://{services.portal}/{stored.place[0]}", env=stored.environment)
    done = on.volfs("attach", stored.url)
    assert done.returncode == 0, done.stderr
    assert os.path.samefile(done.stdout.strip(), on.path.joinpath("iscsi", *stored.place))


@pytest.mark.slow
def test_attaching_reaches_the_storage_as_the_client_does_and_not_as_the_daemon(
    mount: Callable[..., Mount], services: Services, new_image: ImageFactory
) -> None:
    made = new_image(MIB)
    made.write(b"content")
    foreign = {"CEPH_CONF": str(services.ceph_conf), "CEPH_ARGS": "--id stranger --keyring /nonexistent"}
    on = mount(env=foreign)
    client = ceph_environment(services) | {"VOLFS_SOCKET": str(on.socket)}
    done = run_volfs("attach", made.url, env=client)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes()[:7] == b"content"
    assert run_volfs("attach", made.url, "--name", "x", env=client | foreign).returncode == 1


# ---- faults ----------------------------------------------------------------------------------------------------


@dataclass
class FaultyDisk:
    """A volume that fails on demand, on a mount of its own."""

    mount: Mount
    path: Path
    stored: Path
    rules: Path
    content: bytes

    def fail(self, *rules: Rule) -> None:
        write_rules(self.rules, *rules)


@pytest.fixture(scope="module")
def faulty_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    directory = tmp_path_factory.mktemp("faulty")
    volumes, rules = directory / "volumes", directory / "rules"
    volumes.mkdir()
    write_rules(rules)
    content = random_bytes(2 * MIB)
    (volumes / "disk").write_bytes(content)
    (volumes / "other").write_bytes(content)
    config = f"[backends.faulty]\ndriver = 'faulty-file'\npath = '{volumes}'\nfaults = '{rules}'"
    config += f"\n[backends.good]\ndriver = 'file'\npath = '{volumes}'"
    options = write_config(directory, config)
    with mounted(directory / "m", [], options, volfs=volfs_with_faults()) as mount:
        yield FaultyDisk(mount, mount.path / "faulty" / "disk", volumes / "disk", rules, content)


@pytest.fixture
def faulty(faulty_mount: FaultyDisk) -> Iterator[FaultyDisk]:
    faulty_mount.stored.write_bytes(faulty_mount.content)
    yield faulty_mount
    faulty_mount.fail()
    assert faulty_mount.path.read_bytes() == faulty_mount.stored.read_bytes()  # it lives on


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_failed_read_is_its_errno_and_never_an_end_of_file(faulty: FaultyDisk, direct: int) -> None:
    where = MIB + 5000
    faulty.fail(Rule("pread", errno.EIO, offset=where))
    with opened(faulty.path, os.O_RDONLY | direct) as file:
        assert os.pread(file, 4096, 0) == faulty.content[:4096]
        with raises(errno.EIO):
            os.pread(file, 10, where - 5)
        assert os.pread(file, 4096, where + 8192) == faulty.content[where + 8192 :][:4096]
        faulty.fail()
        assert os.pread(file, 10, where - 5) == faulty.content[where - 5 : where + 5]
    faulty.fail(Rule("pread", errno.EIO, offset=where))
    done = run("dd", f"if={faulty.path}", "bs=64k", *(["iflag=direct"] if direct else []))
    assert done.returncode == 1
    assert b"Input/output error" in done.stderr
    assert faulty.content.startswith(done.stdout)
    assert len(done.stdout) <= where


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.EROFS])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_failed_write_is_its_errno(faulty: FaultyDisk, direct: int, number: int) -> None:
    with opened(faulty.path, os.O_RDWR | direct) as file:
        faulty.fail(Rule("pwrite", number, offset=8200))
        with raises(number):
            os.pwrite(file, b"x" * 100, 8192)
        assert os.pwrite(file, b"x" * 100, 0) == 100
        faulty.fail()
        os.fsync(file)
    assert faulty.stored.read_bytes() == b"x" * 100 + faulty.content[100:]


def test_a_failed_flush_is_told_by_fsync_and_by_close(faulty: FaultyDisk) -> None:
    file, other = os.open(faulty.path, os.O_RDWR), os.open(faulty.path, os.O_RDWR)
    os.pwrite(file, b"x", 0)
    os.pwrite(other, b"y", 10)
    faulty.fail(Rule("flush", errno.ENOSPC))
    for _ in range(2):
        with raises(errno.ENOSPC):
            os.fsync(file)
    faulty.fail()
    os.fsync(file)
    with raises(errno.ENOSPC):  # its write was concerned as well
        os.close(other)
    os.close(file)


def test_a_failed_flush_is_told_to_dd_at_its_close(faulty: FaultyDisk) -> None:
    faulty.fail(Rule("flush", errno.EIO))
    done = run("dd", f"of={faulty.path}", "bs=1M", "oflag=direct", input=bytes(MIB))
    assert done.returncode == 1
    assert b"Input/output error" in done.stderr


def test_a_failed_open_is_its_errno(faulty: FaultyDisk) -> None:
    faulty.fail(Rule("open-writable", errno.EBUSY))
    with raises(errno.EBUSY):
        faulty.path.open("r+b")
    assert faulty.path.read_bytes() == faulty.content
    faulty.fail(Rule("open", errno.EACCES))
    with raises(errno.EACCES):
        faulty.path.open("rb")


def test_a_failed_listing_is_its_errno(faulty: FaultyDisk) -> None:
    faulty.fail(Rule("list", errno.EACCES))
    with raises(errno.EACCES):
        os.listdir(faulty.path.parent)
    faulty.fail(Rule("lookup", errno.ETIMEDOUT))
    with raises(errno.ETIMEDOUT):
        faulty.path.with_name("anything").stat()
    assert sorted(os.listdir(faulty.path.parent)) == ["disk", "other"]


def test_a_stalled_backend_holds_up_neither_others_nor_its_own_other_requests(faulty: FaultyDisk) -> None:
    faulty.fail(Rule("pread", 0, offset=MIB))
    reader = subprocess.Popen(
        ["dd", f"if={faulty.path}", "bs=4096", "skip=256", "count=1", "iflag=direct"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    good = faulty.mount.path / "good" / "other"
    for _ in range(3):
        assert good.read_bytes() == faulty.content
        assert (
            succeed("dd", f"if={faulty.path}", "bs=4096", "count=1", "iflag=direct") == faulty.content[:4096]
        )
        assert len(api.status(socket_path=str(faulty.mount.socket)).open) >= 1
    assert reader.poll() is None
    faulty.fail()
    assert reader.communicate(timeout=30)[0] == faulty.content[MIB : MIB + 4096]


@pytest.mark.slow
def test_a_truncated_file_is_eio_and_no_short_read(mount: Callable[..., Mount], volumes: Path) -> None:
    content = random_bytes(MIB)
    (volumes / "disk").write_bytes(content)
    path = mount(f"file:{volumes}").path / "file" / "disk"
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_DIRECT):
        (volumes / "disk").write_bytes(content)
        with opened(path, flags) as file:
            os.truncate(volumes / "disk", 10_000)
            assert os.pread(file, 4096, 0) == content[:4096]
            with raises(errno.EIO):
                os.pread(file, 4096, 500_000)
    assert path.read_bytes() == content[:10_000]
