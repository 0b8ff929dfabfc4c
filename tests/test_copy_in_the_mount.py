"""copy_file_range(2) between volumes of one mount: in one volume, in one storage, and from each driver to each other.

What the copy itself does, and in which order, is volfs/copy_range.py's; here is what the kernel makes of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import OBJECT, Disk, opened
from faults import Rule, volfs_with_faults, write_rules
from holes import allocated, assert_hides_nothing, data_of, data_of_path, length_of
from mounts import Mount, mounted, wait_until
from services import MIB
from volumes import Storage, assert_same, raises, random_bytes

from volfs.data_ahead import PIECE

SIZE = 3 * OBJECT + 4096
slow = pytest.mark.slow
both_ways = pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rbd": ("rbd", {}),
    "iscsi-512": ("iscsi", {"sector_size": 512}),
    "iscsi-4096": ("iscsi", {"sector_size": 4096}),
    "block": ("block", {}),
    "file": ("file", {}),
}
QUICK = [("rbd", "rbd"), ("file", "rbd")]
PAIRS = [
    pytest.param(
        source, target, id=f"{source}-to-{target}", marks=[] if (source, target) in QUICK else [slow]
    )
    for source in KINDS
    for target in KINDS
    if "iscsi-512" not in (source, target) or {source, target} <= {"iscsi-512", "iscsi-4096"}
]
all_pairs = pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)

MakeDiskOf = Callable[..., Disk]


@pytest.fixture
def make(everything: Mount, module_storage: Storage) -> Iterator[MakeDiskOf]:
    """make(kind, content): a new volume that begins with it. Removed after the test."""
    made: list[Disk] = []

    def one(kind: str, content: bytes = b"", size: int = SIZE) -> Disk:
        driver, options = KINDS[kind]
        disk = Disk(everything, module_storage.make(driver, size, content, **options))
        made.append(disk)
        wait_until(disk.path.exists, f"{disk.path} is listed")
        return disk

    yield one
    for disk in made:
        disk.assert_released()
        disk.stored.remove()


def copy_all(source: int, target: int, count: int, at: int = 0, to: int = 0) -> None:
    done = 0
    while done < count:
        copied = os.copy_file_range(source, target, count - done, at + done, to + done)
        assert copied > 0, f"an end of file {done} bytes after {at}"
        done += copied


def mixed_content() -> bytes:
    """Data at the begin, across an object's end, and alone in the last one; the rest is zeros."""
    content = bytearray(SIZE)
    for offset, length in ((0, 10_000), (OBJECT - 70_001, 140_003), (SIZE - 3, 3)):
        content[offset : offset + length] = random_bytes(length, seed=offset)
    return bytes(content)


def write_mixed(disk: Disk) -> bytes:
    """Only where it has data, so that the rest is holes."""
    content = mixed_content()
    for offset, length in ((0, 10_000), (OBJECT - 70_001, 140_003), (SIZE - 3, 3)):
        disk.stored.write(content[offset : offset + length], offset)
    return content


# ---- bytes -----------------------------------------------------------------------------------------------------


@all_pairs
def test_a_used_target_becomes_the_source_and_holes_stay_holes(
    make: MakeDiskOf, source_kind: str, target_kind: str
) -> None:
    source, target = make(source_kind), make(target_kind, random_bytes(SIZE, seed=1))
    content = write_mixed(source)
    with opened(source.path, os.O_RDONLY) as reader, opened(target.path, os.O_RDWR) as writer:
        assert os.pread(writer, SIZE, 0) != content  # its pages are in the cache
        copy_all(reader, writer, SIZE)
        assert_same(os.pread(writer, SIZE, 0), content, 0, "the same handle")
        assert_hides_nothing(data_of(writer), content)
        if source_kind != "block" and target_kind != "block":
            assert length_of(data_of(writer)) <= 2 * OBJECT + 4096
    assert_same(target.stored.read(), content, 0, "on the storage")
    assert_same(source.stored.read(), content, 0, "the source")
    if source_kind != "block" and target_kind in ("rbd", "file"):
        wait_until(lambda: allocated(target.path) <= 3 * OBJECT, "the hole is given back")


@slow
@both_ways
@all_pairs
def test_any_part_is_copied_to_any_place(
    make: MakeDiskOf, source_kind: str, target_kind: str, direct: int
) -> None:
    source, target = make(source_kind), make(target_kind, random_bytes(SIZE, seed=2))
    content, model = write_mixed(source), bytearray(random_bytes(SIZE, seed=2))
    with (
        opened(source.path, os.O_RDONLY | direct) as reader,
        opened(target.path, os.O_WRONLY | direct) as writer,
    ):
        for at, to, count in (
            (0, 1, 1),
            (5, 4095, 9999),
            (OBJECT + 1, 13, OBJECT),
            (9000, OBJECT + 511, 2 * OBJECT),
            (SIZE - 100_000, SIZE - 100_000, 100_000),
        ):
            copy_all(reader, writer, count, at, to)
            model[to : to + count] = content[at : at + count]
    assert_same(target.stored.read(), model, 0, "on the storage")


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_within_a_volume_ranges_must_not_overlap(make: MakeDiskOf, kind: str) -> None:
    model = bytearray(random_bytes(SIZE, seed=3))
    disk = make(kind, bytes(model))
    with opened(disk.path, os.O_RDWR) as file, opened(disk.path, os.O_RDWR | os.O_DIRECT) as other:
        for reader, writer in ((file, file), (file, other), (other, file)):
            for at, to in ((0, 9_999), (9_999, 0), (5, 5)):
                with raises(errno.EINVAL):
                    os.copy_file_range(reader, writer, 10_000, at, to)
            copy_all(reader, writer, 10_000, 1, 10_001)  # one ends where the other begins
            model[10_001:20_001] = model[1:10_001]
            copy_all(reader, writer, OBJECT, OBJECT + 7, 3)
            model[3 : OBJECT + 3] = model[OBJECT + 7 : 2 * OBJECT + 7]
            assert_same(os.pread(file, SIZE, 0), model, 0, "copied within")
    assert_same(disk.stored.read(), model, 0, "on the storage")


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_ends_where_a_volume_does(make: MakeDiskOf, kind: str) -> None:
    content, model = random_bytes(SIZE, seed=4), bytearray(OBJECT + MIB)
    source, target = make(kind, content), make(kind, size=len(model))
    with opened(source.path, os.O_RDONLY) as reader, opened(target.path, os.O_RDWR) as writer:
        assert os.copy_file_range(reader, writer, MIB, SIZE - 11, 0) == 11
        model[:11] = content[-11:]
        for offset in (SIZE, SIZE + 1, 1 << 40):
            assert os.copy_file_range(reader, writer, MIB, offset, 0) == 0
        assert os.copy_file_range(reader, writer, SIZE, 0, len(model) - 13) == 13
        model[-13:] = content[:13]
        for offset in (len(model), len(model) + 1, 1 << 40):
            with raises(errno.ENOSPC):
                os.copy_file_range(reader, writer, MIB, 0, offset)
        assert os.copy_file_range(reader, writer, 0, 0, 0) == 0
        assert os.fstat(writer).st_size == len(model)
    assert_same(target.stored.read(), model, 0, "on the storage")


@slow
def test_a_copy_wants_handles_that_may_read_and_write_anywhere(make: MakeDiskOf) -> None:
    content, other = random_bytes(SIZE, seed=5), random_bytes(SIZE, seed=6)
    source, target = make("rbd", content), make("file", other)
    for reading, writing in (
        (os.O_WRONLY, os.O_RDWR),
        (os.O_RDONLY, os.O_RDONLY),
        (os.O_RDONLY, os.O_WRONLY | os.O_APPEND),
        (os.O_RDONLY, os.O_RDWR | os.O_APPEND | os.O_DIRECT),
    ):
        with (
            opened(source.path, reading) as reader,
            opened(target.path, writing) as writer,
            raises(errno.EBADF),
        ):
            os.copy_file_range(reader, writer, 4096, 0, 0)
    assert (source.stored.read(), target.stored.read()) == (content, other)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_skipped_after_o_trunc_is_zero_and_what_is_not_reached_stays(
    make: MakeDiskOf, kind: str
) -> None:
    content, model = random_bytes(SIZE, seed=7), bytearray(random_bytes(SIZE, seed=8))
    source, target = make("file", content), make(kind, bytes(model))
    with (
        opened(source.path, os.O_RDONLY) as reader,
        opened(target.path, os.O_WRONLY | os.O_TRUNC) as writer,
    ):
        copy_all(reader, writer, 10_000, 0, OBJECT)
        copy_all(reader, writer, 10_000, 0, 2 * OBJECT)
        os.pwrite(writer, b"last", 2 * OBJECT + 20_000)
    model[: 2 * OBJECT + 20_004] = bytes(2 * OBJECT + 20_000) + b"last"
    model[OBJECT : OBJECT + 10_000] = model[2 * OBJECT : 2 * OBJECT + 10_000] = content[:10_000]
    assert_same(target.stored.read(), model, 0, "on the storage")


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_mappings_hold_unwritten_is_copied_or_replaced(make: MakeDiskOf, kind: str) -> None:
    """And both mappings see the copy at once."""
    content = bytearray(random_bytes(SIZE, seed=9))
    source, target = make(kind, bytes(content)), make(kind, random_bytes(SIZE, seed=10))
    with (
        opened(source.path, os.O_RDWR) as reader,
        opened(target.path, os.O_RDWR) as writer,
        mmap.mmap(reader, SIZE) as read_from,
        mmap.mmap(writer, SIZE) as written_to,
    ):
        for offset in (0, OBJECT - 2, 2 * OBJECT + 5000):
            read_from[offset : offset + 4] = content[offset : offset + 4] = b"mine"
            written_to[offset + 100 : offset + 104] = b"gone"
        copy_all(reader, writer, SIZE)
        assert_same(written_to[:], content, 0, "mapped")
    assert_same(target.stored.read(), content, 0, "on the storage")
    assert_same(source.stored.read(), content, 0, "the source")


def test_a_copy_moves_the_mtime_of_its_target_alone(make: MakeDiskOf) -> None:
    source, target = make("file", random_bytes(SIZE, seed=11)), make("rbd")
    with opened(source.path, os.O_RDONLY) as reader, opened(target.path, os.O_RDWR) as writer:
        before = [os.fstat(file).st_mtime_ns for file in (reader, writer)]
        copy_all(reader, writer, 4096)
        after = [os.fstat(file).st_mtime_ns for file in (reader, writer)]
        assert after[0] == before[0]
        assert after[1] > before[1]
    assert target.path.stat().st_mtime_ns == after[1]


# ---- errors and signals ----------------------------------------------------------------------------------------

LARGE = 64 * 1024 * MIB  # without holes, as far as its backend tells: minutes to copy


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A mounted directory with the files `a`, `b`, and the file of rules that make their backend fail."""
    volumes, rules, config = tmp_path / "volumes", tmp_path / "rules", tmp_path / "volfs.toml"
    volumes.mkdir()
    for seed, name in enumerate(("a", "b")):
        (volumes / name).write_bytes(random_bytes(8 * MIB, seed))
    for name in ("large", "larger"):
        with (volumes / name).open("xb") as file:
            file.truncate(LARGE)
    write_rules(rules)
    config.write_text(f"[backends.faulty]\ndriver = 'faulty-file'\npath = '{volumes}'\nfaults = '{rules}'")
    with mounted(tmp_path / "m", [], ("--config", str(config)), volfs=volfs_with_faults()) as mount:
        yield mount.path / "faulty", rules


@pytest.mark.parametrize("operation", ["pread", "pwrite"])
def test_an_error_shows_when_all_before_it_is_copied(faulty: tuple[Path, Path], operation: str) -> None:
    """As with write(2): how much was done first, then the error itself; and what is cached is what is there."""
    directory, rules = faulty
    content, old = random_bytes(8 * MIB, 0), random_bytes(8 * MIB, 1)
    bad = 5 * MIB + 17
    with (
        opened(directory / "a", os.O_RDONLY) as source,
        opened(directory / "b", os.O_RDWR) as target,
        opened(directory / "b", os.O_RDONLY | os.O_DIRECT) as uncached,
    ):
        assert os.pread(target, 8 * MIB, 0) == old
        try:
            write_rules(rules, Rule(operation, errno.EREMOTEIO, offset=bad))
            copied = os.copy_file_range(source, target, 8 * MIB, 0, 0)
            assert copied == bad // PIECE * PIECE
            with raises(errno.EREMOTEIO):
                os.copy_file_range(source, target, 8 * MIB, copied, copied)
        finally:
            write_rules(rules)
        assert os.pread(target, copied, 0) == content[:copied]
        assert_same(os.pread(target, 8 * MIB, 0), os.pread(uncached, 8 * MIB, 0), 0, "cached")
        copy_all(source, target, 8 * MIB - copied, copied, copied)
        assert_same(os.pread(target, 8 * MIB, 0), content, 0, "when it works again")


@pytest.mark.slow
def test_a_copy_to_a_synchronous_handle_is_flushed(faulty: tuple[Path, Path]) -> None:
    directory, rules = faulty
    with (
        opened(directory / "a", os.O_RDONLY) as source,
        opened(directory / "b", os.O_WRONLY | os.O_SYNC) as target,
    ):
        try:
            write_rules(rules, Rule("flush", errno.EIO))
            with raises(errno.EIO):
                os.copy_file_range(source, target, 4096, 0, 0)
        finally:
            write_rules(rules)
        assert os.copy_file_range(source, target, 4096, 0, 0) == 4096


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_cp_of_a_large_volume_soon(
    faulty: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    directory, _ = faulty
    command = ["cp", "--sparse=never", directory / "large", directory / "larger"]
    with subprocess.Popen(command) as cp:
        try:
            target = tmp_path / "volumes" / "larger"
            wait_until(lambda: allocated(target) > 16 * MIB, "the copy is under way")
            cp.send_signal(number)
            begun = time.monotonic()
            assert cp.wait(30) == -number
            assert time.monotonic() - begun < 2
        finally:
            cp.kill()
    size = allocated(target)
    assert (directory / "a").read_bytes() == random_bytes(8 * MIB, 0), "the mount lives on"
    assert allocated(target) == size < LARGE, "nothing goes on behind it"


# ---- cp --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cp_has_the_daemon_copy_a_full_volume(make: MakeDiskOf) -> None:
    """Coreutils 9 asks for copy_file_range of its own accord; and the target is stable when it ends."""
    content = random_bytes(SIZE, seed=12)
    source, target = make("file", content), make("rbd")
    with subprocess.Popen(["cp", source.path, target.path]) as cp:
        os.waitid(os.P_PID, cp.pid, os.WEXITED | os.WNOWAIT)
        calls = Path(f"/proc/{cp.pid}/io").read_text().splitlines()
        assert cp.wait() == 0
    written = int(dict(line.split(": ") for line in calls)["syscw"])
    assert written <= 2, f"{written} writes or copies, of no more than {SIZE // MIB} MiB"
    assert_same(target.stored.read(), content, 0, "on the storage")
    assert data_of_path(target.path) == [(0, SIZE)]
