"""Holes of volumes through the kernel: lseek(2), fallocate(2), and the space that stat(2) tells, on every driver.

test_copy_in_the_mount.py has copy_file_range(2), test_holes_tools.py the programs that use them.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import OBJECT, Disk, MakeDisk, disk_maker, opened
from faults import Rule, volfs_with_faults, write_rules
from holes import (
    BOTH_ZEROINGS,
    COLLAPSE,
    INSERT,
    KEEP_SIZE,
    PUNCH,
    UNSHARE,
    ZERO,
    allocated,
    assert_hides_nothing,
    data_of,
    data_of_path,
    fallocate,
    length_of,
    punch,
)
from mounts import Mount, mounted, wait_until
from services import MIB
from volumes import RbdVolume, assert_same, raises, random_bytes, variants

SIZE = 3 * OBJECT + 4096
slow = pytest.mark.slow
both_ways = pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
by_each_zeroing = pytest.mark.parametrize("mode", BOTH_ZEROINGS.values(), ids=BOTH_ZEROINGS.keys())

make_disk = disk_maker(variants(quick=("rbd",), only=("rbd", "iscsi-512", "iscsi-4096", "block", "file")))


@pytest.fixture(scope="module")
def shared_disk(make_disk: MakeDisk) -> Disk:
    return make_disk(SIZE)


@pytest.fixture
def empty(make_disk: MakeDisk) -> Iterator[Disk]:
    """A volume nobody has ever written to."""
    disk = make_disk(SIZE)
    yield disk
    disk.assert_released()
    disk.stored.remove()


def knows_holes(disk: Disk) -> bool:
    """A block device does not tell what it has allocated: all of it is data."""
    return disk.stored.driver != "block"


def tells_space(disk: Disk) -> bool:
    """What a listing knows without opening the volume."""
    return disk.stored.driver in ("rbd", "file")


# ---- lseek -----------------------------------------------------------------------------------------------------


@slow
def test_an_empty_volume_is_one_hole(empty: Disk) -> None:
    with opened(empty.path, os.O_RDONLY) as file:
        for offset in (0, 1, OBJECT - 1, OBJECT, SIZE - 1):
            if knows_holes(empty):
                assert os.lseek(file, offset, os.SEEK_HOLE) == offset
                with raises(errno.ENXIO):
                    os.lseek(file, offset, os.SEEK_DATA)
            else:
                assert os.lseek(file, offset, os.SEEK_HOLE) == SIZE


@slow
@both_ways
def test_the_hole_of_a_full_volume_is_its_end(disk: Disk, direct: int) -> None:
    disk.fill(1)
    with opened(disk.path, os.O_RDONLY | direct) as file:
        for offset in (0, 1, OBJECT - 1, OBJECT, SIZE - 1):
            assert os.lseek(file, offset, os.SEEK_DATA) == offset
            assert os.lseek(file, offset, os.SEEK_HOLE) == SIZE
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for offset in (-1, -SIZE, SIZE, SIZE + 1, 1 << 60):
                with raises(errno.ENXIO):
                    os.lseek(file, offset, whence)
        assert os.lseek(file, 0, os.SEEK_CUR) == SIZE, "a seek that failed has moved the position"


def test_who_goes_by_runs_of_data_may_read_the_holes_as_well(empty: Disk) -> None:
    """Each page of a hole may have been refused before, when the kernel read ahead: see data_ahead.py."""
    model = bytearray(SIZE)
    for offset in (0, 2 * OBJECT):
        model[offset : offset + MIB] = data = random_bytes(MIB, seed=offset)
        empty.stored.write(data, offset)
    with opened(empty.path, os.O_RDONLY) as file:
        for begin in (0, 2 * OBJECT):
            assert os.lseek(file, begin, os.SEEK_DATA) == begin
            for offset in range(begin, begin + MIB, MIB // 4):
                assert_same(
                    os.pread(file, MIB // 4, offset), model[offset : offset + MIB // 4], offset, "run"
                )
        with mmap.mmap(file, SIZE, prot=mmap.PROT_READ) as mapping:
            assert_same(mapping[OBJECT : 2 * OBJECT], bytes(OBJECT), OBJECT, "mapped hole")
        assert_same(os.pread(file, SIZE, 0), model, 0, "all of it")
        with opened(empty.path, os.O_WRONLY) as other:
            os.pwrite(other, b"new", MIB + 5)
        assert os.pread(file, 3, MIB + 5) == b"new"


def test_data_and_holes_are_told_from_any_offset(empty: Disk) -> None:
    model = bytearray(SIZE)
    for offset, length in ((70_001, 3), (2 * OBJECT - 5000, 10_000)):
        model[offset : offset + length] = data = random_bytes(length, seed=offset)
        empty.stored.write(data, offset)
    with opened(empty.path, os.O_RDONLY) as file:
        runs = data_of(file)
        assert_hides_nothing(runs, model)
        if knows_holes(empty):
            assert length_of(runs) <= 3 * OBJECT
            assert runs[-1][1] < SIZE
            for begin, end in runs:
                for offset in (begin, (begin + end) // 2, end - 1):
                    assert os.lseek(file, offset, os.SEEK_DATA) == offset
                    assert os.lseek(file, offset, os.SEEK_HOLE) == end
                assert os.lseek(file, end, os.SEEK_HOLE) == end
        assert os.lseek(file, 5, os.SEEK_SET) == 5
        assert os.pread(file, SIZE, 0) == model


@slow
@slow
@pytest.mark.parametrize(
    "written", [((70_001, 3),), ((4096, 4096),), ((4095, 2), (12_289, 1)), ((5, 1), (4090, 1))]
)
def test_no_hole_begins_or_ends_within_a_block(empty: Disk, written: tuple[tuple[int, int], ...]) -> None:
    """However finely the storage tells them: QEMU aborts otherwise."""
    blocks = set()
    for offset, length in written:
        empty.stored.write(random_bytes(length, seed=offset), offset)
        blocks |= {offset // 4096, (offset + length - 1) // 4096}
    with opened(empty.path, os.O_RDONLY) as file:
        runs = data_of(file)
        assert not any(end % 4096 for run in runs for end in run if end != SIZE), runs
        for block in blocks:
            for offset in (block * 4096, block * 4096 + 1, block * 4096 + 4095):
                assert os.lseek(file, offset, os.SEEK_DATA) == offset
                assert os.lseek(file, offset, os.SEEK_HOLE) % 4096 == SIZE % 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_DIRECT, os.O_RDWR | os.O_SYNC],
    ids=["cached", "uncached", "direct", "sync"],
)
def test_what_is_written_is_data_at_once_to_every_handle(empty: Disk, flags: int) -> None:
    """Flushed or not, though all of it was known to be a hole."""
    model = bytearray(SIZE)
    with opened(empty.path, os.O_RDONLY) as reader, opened(empty.path, flags) as writer:
        for number, offset in enumerate((OBJECT - 2, SIZE - 4, 100, 2 * OBJECT)):
            assert_hides_nothing(data_of(reader), model)
            model[offset : offset + 4] = b"data"
            assert os.pwrite(writer, b"data", offset) == 4
            if number % 2:
                os.fsync(writer)
            for file in (reader, writer):
                assert os.lseek(file, offset, os.SEEK_DATA) == offset
                assert_hides_nothing(data_of(file), model)
    assert_hides_nothing(data_of_path(empty.path), model)


def test_what_a_mapping_holds_unwritten_is_data(empty: Disk) -> None:
    """The kernel has it, and tells nobody: it is made to write it back before the question is answered."""
    model = bytearray(SIZE)
    with opened(empty.path, os.O_RDWR) as file:
        mapping = mmap.mmap(file, SIZE)
    with mapping, opened(empty.path, os.O_RDONLY) as reader:
        for offset in (OBJECT + 17, 3, SIZE - 1):
            assert_hides_nothing(data_of(reader), model)
            mapping[offset] = model[offset] = 0xA5
            assert os.lseek(reader, offset, os.SEEK_DATA) == offset
            assert_hides_nothing(data_of(reader), model)
        assert mapping[:] == model


@slow
def test_what_another_client_writes_is_data_at_the_next_open(empty: Disk) -> None:
    assert_hides_nothing(data_of_path(empty.path), bytes(SIZE))
    with opened(empty.path, os.O_RDONLY) as other:  # the volume stays open meanwhile
        data_of(other)
        empty.stored.write(b"elsewhere", 2 * OBJECT + 5)
        with opened(empty.path, os.O_RDONLY) as file:
            assert os.lseek(file, 2 * OBJECT + 5, os.SEEK_DATA) == 2 * OBJECT + 5
            if knows_holes(empty):
                assert os.lseek(file, 0, os.SEEK_DATA) > OBJECT


@slow
@by_each_zeroing
def test_holes_that_are_made_are_told_where_the_storage_knows_them(disk: Disk, mode: int) -> None:
    model = bytearray(disk.fill(2))
    with opened(disk.path, os.O_RDWR) as file:
        fallocate(file, mode, OBJECT, OBJECT)
        model[OBJECT : 2 * OBJECT] = bytes(OBJECT)
        runs = data_of(file)
        assert_hides_nothing(runs, model)
        if knows_holes(disk) and mode & PUNCH:
            assert runs == [(0, OBJECT), (2 * OBJECT, SIZE)]
        os.pwrite(file, b"x", OBJECT + 5)
        assert os.lseek(file, OBJECT + 5, os.SEEK_DATA) == OBJECT + 5


@slow
@pytest.mark.parametrize("make_disk", variants(only=("rbd",)), indirect=True)
def test_snapshots_and_clones_hide_nothing(empty: Disk) -> None:
    assert isinstance(empty.stored, RbdVolume)
    image = empty.stored.image
    empty.stored.write(b"before", OBJECT + 1)
    at = image.snapshot("first")
    empty.stored.write(b"after", 2 * OBJECT + 1)
    path = empty.path.with_name(empty.path.name + at)
    wait_until(path.exists, f"{path} is listed")
    model = bytearray(SIZE)
    model[OBJECT + 1 : OBJECT + 7] = b"before"
    runs = data_of_path(path)
    assert_hides_nothing(runs, model)
    assert runs[-1][1] <= 2 * OBJECT
    clone = empty.path.with_name(f"{empty.path.name}-clone")
    spec = image.spec.replace(image.name, clone.name)
    image.services.run(
        "rbd", "clone", "--rbd-default-clone-format", "2", f"{image.spec}{at}", spec, "--image-feature",
        "layering",
    )  # fmt: skip
    try:
        wait_until(clone.exists, f"{clone} is listed")
        with opened(clone, os.O_RDWR) as file:
            assert_hides_nothing(data_of(file), model)
            os.pwrite(file, b"own", 3 * OBJECT)
            model[3 * OBJECT : 3 * OBJECT + 3] = b"own"
            assert_hides_nothing(data_of(file), model)
            punch(file, OBJECT, 100)
            model[OBJECT : OBJECT + 100] = bytes(100)
            assert os.pread(file, SIZE, 0) == model
        assert path.read_bytes()[OBJECT + 1 : OBJECT + 7] == b"before"
    finally:
        wait_until(lambda: not empty.status().open, "the clone is closed")
        image.services.run("rbd", "rm", "--no-progress", spec)
        image.services.run("rbd", "snap", "rm", "--no-progress", f"{image.spec}{at}")


# ---- fallocate -------------------------------------------------------------------------------------------------

RANGES = (
    (1, 1),
    (4095, 2),
    (OBJECT - 70_001, 140_003),
    (0, 4096),
    (2 * OBJECT + 1, OBJECT + 4095),
    (9, OBJECT),
)


@both_ways
@pytest.mark.parametrize(
    "mode",
    [pytest.param(it, id=name, marks=[] if it & PUNCH else [slow]) for name, it in BOTH_ZEROINGS.items()],
)
def test_a_range_is_zero_at_once_and_what_is_around_it_stays(disk: Disk, mode: int, direct: int) -> None:
    """To this handle and to others, whose pages were in the cache."""
    model = bytearray(disk.fill(3))
    with (
        opened(disk.path, os.O_RDWR | direct) as file,
        opened(disk.path, os.O_RDWR) as cached,
        opened(disk.path, os.O_RDONLY | os.O_DIRECT) as uncached,
        mmap.mmap(cached, SIZE) as mapping,
    ):
        for offset, length in RANGES:
            for at in {max(offset - 5000, 0), offset, min(offset + length + 50, SIZE - 1)}:
                mapping[at] = model[at] = 0x5A  # unwritten, in the range and around it
            assert_same(mapping[:], model, 0, "mapped, before")
            fallocate(file, mode, offset, length)
            model[offset : offset + length] = bytes(length)
            around = max(offset - 10_000, 0)
            expected = model[around : offset + length + 10_000]
            when = f"after {offset}+{length}"
            assert_same(mapping[around : offset + length + 10_000], expected, around, f"mapped {when}")
            assert_same(os.pread(uncached, len(expected), around), expected, around, f"direct {when}")
            assert_same(os.pread(file, len(expected), around), expected, around, f"the same handle {when}")
        assert_hides_nothing(data_of(file), model)
        os.fsync(file)
        assert_same(disk.stored.read(), model, 0, "on the storage")
        fallocate(file, mode, 0, SIZE)
        assert_same(os.pread(cached, SIZE, 0), bytes(SIZE), 0, "all of it")
    assert_same(disk.stored.read(), bytes(SIZE), 0, "on the storage")


@slow
def test_what_is_zero_is_so_after_a_remount(empty: Disk, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = bytearray(empty.fill(4))
    stored = empty.stored
    for (offset, length), mode in zip(RANGES, itertools.cycle(BOTH_ZEROINGS.values()), strict=False):
        with mounted(tmp_path_factory.mktemp("again"), [stored.prefix], env=stored.environment) as mount:
            path = mount.path.joinpath(stored.driver, *stored.place)
            assert_same(path.read_bytes(), model, 0, "mounted again")
            with opened(path, os.O_RDWR) as file:
                fallocate(file, mode, offset, length)
            model[offset : offset + length] = bytes(length)
    assert_same(stored.read(), model, 0, "on the storage")


def test_a_punch_goes_past_the_end_and_zeroing_does_not(disk: Disk) -> None:
    model = bytearray(disk.fill(5))
    with opened(disk.path, os.O_RDWR) as file:
        for offset in (SIZE, SIZE + 1, 1 << 40):
            punch(file, offset, 4096)
        punch(file, SIZE - 10, 1 << 40)
        model[-10:] = bytes(10)
        for mode in (0, KEEP_SIZE, ZERO, ZERO | KEEP_SIZE):
            for offset, length in ((SIZE - 4096, 4097), (SIZE, 1), (0, SIZE + 1), (1 << 40, 4096)):
                with raises(errno.ENOSPC):
                    fallocate(file, mode, offset, length)
        assert os.fstat(file).st_size == SIZE
        assert os.pread(file, SIZE + 1, 0) == model
    assert disk.stored.read() == model


def test_allocating_changes_nothing_and_what_moves_bytes_is_eopnotsupp(disk: Disk) -> None:
    content = disk.fill(6)
    with opened(disk.path, os.O_RDWR) as file:
        before = os.fstat(file)
        for mode in (0, KEEP_SIZE):
            for offset, length in ((0, SIZE), (1, 1), (SIZE - 1, 1)):
                fallocate(file, mode, offset, length)
        os.posix_fallocate(file, 0, SIZE)
        for mode in (COLLAPSE, INSERT, UNSHARE, PUNCH, PUNCH | ZERO | KEEP_SIZE):
            with raises(errno.EOPNOTSUPP):
                fallocate(file, mode, 0, 4096)
        for offset, length in ((-1, 1), (0, 0), (0, -1)):
            with raises(errno.EINVAL):
                fallocate(file, 0, offset, length)
        after = os.fstat(file)
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert disk.stored.read() == content


@slow
@by_each_zeroing
def test_a_handle_that_only_reads_zeroes_nothing(disk: Disk, mode: int) -> None:
    content = disk.fill(7)
    with opened(disk.path, os.O_RDONLY) as file, raises(errno.EBADF):
        fallocate(file, mode, 0, 4096)
    with opened(disk.path, os.O_PATH) as file, raises(errno.EBADF):
        fallocate(file, mode, 0, 4096)
    assert disk.stored.read() == content


@by_each_zeroing
def test_zeroing_moves_the_mtime(disk: Disk, mode: int) -> None:
    disk.fill(8)
    with opened(disk.path, os.O_RDWR) as file:
        before = os.fstat(file).st_mtime_ns
        fallocate(file, mode, 0, 4096)
        after = os.fstat(file).st_mtime_ns
        assert after > before
        assert os.fstat(file).st_mtime_ns == after
    assert disk.path.stat().st_mtime_ns == after


@slow
@both_ways
@by_each_zeroing
def test_what_is_skipped_before_a_zeroed_range_is_zero_too_after_o_trunc(
    disk: Disk, mode: int, direct: int
) -> None:
    """To such a program the file was empty; what it does not reach stays, as with its writes."""
    model = bytearray(disk.fill(9))
    with opened(disk.path, os.O_RDWR | os.O_TRUNC | direct) as file:
        os.pwrite(file, b"begin", 0)
        fallocate(file, mode, OBJECT + 100, 1000)
        model[: OBJECT + 1100] = b"begin" + bytes(OBJECT + 1095)
        os.pwrite(file, b"end", OBJECT + 2000)
        model[OBJECT + 1100 : OBJECT + 2003] = bytes(900) + b"end"
        assert_same(os.pread(file, SIZE, 0), model, 0, "the same handle")
    assert_same(disk.stored.read(), model, 0, "on the storage")


@slow
def test_a_read_only_mount_zeroes_nothing(empty: Disk, tmp_path_factory: pytest.TempPathFactory) -> None:
    content, stored = empty.fill(10), empty.stored
    directory = tmp_path_factory.mktemp("ro")
    with mounted(directory, [stored.prefix], ["-o", "ro"], env=stored.environment) as mount:
        path = mount.path.joinpath(stored.driver, *stored.place)
        with raises(errno.EROFS):
            os.open(path, os.O_RDWR)
        with opened(path, os.O_RDONLY) as file:
            with raises(errno.EBADF):
                punch(file, 0, 4096)
            assert_hides_nothing(data_of(file), content)
    assert stored.read() == content


# ---- allocated space -------------------------------------------------------------------------------------------


@slow
def test_allocated_space_rises_with_writes_and_falls_with_punches(empty: Disk) -> None:
    def settles(condition: Callable[[int], bool], what: str) -> None:
        wait_until(
            lambda: condition(allocated(empty.path)), f"{what}: {allocated(empty.path)} bytes are allocated"
        )

    if not tells_space(empty):
        assert allocated(empty.path) == SIZE, "what is not known is all of it"
        return
    settles(lambda space: space == 0, "nothing was written")
    with opened(empty.path, os.O_RDWR) as file:
        os.pwrite(file, random_bytes(10_000), OBJECT)
        assert os.fstat(file).st_blocks > 0, "data that was just written, and not flushed"
    settles(lambda space: 10_000 <= space <= OBJECT, "10000 bytes were written")
    empty.fill(11)
    settles(lambda space: space >= SIZE, "all was written")
    with opened(empty.path, os.O_RDWR) as file:
        punch(file, OBJECT, OBJECT)
    settles(lambda space: 2 * OBJECT < space <= 3 * OBJECT, "4 MiB were punched")
    with opened(empty.path, os.O_RDWR) as file:
        punch(file, 0, SIZE)
    # librbd empties an object that the volume ends in, and does not remove it.
    last = OBJECT if isinstance(empty.stored, RbdVolume) else 0
    settles(lambda space: space <= last, "all was punched")


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mount, Path, Path]]:
    """A volume's file on a mount, and the file of rules that make its backend fail."""
    directory = tmp_path_factory.mktemp("faulty")
    volumes, rules, config = directory / "volumes", directory / "rules", directory / "volfs.toml"
    volumes.mkdir()
    (volumes / "disk").write_bytes(b"\xa5" * MIB)
    write_rules(rules)
    config.write_text(f"[backends.faulty]\ndriver = 'faulty-file'\npath = '{volumes}'\nfaults = '{rules}'")
    with mounted(directory / "m", [], ("--config", str(config)), volfs=volfs_with_faults()) as mount:
        yield mount, mount.path / "faulty" / "disk", rules


@by_each_zeroing
@pytest.mark.parametrize("flags", [0, os.O_SYNC, os.O_DSYNC, os.O_DIRECT | os.O_SYNC])
def test_zeroing_flushes_where_the_handle_is_synchronous(
    faulty: tuple[Mount, Path, Path], mode: int, flags: int
) -> None:
    """What asked for no flush does not notice that flushing fails, until it is closed."""
    _, path, rules = faulty
    with opened(path, os.O_RDWR | flags) as file:
        fallocate(file, mode, 0, 4096)
        try:
            write_rules(rules, Rule("flush", errno.EIO))
            if flags:
                with raises(errno.EIO):
                    fallocate(file, mode, 0, 4096)
            else:
                fallocate(file, mode, 0, 4096)
        finally:
            write_rules(rules)
        fallocate(file, mode, 0, 4096)


@by_each_zeroing
def test_an_error_of_the_backend_is_told_and_the_rest_works(
    faulty: tuple[Mount, Path, Path], mode: int
) -> None:
    _, path, rules = faulty
    with opened(path, os.O_RDWR) as file:
        os.pwrite(file, b"data", 5000)
        try:
            write_rules(rules, Rule("pwrite", errno.EDQUOT, offset=5000))
            with raises(errno.EDQUOT):
                fallocate(file, mode, 4096, 4096)
            fallocate(file, mode, 8192, 4096)
        finally:
            write_rules(rules)
        assert os.pread(file, 4, 5000) == b"data"
        fallocate(file, mode, 4096, 4096)
        assert os.pread(file, 8192, 4096) == bytes(8192)
