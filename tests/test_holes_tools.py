"""What tools make of holes: fstrim and blkdiscard give space back, qemu-img finds it, copies keep it on every driver.

The judge is the storage itself: its bytes, `rbd du`, `rbd diff`. test_tools*.py has these tools on other volumes.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from disks import OBJECT, Disk, MakeDisk, disk_maker, opened, succeed
from holes import allocated, assert_hides_nothing, data_of_path, punch
from mounts import VOLFS, wait_until
from services import MIB
from test_tools_disks import looped, mounted_loop, stored_copy
from volumes import RbdVolume, assert_same, random_bytes, variants

pytestmark = pytest.mark.slow

SIZE = 5 * OBJECT + 4096

make_disk = disk_maker(variants(only=("rbd", "iscsi-512", "block", "file")))
on_rbd = pytest.mark.parametrize("make_disk", variants(only=("rbd",)), indirect=True)


@pytest.fixture(scope="module")
def shared_disk(make_disk: MakeDisk) -> Disk:
    return make_disk(SIZE)


@pytest.fixture
def new(make_disk: MakeDisk) -> Iterator[MakeDisk]:
    """new(): a volume nobody has ever written to, for one test."""
    made: list[Disk] = []

    def one(size: int = SIZE) -> Disk:
        made.append(make_disk(size))
        return made[-1]

    yield one
    for disk in made:
        disk.assert_released()
        disk.stored.remove()


RUNS = {
    "full": ((0, SIZE),),
    "empty": (),
    "mixed": ((0, 10_000), (OBJECT - 70_001, 140_003), (3 * OBJECT + 512, 4096), (SIZE - 3, 3)),
    "hole at the ends": ((OBJECT + 1, MIB),),
}
contents = pytest.mark.parametrize("content", RUNS)


def write_runs(disk: Disk, content: str) -> bytes:
    """Data where RUNS says, and nothing elsewhere."""
    model = bytearray(SIZE)
    for offset, length in RUNS[content]:
        model[offset : offset + length] = data = random_bytes(length, seed=offset)
        disk.stored.write(data, offset)
    return bytes(model)


def environment() -> dict[str, str]:
    """Of a script that runs $VOLFS."""
    return {**os.environ, "VOLFS": shlex.join(VOLFS)}


def joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """One run where several follow each other."""
    found: list[tuple[int, int]] = []
    for begin, end in runs:
        if found and begin <= found[-1][1]:
            begin, _ = found.pop()
        found.append((begin, end))
    return found


def whole_blocks(offset: int, length: int) -> tuple[int, int]:
    """The run of blocks that the range has a part in."""
    return offset // 4096 * 4096, min(-(-(offset + length) // 4096) * 4096, SIZE)


# ---- out of a volume -------------------------------------------------------------------------------------------

OUT = {
    "cp --sparse=always": 'cp --sparse=always "$1" "$2"',
    "cp --sparse=auto": 'cp --sparse=auto "$1" "$2"',
    "cp --sparse=never": 'cp --sparse=never "$1" "$2"',
    "dd conv=sparse": 'dd if="$1" of="$2" bs=64k conv=sparse status=none',
    "dd conv=sparse direct": 'dd if="$1" of="$2" bs=1M iflag=direct conv=sparse status=none',
    "rsync -S": 'rsync -S --ignore-times "$1" "$2"',
    "rsync -S --inplace": 'rsync -S --inplace --ignore-times "$1" "$2"',
    "tar -S": 'tar -cSf- -C "${1%/*}" "${1##*/}" | tar -xOf- >"$2"',
    "tar -S, raw": 'tar -cS --hole-detection=raw -f- -C "${1%/*}" "${1##*/}" | tar -xOf- >"$2"',
    "qemu-img convert": 'qemu-img convert -f raw -O raw "$1" "$2"',
    "qemu-img convert direct": 'qemu-img convert -T none -t none -W -m 8 -f raw -O raw "$1" "$2"',
    "qcow2": 'qemu-img convert -O qcow2 -f raw "$1" "$2.q" && qemu-img convert -O raw "$2.q" "$2"; rm "$2.q"',
    "volfs copy": '$VOLFS copy -q "$1" "$2"',
}


@contents
def test_what_tools_copy_out_of_a_volume_is_all_there(new: MakeDisk, tmp_path: Path, content: str) -> None:
    disk = new()
    model = write_runs(disk, content)
    assert_hides_nothing(data_of_path(disk.path), model)
    for name, script in OUT.items():
        copy = tmp_path / "copy"
        if "volfs" in name:
            copy.touch()
        succeed("sh", "-ec", script, "sh", disk.path, copy, env=environment())
        assert_same(copy.read_bytes(), model, 0, f"{name} of {disk.stored.driver}")
        copy.unlink()


def test_data_is_archived_that_was_just_written(new: MakeDisk, tmp_path: Path) -> None:
    """By the same handle, or one that is still open, flushed or not: stat(2) must not say that there is none."""
    disk = new()
    model = bytearray(SIZE)
    for flags in (os.O_RDWR, os.O_WRONLY | os.O_DIRECT):
        for offset in (OBJECT + 5, 3 * OBJECT):
            with opened(disk.path, flags) as file:
                model[offset : offset + 4096] = data = random_bytes(4096, seed=offset + flags)
                os.pwrite(file, data, offset)
                assert allocated(disk.path) > 0
                succeed("tar", "-cSf", tmp_path / "a", "-C", disk.directory, disk.path.name)
                assert_same(succeed("tar", "-xOf", tmp_path / "a"), model, 0, "while it is open")
            succeed("tar", "-cSf", tmp_path / "a", "-C", disk.directory, disk.path.name)
            assert_same(succeed("tar", "-xOf", tmp_path / "a"), model, 0, "when it is closed")


# ---- from volume to volume -------------------------------------------------------------------------------------

BETWEEN = {
    "cp --sparse=always": 'cp --sparse=always "$1" "$2"',
    "cp --sparse=auto": 'cp --sparse=auto "$1" "$2"',
    "cp --sparse=never": 'cp --sparse=never "$1" "$2"',
    "rsync --inplace": 'rsync --inplace --ignore-times "$1" "$2"',
    "rsync -S --inplace": 'rsync -S --inplace --ignore-times "$1" "$2"',
    "qemu-img convert": 'qemu-img convert -n -f raw -O raw "$1" "$2"',
    "qemu-img convert direct": 'qemu-img convert -n -T none -t none -W -m 8 -f raw -O raw "$1" "$2"',
    "volfs copy": '$VOLFS copy -q "$1" "$2"',
}


@contents
def test_a_used_volume_becomes_the_copy_and_its_holes_are_given_back(new: MakeDisk, content: str) -> None:
    source, target = new(), new()
    model = write_runs(source, content)
    keeps_holes = source.stored.driver in ("rbd", "file")
    objects = {SIZE // OBJECT}  # in which the volume ends: librbd empties it, and does not remove it
    for begin, end in data_of_path(source.path):
        objects |= set(range(begin // OBJECT, -(-end // OBJECT)))
    most = OBJECT * len(objects)
    for name, script in BETWEEN.items():
        target.fill(1)
        succeed("sh", "-ec", script, "sh", source.path, target.path, env=environment())
        target.assert_released()
        assert_same(target.stored.read(), model, 0, f"{name} on {source.stored.driver}")
        assert_hides_nothing(data_of_path(target.path), model)
        if keeps_holes and name in ("cp --sparse=always", "cp --sparse=auto", "volfs copy"):
            wait_until(lambda: allocated(target.path) <= most, f"{name}: no more than {most} bytes")
    assert_same(source.stored.read(), model, 0, "the source")


# ---- giving space back -----------------------------------------------------------------------------------------


def used(disk: Disk) -> int:
    """Bytes of an RBD image that the storage has allocated, as it tells itself."""
    assert isinstance(disk.stored, RbdVolume)
    image = disk.stored.image
    told = image.services.json("rbd", "du", "--format", "json", image.spec)
    return int(told["images"][0]["used_size"])


@on_rbd
@pytest.mark.parametrize("direct", ["on", "off"])
def test_fstrim_gives_what_is_deleted_back_to_ceph(new: MakeDisk, tmp_path: Path, direct: str) -> None:
    disk = new(96 * MIB)
    succeed(
        "mkfs.ext4", "-q", "-F", "-b", "4096", disk.path
    )  # with smaller blocks come groups as small as objects
    kept = random_bytes(MIB, seed=1)
    with looped(disk.path, f"--direct-io={direct}") as device:
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        succeed("mount", device, mountpoint)
        try:
            (mountpoint / "kept").write_bytes(kept)
            (mountpoint / "deleted").write_bytes(random_bytes(48 * MIB, seed=2))
            succeed("sync", "-f", mountpoint)
            full = used(disk)
            assert full >= 48 * MIB
            (mountpoint / "deleted").unlink()
            succeed("sync", "-f", mountpoint)
            assert used(disk) == full, "a deleted file takes its space until it is trimmed"
            succeed("fstrim", "-v", mountpoint)
            assert used(disk) <= full - 40 * MIB
        finally:
            succeed("umount", mountpoint)
    disk.assert_released()
    copy = stored_copy(disk, tmp_path)
    succeed("e2fsck", "-fn", copy)
    with mounted_loop(copy, tmp_path / "copy", "ro") as directory:
        assert os.listdir(directory) in (["kept", "lost+found"], ["lost+found", "kept"])
        assert_same((directory / "kept").read_bytes(), kept, 0, "what was kept")


@pytest.mark.parametrize("options", [(), ("--zeroout",)], ids=["discard", "zeroout"])
def test_blkdiscard_of_a_loop_device_makes_zeros_and_holes(disk: Disk, options: tuple[str, ...]) -> None:
    content = bytearray(disk.fill(3))
    with looped(disk.path, "--direct-io=on") as device:
        for offset, length in ((OBJECT, 2 * OBJECT), (512, 4096), (SIZE - 4096, 4096)):
            where = (f"--offset={offset}", f"--length={length}")
            succeed("blkdiscard", "--force", *options, *where, device)
            content[offset : offset + length] = bytes(length)
            assert_same(disk.path.read_bytes(), content, 0, f"after {offset}+{length}")
    disk.assert_released()  # the kernel closes what a loop device had open some time after it is gone
    assert_same(disk.stored.read(), content, 0, "on the storage")
    if not options and disk.stored.driver in ("rbd", "file"):
        runs = data_of_path(disk.path)
        assert not any(begin < 3 * OBJECT and end > OBJECT for begin, end in runs), runs


@on_rbd
@contents
def test_qemu_img_map_agrees_with_rbd_diff(new: MakeDisk, content: str) -> None:
    disk = new()
    write_runs(disk, content)
    if content == "full":
        with opened(disk.path, os.O_RDWR) as file:
            punch(file, 2 * OBJECT, OBJECT)
    assert isinstance(disk.stored, RbdVolume)
    image = disk.stored.image
    diff = image.services.json("rbd", "diff", "--format", "json", image.spec)
    expected = joined(whole_blocks(it["offset"], it["length"]) for it in diff if it["exists"] == "true")
    mapped = json.loads(succeed("qemu-img", "map", "--output=json", "-f", "raw", disk.path))
    assert joined((it["start"], it["start"] + it["length"]) for it in mapped if it["data"]) == expected
    assert all(it["zero"] for it in mapped if not it["data"])
    assert sum(it["length"] for it in mapped) == SIZE
    assert data_of_path(disk.path) == expected
