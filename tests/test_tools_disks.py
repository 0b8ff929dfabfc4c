"""The tools that take a volume file for a disk: file systems, loop devices, partition tables, LUKS.

What they left is checked on a copy of what the storage itself has, past volfs. No udev and no device mapper is needed.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import Disk, MakeDisk, disk_maker, run, succeed
from mounts import is_mounted
from services import MIB, skip_or_fail
from volumes import random_bytes, sha256, variants

pytestmark = pytest.mark.slow

SIZE = 13 * MIB
LUKS_SIZE = 18 * MIB  # its second version takes 16 MiB for its header
XFS_SIZE = 304 * MIB  # mkfs.xfs makes none below 300 MiB
TREE = {"a": 1, "b/c": 70_000, "b/d/e": MIB + 1, "empty": 0}  # files in a file system, and their sizes


make_disk = disk_maker(variants(only=("rbd", "iscsi-512")))


# Where sectors of another size may make a difference.
with_large_sectors = pytest.mark.parametrize(
    "make_disk", variants(only=("rbd", "iscsi-512", "iscsi-4096")), indirect=True
)


@pytest.fixture(scope="module")
def shared_disk(make_disk: MakeDisk) -> Disk:
    return make_disk(SIZE)


@pytest.fixture(scope="module")
def shared_large_disk(make_disk: MakeDisk) -> Disk:
    return make_disk(XFS_SIZE)


@pytest.fixture
def large_disk(shared_large_disk: Disk) -> Iterator[Disk]:
    yield shared_large_disk
    shared_large_disk.assert_released()


@contextlib.contextmanager
def looped(path: Path, *options: str) -> Iterator[Path]:
    """A loop device on a file."""
    if os.geteuid() != 0:
        skip_or_fail("root", "loop devices are root's")
    device = succeed("losetup", "--find", "--show", *options, path).decode().strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def mounted_loop(path: Path, directory: Path, options: str = "rw") -> Iterator[Path]:
    """The file system in a file, by `mount -o loop`."""
    if os.geteuid() != 0:
        skip_or_fail("root", "only root may mount")
    directory.mkdir(exist_ok=True)
    succeed("mount", "-o", f"loop,{options}", path, directory)
    try:
        yield directory
    finally:
        if is_mounted(directory):
            succeed("umount", directory)


def stored_copy(disk: Disk, tmp_path: Path) -> Path:
    """A file of what the storage has."""
    copy = tmp_path / "stored"
    content = disk.stored.read()
    with copy.open("wb") as file:
        for offset in range(0, len(content), MIB):
            if (piece := content[offset : offset + MIB]) != bytes(len(piece)):
                os.pwrite(file.fileno(), piece, offset)
        file.truncate(len(content))
    return copy


def fill_tree(directory: Path) -> None:
    for seed, (name, size) in enumerate(TREE.items()):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(random_bytes(size, seed))


def assert_tree(directory: Path) -> None:
    for seed, (name, size) in enumerate(TREE.items()):
        assert sha256((directory / name).read_bytes()) == sha256(random_bytes(size, seed)), name


# ---- file systems ----------------------------------------------------------------------------------------------


@with_large_sectors
def test_ext4_on_a_volume_keeps_its_files(disk: Disk, tmp_path: Path) -> None:
    disk.fill(1)  # a used volume, which mkfs must not take for an empty one
    succeed("mkfs.ext4", "-q", "-F", disk.path)
    succeed("e2fsck", "-fn", disk.path)
    for check in (fill_tree, assert_tree, assert_tree):
        with mounted_loop(disk.path, tmp_path / "mnt") as directory:
            check(directory)
            (directory / "more").write_bytes(b"more")
        succeed("e2fsck", "-fn", disk.path)
    disk.assert_released()
    copy = stored_copy(disk, tmp_path)
    succeed("e2fsck", "-fn", copy)
    with mounted_loop(copy, tmp_path / "copy", "ro") as directory:
        assert_tree(directory)
    assert filecmp.cmp(copy, disk.path, shallow=False)


def test_a_file_system_is_busy_and_then_gone_from_the_storage(disk: Disk, tmp_path: Path) -> None:
    """While it is mounted the daemon has the volume open; umount closes it."""
    succeed("mkfs.ext4", "-q", "-F", disk.path)
    with mounted_loop(disk.path, tmp_path / "mnt") as directory:
        (directory / "synced").write_bytes(b"synced")
        succeed("sync", "-f", directory)
        assert len(disk.status().open) == 1
        copy = stored_copy(disk, tmp_path)  # with its journal, as after a crash
        with mounted_loop(copy, tmp_path / "copy") as crashed:
            assert (crashed / "synced").read_bytes() == b"synced"
    disk.assert_released()


def kernel_knows(file_system: str) -> bool:
    return file_system in Path("/proc/filesystems").read_text().split()


def test_xfs_on_a_volume_keeps_its_files(large_disk: Disk, tmp_path: Path) -> None:
    """Made and checked by its own tools; mounted, too, where the kernel knows it."""
    disk = large_disk
    succeed("mkfs.xfs", "-q", disk.path)
    refused = run("mkfs.xfs", "-q", disk.path)
    assert refused.returncode != 0
    assert b"appears to contain an existing filesystem (xfs)" in refused.stderr
    if kernel_knows("xfs"):
        for check in (fill_tree, assert_tree):
            with mounted_loop(disk.path, tmp_path / "mnt") as directory:
                check(directory)
            succeed("xfs_repair", "-n", "-f", disk.path)
    disk.assert_released()
    copy = stored_copy(disk, tmp_path)
    for path in (disk.path, copy):
        succeed("xfs_repair", "-n", "-f", path)
        told = succeed("xfs_db", "-r", "-f", "-c", "sb 0", "-c", "print magicnum dblocks blocksize", path)
        assert told == b"magicnum = 0x58465342\ndblocks = %d\nblocksize = 4096\n" % (XFS_SIZE // 4096)
        assert b'TYPE="xfs"' in succeed("blkid", "-p", path)
    if kernel_knows("xfs"):
        with mounted_loop(copy, tmp_path / "copy", "ro,norecovery") as directory:
            assert_tree(directory)


def test_a_volume_too_small_for_a_file_system_is_left_as_it_is(disk: Disk) -> None:
    digest = sha256(disk.fill(2))
    done = run("mkfs.xfs", "-q", "-f", disk.path)
    assert done.returncode != 0
    assert b"too small, minimum 4096 blocks" in done.stderr
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.sha256() == digest


# ---- loop devices ----------------------------------------------------------------------------------------------


@with_large_sectors
@pytest.mark.parametrize(("direct", "sector_size"), [("on", 512), ("off", 512), ("on", 4096)])
def test_a_loop_device_reads_and_writes_the_volume(disk: Disk, direct: str, sector_size: int) -> None:
    content = bytearray(disk.fill(3))
    with looped(disk.path, f"--direct-io={direct}", f"--sector-size={sector_size}") as device:
        assert Path(f"/sys/block/{device.name}/loop/dio").read_text().strip() == str(int(direct == "on"))
        assert int(succeed("blockdev", "--getsize64", device)) == SIZE
        assert int(succeed("blockdev", "--getss", device)) == sector_size
        assert sha256(device.read_bytes()) == sha256(content)
        for number, (offset, length) in enumerate(((0, 4096), (4 * MIB - 4096, 8192), (9 * MIB, 3 * MIB))):
            content[offset : offset + length] = data = random_bytes(length, seed=number)
            command = ["dd", f"of={device}", "bs=64k", "oflag=seek_bytes", f"seek={offset}", "conv=notrunc"]
            succeed(
                *(command if number % 2 else [*command[:3], "oflag=seek_bytes,direct", *command[4:]]),
                input=data,
            )
        succeed("blockdev", "--flushbufs", device)
        succeed("sync", device)
        assert disk.stored.sha256() == sha256(content), "on the storage before the device is detached"
    disk.assert_released()
    assert disk.stored.sha256() == sha256(content)


def test_a_loop_device_of_a_read_only_file_cannot_be_written(disk: Disk) -> None:
    digest = sha256(disk.fill(4))
    with looped(disk.path, "--read-only") as device:
        assert int(succeed("blockdev", "--getro", device)) == 1
        assert run("dd", f"of={device}", "bs=4096", input=bytes(4096)).returncode == 1
        assert sha256(device.read_bytes()) == digest
    assert disk.stored.sha256() == digest


def test_zeroes_and_discards_of_a_loop_device_leave_what_they_promise(disk: Disk) -> None:
    """A discard may leave anything, the range alone; zeroes are zeroes."""
    content = bytearray(disk.fill(5))
    with looped(disk.path, "--direct-io=on") as device:
        succeed("blkdiscard", "--zeroout", "--offset", str(MIB), "--length", str(2 * MIB), device)
        content[MIB : 3 * MIB] = bytes(2 * MIB)
        assert disk.stored.sha256() == sha256(content)
        run("blkdiscard", "--offset", str(8 * MIB), "--length", str(MIB), device)
    stored = disk.stored.read()
    assert stored[: 8 * MIB] == content[: 8 * MIB]
    assert stored[9 * MIB :] == content[9 * MIB :]
    assert stored[8 * MIB : 9 * MIB] in (content[8 * MIB : 9 * MIB], bytes(MIB))


# ---- partition tables ------------------------------------------------------------------------------------------


def partitions(path: Path) -> list[dict[str, Any]]:
    """What sfdisk reads, without the names it makes up from the path."""
    table = json.loads(succeed("sfdisk", "--json", path))["partitiontable"]
    return [{key: value for key, value in it.items() if key != "node"} for it in table["partitions"]]


@pytest.mark.parametrize(("label", "blkid"), [("gpt", b'PTTYPE="gpt"'), ("dos", b'PTTYPE="dos"')])
def test_sfdisk_writes_a_table_that_all_read(disk: Disk, tmp_path: Path, label: str, blkid: bytes) -> None:
    content = disk.fill(6)
    disk.stored.write(bytes(MIB))
    script = f"label: {label}\nstart=2048, size=8192\nsize=8192, type=L\n".encode()
    succeed("sfdisk", "--quiet", disk.path, input=script)
    made = partitions(disk.path)
    assert [(it["start"], it["size"]) for it in made] == [(2048, 8192), (10240, 8192)]
    copy = stored_copy(disk, tmp_path)
    assert partitions(copy) == made
    assert blkid in succeed("blkid", "--probe", disk.path)
    listed = succeed("fdisk", "--list", disk.path).decode()
    assert f"{SIZE} bytes" in listed
    assert listed.count(str(disk.path)) == 3
    assert succeed("sfdisk", "--verify", disk.path)
    assert copy.read_bytes()[MIB : SIZE - MIB] == content[MIB : SIZE - MIB]


def test_fdisk_changes_a_table(disk: Disk, tmp_path: Path) -> None:
    disk.stored.write(bytes(SIZE))
    succeed("fdisk", disk.path, input=b"g\nn\n\n\n+4M\nn\n\n\n+4M\nw\n")
    assert [it["size"] for it in partitions(disk.path)] == [8192, 8192]
    succeed("fdisk", disk.path, input=b"d\n1\nw\n")
    assert [it["size"] for it in partitions(stored_copy(disk, tmp_path))] == [8192]
    succeed("wipefs", "--all", "--force", disk.path)  # by force, since it is a file
    assert run("blkid", "--probe", disk.path).returncode == 2  # nothing found
    assert not succeed("wipefs", stored_copy(disk, tmp_path)).strip()


def test_partitions_of_a_volume_are_devices(disk: Disk, tmp_path: Path) -> None:
    """`losetup -P` where the kernel reads the table, `partx` where it does not; and each is where it should be."""
    content = bytearray(disk.fill(7))
    disk.stored.write(bytes(MIB))
    succeed(
        "sfdisk", "--quiet", disk.path, input=b"label: gpt\nstart=2048, size=8192\nstart=10240, size=8192\n"
    )
    content[:MIB] = disk.stored.read()[:MIB]
    with looped(disk.path, "--partscan") as device:
        sys = Path("/sys/block", device.name)
        if not list(sys.glob(f"{device.name}p*")):
            succeed("partx", "--add", device)
        try:
            found = {it.name: int((it / "start").read_text()) for it in sys.glob(f"{device.name}p*")}
            assert found == {f"{device.name}p1": 2048, f"{device.name}p2": 10240}
        finally:
            succeed("partx", "--delete", device)
    with looped(disk.path, f"--offset={10240 * 512}", f"--sizelimit={8192 * 512}") as device:
        succeed("mkfs.ext4", "-q", "-F", device)
        assert b'TYPE="ext4"' in succeed("blkid", "--probe", device)
    stored = disk.stored.read()
    assert stored[MIB : 10240 * 512] == content[MIB : 10240 * 512]
    assert b'TYPE="ext4"' in succeed(
        "blkid", "--probe", f"--offset={10240 * 512}", stored_copy(disk, tmp_path)
    )


# ---- LUKS ------------------------------------------------------------------------------------------------------

FAST = ("--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


def keys_open(path: Path, key: bytes) -> bool:
    done = run("cryptsetup", "open", "--test-passphrase", "--key-file=-", path, input=key)
    assert done.returncode == 0 or b"o key available" in done.stderr or b"No usable keyslot" in done.stderr, (
        done.stderr
    )
    return done.returncode == 0


@pytest.mark.parametrize("version", ["luks1", "luks2"])
def test_cryptsetup_keeps_its_keys_on_a_volume(make_disk: MakeDisk, tmp_path: Path, version: str) -> None:
    disk = make_disk(LUKS_SIZE)
    content = disk.fill(8)
    new_key = tmp_path / "new-key"
    new_key.write_bytes(b"second")
    succeed("cryptsetup", "luksFormat", *FAST, "--type", version, "--key-file=-", disk.path, input=b"first")
    assert keys_open(disk.path, b"first")
    assert not keys_open(disk.path, b"second")
    succeed("cryptsetup", "luksAddKey", *FAST, "--key-file=-", disk.path, new_key, input=b"first")
    succeed("cryptsetup", "luksRemoveKey", "--batch-mode", "--key-file=-", disk.path, input=b"first")
    copy = stored_copy(disk, tmp_path)
    for path in (disk.path, copy):
        assert keys_open(path, b"second")
        assert not keys_open(path, b"first")
        assert b"LUKS header information" in succeed("cryptsetup", "luksDump", path)
        assert b'TYPE="crypto_LUKS"' in succeed("blkid", "--probe", path)
        succeed("cryptsetup", "isLuks", "--type", version, path)
    backup = tmp_path / "header"
    succeed("cryptsetup", "luksHeaderBackup", "--header-backup-file", backup, disk.path)
    assert copy.read_bytes().startswith(backup.read_bytes())
    assert copy.read_bytes()[17 * MIB :] == content[17 * MIB :]
    succeed("cryptsetup", "luksErase", "--batch-mode", disk.path)
    assert not keys_open(disk.path, b"second")
    succeed("cryptsetup", "luksHeaderRestore", "--batch-mode", "--header-backup-file", backup, disk.path)
    assert keys_open(disk.path, b"second")
    disk.assert_released()
    disk.stored.remove()
