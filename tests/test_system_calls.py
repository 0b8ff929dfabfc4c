"""What programs do with the descriptor of a volume's file, call by call, through the kernel.

test_mount.py has what tools need of them: plain reads and writes, truncation, both ends of sizes, mappings of
buffered handles, times, owners and names that are not there yet.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from disks import OBJECT, SIZE, Disk, MakeDisk, disk_maker, opened, run, succeed
from faults import Rule, volfs_with_faults, write_rules
from mounts import mounted
from services import MIB
from volumes import Storage, assert_same, raises, random_bytes, variants

slow = pytest.mark.slow
both_ways = pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])

# The contract suite tells sectors of 512 and 4096 bytes apart; here the larger ones are the harder case.
DRIVERS = variants(quick=("rbd",), only=("rbd", "iscsi-4096", "block", "file"))


make_disk = disk_maker(DRIVERS)


@pytest.fixture(scope="module")
def other_disk(make_disk: MakeDisk) -> Disk:
    return make_disk()


libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Any) -> None:
    """A function of libc that Python does not offer, or hides behind others; numbers are passed as 64 bits."""
    numbers = [ctypes.c_long(it) if isinstance(it, int) else it for it in arguments]
    if getattr(libc, function)(*numbers) == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def python(code: str, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Another process, which has only the standard library."""
    return run(sys.executable, "-I", "-S", "-c", code, *map(str, arguments), **more)


# ---- open() of Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["r+b", *(pytest.param(it, marks=slow) for it in ["r", "rb", "r+", "w", "wb", "w+", "w+b"])]
)
def test_open_reads_and_writes_in_every_mode(disk: Disk, mode: str) -> None:
    model = bytearray(disk.fill(1))
    text = {} if "b" in mode else {"encoding": "latin-1", "newline": ""}

    def data_of(read: Any) -> bytes:
        return read if isinstance(read, bytes) else str(read).encode("latin-1")

    for buffering in [-1, 0, 777] if "b" in mode else [-1, 1]:
        with open(disk.path, mode, buffering, **text) as file:  # type: ignore[call-overload]
            if file.readable():
                assert data_of(file.read()) == model
                assert data_of(file.read(1)) == b""
            if file.writable():
                if "w" in mode:  # a program that truncates takes what it skips for zeros
                    model[: OBJECT - 3] = bytes(OBJECT - 3)
                for offset in (OBJECT - 3, 0):
                    model[offset : offset + 7] = new = random_bytes(7, seed=offset + buffering)
                    file.seek(offset)
                    file.write(new if "b" in mode else new.decode("latin-1"))
            if file.readable():
                file.seek(OBJECT - 3)
                assert data_of(file.read(7)) == model[OBJECT - 3 :][:7]
            file.seek(0, os.SEEK_END)
            assert file.tell() == SIZE
        assert disk.stored.read() == model


@slow
@pytest.mark.parametrize("mode", ["a", "ab", "a+", "a+b"])
def test_appending_is_enospc_since_no_volume_grows(disk: Disk, mode: str) -> None:
    content = disk.fill(2)
    for buffering in [-1, 0] if "b" in mode else [-1]:

        def append(buffering: int = buffering) -> None:
            with open(disk.path, mode, buffering, encoding=None if "b" in mode else "latin-1") as file:
                if file.readable():
                    file.seek(SIZE - 1)
                    assert len(file.read()) == 1
                file.write(b"x" if "b" in mode else "x")

        with raises(errno.ENOSPC):
            append()
    for direct in (0, os.O_DIRECT):
        with opened(disk.path, os.O_WRONLY | os.O_APPEND | direct) as file, raises(errno.ENOSPC):
            os.pwrite(file, b"x", 0)  # Linux appends with pwrite(2), too
    assert disk.stored.read() == content


@slow
@pytest.mark.parametrize("mode", ["x", "xb", "x+"])
def test_exclusive_creation_is_eexist(disk: Disk, mode: str) -> None:
    content = disk.fill(3)
    with raises(errno.EEXIST):
        open(disk.path, mode)  # noqa: SIM115 - it does not open
    assert disk.stored.read() == content


# ---- flags of open(2) ------------------------------------------------------------------------------------------


@slow
def test_flags_that_mean_nothing_to_a_volume_are_harmless(disk: Disk) -> None:
    content = disk.fill(4)
    for flags in (
        os.O_CREAT,
        os.O_NOFOLLOW,
        os.O_NOATIME,
        os.O_NONBLOCK,
        os.O_NOCTTY,
        os.O_LARGEFILE,
        os.O_SYNC,
        os.O_DSYNC,
        os.O_ASYNC,
        os.O_TRUNC,  # with O_RDONLY, which POSIX leaves undefined and Linux truncates by
    ):
        with opened(disk.path, os.O_RDONLY | flags) as file:
            assert os.read(file, SIZE) == content[: os.fstat(file).st_size]
            with raises(errno.EBADF):
                os.pwrite(file, b"x", 0)
        with opened(disk.path, os.O_WRONLY | flags) as file, raises(errno.EBADF):
            os.pread(file, 1, 0)
    assert disk.stored.read() == content


@slow
def test_flags_that_a_volume_cannot_satisfy_are_an_error(disk: Disk) -> None:
    content = disk.fill(5)
    for path, flags, number in (
        (disk.path, os.O_DIRECTORY, errno.ENOTDIR),
        (disk.path, os.O_CREAT | os.O_EXCL, errno.EEXIST),
        (disk.directory, os.O_WRONLY, errno.EISDIR),
        (disk.directory, os.O_TMPFILE | os.O_RDWR, errno.EOPNOTSUPP),
        (disk.mount.path, os.O_TMPFILE | os.O_RDWR, errno.EOPNOTSUPP),
    ):
        with raises(number):
            os.open(path, flags)
    assert disk.stored.read() == content


@slow
def test_a_path_descriptor_opens_nothing_and_can_be_opened(disk: Disk) -> None:
    content = disk.fill(6)
    with opened(disk.path, os.O_PATH) as file:
        assert os.fstat(file).st_size == SIZE
        assert disk.status().open == []
        assert disk.stored.users() == []
        with raises(errno.EBADF):
            os.read(file, 1)
        assert Path(f"/proc/self/fd/{file}").read_bytes() == content


# ---- stable storage --------------------------------------------------------------------------------------------

SYNCHRONOUS = pytest.mark.parametrize(
    ("flags", "of_write"),
    [
        (os.O_DSYNC, 0),
        (os.O_SYNC, 0),
        (os.O_DSYNC | os.O_DIRECT, 0),
        (os.O_SYNC | os.O_DIRECT, 0),
        (0, os.RWF_DSYNC),
        (0, os.RWF_SYNC),
        (os.O_DIRECT, os.RWF_DSYNC),
    ],
    ids=["dsync", "sync", "direct-dsync", "direct-sync", "rwf-dsync", "rwf-sync", "direct-rwf-dsync"],
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A volume's file, and the file of rules that make its backend fail."""
    directory = tmp_path_factory.mktemp("faulty")
    volumes, rules, config = directory / "volumes", directory / "rules", directory / "volfs.toml"
    volumes.mkdir()
    (volumes / "disk").write_bytes(bytes(MIB))
    write_rules(rules)
    config.write_text(f"[backends.faulty]\ndriver = 'faulty-file'\npath = '{volumes}'\nfaults = '{rules}'")
    with mounted(directory / "m", [], ("--config", str(config)), volfs=volfs_with_faults()) as mount:
        yield mount.path / "faulty" / "disk", rules


@SYNCHRONOUS
def test_a_synchronous_write_returns_when_the_backend_has_flushed(
    faulty: tuple[Path, Path], flags: int, of_write: int
) -> None:
    """A write that asked for no flush would not notice that flushing fails."""
    path, rules = faulty
    with opened(path, os.O_RDWR | flags) as file:
        assert os.pwritev(file, [b"stable"], 0, of_write) == 6
        try:
            write_rules(rules, Rule("flush", errno.EIO))
            with raises(errno.EIO):
                os.pwritev(file, [b"failed"], 0, of_write)
        finally:
            write_rules(rules)
        assert os.pwritev(file, [b"stable again"], 0, of_write) == 12


@slow
@both_ways
@pytest.mark.parametrize("driver", ["rbd", "block"])  # whose storage does not show what is not flushed
def test_a_synchronous_write_survives_a_killed_daemon(
    storage: Storage, tmp_path_factory: pytest.TempPathFactory, driver: str, direct: int
) -> None:
    stored = storage.make(driver, 2 * OBJECT)
    model = bytearray(2 * OBJECT)
    with mounted(tmp_path_factory.mktemp("k"), [stored.prefix], env=stored.environment) as mount:
        path = mount.path.joinpath(driver, *stored.place)

        def write(file: int, offset: int, length: int) -> None:
            model[offset : offset + length] = data = random_bytes(length, seed=offset)
            assert os.pwritev(file, [data[:7], data[7:]], offset) == length

        with opened(path, os.O_WRONLY | direct) as file:
            write(file, 0, 4096)
            os.fsync(file)  # before the first of which librbd holds nothing back
        for flags, begin in ((os.O_DSYNC, 4096), (os.O_SYNC, OBJECT - 5000)):
            with opened(path, os.O_WRONLY | direct | flags) as file:
                for offset, length in ((begin, 4096), (begin + 4097, 13), (begin + 8192, MIB + 1)):
                    write(file, offset, length)
                    assert stored.read() == model, f"after the write of {length} bytes at {offset}"
        file = os.open(path, os.O_WRONLY | direct | os.O_DSYNC)
        write(file, OBJECT + 3, 2 * MIB)
        mount.process.kill()
        mount.process.wait()
        with raises(errno.ENOTCONN):
            os.close(file)
        assert stored.read() == model
        stored.evict()


@slow
def test_dd_with_dsync_flushes_each_write(faulty: tuple[Path, Path]) -> None:
    path, rules = faulty
    for flag in ("dsync", "sync", "dsync,direct", "sync,direct"):
        command = ["dd", f"of={path}", "bs=4096", "count=9", "conv=notrunc", f"oflag={flag}"]
        assert run(*command, input=bytes(9 * 4096)).returncode == 0
        try:
            write_rules(rules, Rule("flush", errno.EIO))
            done = run(*command, input=bytes(9 * 4096))
        finally:
            write_rules(rules)
        assert done.returncode == 1
        assert b"error writing" in done.stderr, f"{flag}: {done.stderr.decode()}"


# ---- mappings --------------------------------------------------------------------------------------------------


@slow
def test_a_mapping_of_an_o_direct_descriptor_is_private_or_enodev(disk: Disk) -> None:
    content = disk.fill(7)
    with opened(disk.path, os.O_RDWR | os.O_DIRECT) as file:
        for access in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
            with raises(errno.ENODEV):
                mmap.mmap(file, SIZE, flags=mmap.MAP_SHARED, prot=access)
        with mmap.mmap(file, SIZE, flags=mmap.MAP_PRIVATE) as mapping:
            assert mapping[:] == content
            mapping[:4] = b"mine"
    assert disk.stored.read() == content


@slow
def test_msync_alone_makes_stable_and_outlives_the_descriptor(disk: Disk) -> None:
    content = bytearray(disk.fill(8))
    with opened(disk.path, os.O_RDWR) as file:
        mapping = mmap.mmap(file, SIZE)
    with mapping:
        for offset in (0, OBJECT - 3, SIZE - 6):
            mapping[offset : offset + 6] = content[offset : offset + 6] = b"mapped"
            mapping.flush()
            assert disk.stored.read() == content
        mapping.madvise(mmap.MADV_DONTNEED)
        assert mapping[:] == content
        assert disk.status().open[0].handles == 1


@slow
def test_a_mapping_sees_what_is_written_by_any_handle(disk: Disk) -> None:
    content = bytearray(disk.fill(9))
    with (
        opened(disk.path, os.O_RDWR) as buffered,
        opened(disk.path, os.O_RDWR | os.O_DIRECT) as direct,
        mmap.mmap(buffered, SIZE) as shared,
        mmap.mmap(buffered, SIZE, flags=mmap.MAP_PRIVATE) as private,
    ):
        for number, writer in enumerate((buffered, direct, buffered, direct)):
            offset = number * 5000 + 100
            assert shared[offset : offset + 5] == private[offset : offset + 5] == content[offset : offset + 5]
            content[offset : offset + 5] = b"other"
            os.pwrite(writer, b"other", offset)
            assert shared[:30000] == private[:30000] == content[:30000]
        shared[20:24] = content[20:24] = b"mine"
        assert os.pread(direct, 30000, 0) == content[:30000]  # the kernel writes dirty pages back first
        assert private[:30000] == content[:30000]
    assert disk.stored.read() == content


# ---- copies in the kernel --------------------------------------------------------------------------------------

RANGES = [(0, 0, 1), (1, 4095, 4099), (OBJECT - 70_001, 13, 140_003), (5, OBJECT - 2 * MIB, 3 * MIB + 1)]
Move = Callable[[int, int, int, int, int], int]  # as os.copy_file_range: source, target, count, their offsets


def by_sendfile(source: int, target: int, count: int, at: int, to: int) -> int:
    os.lseek(target, to, os.SEEK_SET)
    return os.sendfile(target, source, at, count)


def by_splice(source: int, target: int, count: int, at: int, to: int) -> int:
    reader, writer = os.pipe()
    try:
        filled = os.splice(source, writer, count, offset_src=at)
        for moved in range(0, filled, 30_001):  # in pieces, so that buffers of the pipe are split
            piece = min(30_001, filled - moved)
            assert os.splice(reader, target, piece, offset_dst=to + moved) == piece
        return filled
    finally:
        os.close(reader)
        os.close(writer)


MOVES = {"sendfile": by_sendfile, "splice": by_splice, "copy_file_range": os.copy_file_range}


def move_all(move: Move, source: int, target: int, count: int, at: int, to: int) -> None:
    done = 0
    while done < count:
        moved = move(source, target, count - done, at + done, to + done)
        assert moved > 0, f"an end of file {done} bytes after {at}"
        done += moved


@pytest.fixture
def local(tmp_path: Path) -> Iterator[IO[bytes]]:
    """A file of another file system, as long as a volume."""
    path = tmp_path / "local"
    path.write_bytes(random_bytes(SIZE, seed=99))
    with path.open("r+b", buffering=0) as file:
        yield file


@slow
@both_ways
@pytest.mark.parametrize("move", MOVES)
def test_the_kernel_copies_from_volume_to_volume(
    disk: Disk, other_disk: Disk, move: str, direct: int
) -> None:
    content, model = disk.fill(10), bytearray(other_disk.fill(11))
    with (
        opened(disk.path, os.O_RDONLY | direct) as source,
        opened(other_disk.path, os.O_WRONLY | direct) as target,
    ):
        for at, to, count in RANGES:
            move_all(MOVES[move], source, target, count, at, to)
            model[to : to + count] = content[at : at + count]
    assert other_disk.stored.read() == model
    assert disk.stored.read() == content


@slow
@both_ways
@pytest.mark.parametrize("move", ["sendfile", "splice"])
def test_the_kernel_copies_between_a_volume_and_a_file(
    disk: Disk, local: IO[bytes], move: str, direct: int
) -> None:
    model, copy = bytearray(disk.fill(12)), bytearray(local.read())
    with opened(disk.path, os.O_RDWR | direct) as volume:
        for at, to, count in RANGES:
            move_all(MOVES[move], local.fileno(), volume, count, at, to)
            model[to : to + count] = copy[at : at + count]
            move_all(MOVES[move], volume, local.fileno(), count, to, at + 1)
            copy[at + 1 : at + 1 + count] = model[to : to + count]
        assert os.pread(local.fileno(), SIZE, 0) == copy
        assert MOVES[move](volume, local.fileno(), 100, SIZE, 0) == 0  # the end
    assert disk.stored.read() == model


@slow
def test_copy_file_range_between_a_volume_and_a_file_is_exdev(disk: Disk, local: IO[bytes]) -> None:
    """Which cp and shutil take as a reason to read and write."""
    content, copy = disk.fill(13), local.read()
    with opened(disk.path, os.O_RDWR) as volume:
        for source, target in ((volume, local.fileno()), (local.fileno(), volume)):
            with raises(errno.EXDEV):
                os.copy_file_range(source, target, 4096, 0, 0)
    assert disk.stored.read() == content
    assert os.pread(local.fileno(), SIZE, 0) == copy


@slow
@both_ways
def test_copy_file_range_within_a_volume_and_at_its_ends(disk: Disk, direct: int) -> None:
    model = bytearray(disk.fill(14))
    with opened(disk.path, os.O_RDWR | direct) as file:
        move_all(os.copy_file_range, file, file, 100_000, 1, 200_000)
        model[200_000:300_000] = model[1:100_001]
        with raises(errno.EINVAL):
            os.copy_file_range(file, file, 100_000, 0, 50_000)  # ranges that overlap
        assert os.copy_file_range(file, file, 100_000, SIZE - 11, 0) == 11
        model[:11] = model[-11:]
        assert os.copy_file_range(file, file, 100_000, SIZE, 0) == 0
        assert os.copy_file_range(file, file, 100_000, 0, SIZE - 13) == 13
        model[-13:] = model[:13]
        with raises(errno.ENOSPC):
            os.copy_file_range(file, file, 100_000, 0, SIZE)
    assert disk.stored.read() == model


@slow
@both_ways
def test_sendfile_to_a_socket_sends_all_of_a_volume(disk: Disk, direct: int) -> None:
    content = disk.fill(15)
    ours, theirs = socket.socketpair()
    with ours, theirs, open(disk.path, "rb", opener=lambda *how: os.open(how[0], how[1] | direct)) as file:
        reader = subprocess.Popen(["sha256sum"], stdin=theirs, stdout=subprocess.PIPE)
        theirs.close()
        assert ours.sendfile(file) == SIZE
        ours.shutdown(socket.SHUT_WR)
        expected = run("sha256sum", input=content).stdout
        assert reader.communicate(timeout=60)[0] == expected


@slow
def test_a_reflink_is_refused_and_not_half_done(disk: Disk, other_disk: Disk, local: IO[bytes]) -> None:
    content, other = disk.fill(16), other_disk.fill(17)
    clone, clone_range, deduplicate = 0x40049409, 0x4020940D, 0xC0189436
    with opened(disk.path, os.O_RDWR) as file, opened(other_disk.path, os.O_RDWR) as source:
        with raises(errno.EOPNOTSUPP):
            fcntl.ioctl(file, clone, source)
        with raises(errno.EXDEV):
            fcntl.ioctl(file, clone, local.fileno())
        with raises(errno.EOPNOTSUPP):
            fcntl.ioctl(file, clone_range, struct.pack("qQQQ", source, 0, 4096, 0))
        with raises(errno.EOPNOTSUPP):
            one_range = struct.pack("QQHHIqQQiI", 0, 4096, 1, 0, 0, source, 0, 0, 0, 0)
            fcntl.ioctl(file, deduplicate, bytearray(one_range))
    assert run("cp", "--reflink=always", other_disk.path, disk.path).returncode == 1
    assert disk.stored.read() == content
    assert run("cp", "--reflink=auto", other_disk.path, disk.path).returncode == 0
    assert disk.stored.read() == other


# ---- vectors ---------------------------------------------------------------------------------------------------

VECTORS: Sequence[Sequence[int]] = (
    (1,),
    (0, 1, 0),
    (511, 1, 512, 4097),
    (4096, 4096, 4096),
    (3, MIB + 5, 0, 70_001),
    tuple(range(1024)),  # as many as there may be
)


@slow
@both_ways
def test_vectors_of_any_shape_are_written_and_read(disk: Disk, direct: int) -> None:
    model = bytearray(disk.fill(18))
    with opened(disk.path, os.O_RDWR | direct) as file:
        for number, lengths in enumerate(VECTORS):
            offset = OBJECT - MIB // 2 - number
            pieces = [random_bytes(length, seed=number) for length in lengths]
            total = sum(lengths)
            model[offset : offset + total] = b"".join(pieces)
            assert os.pwritev(file, pieces, offset) == total
            buffers = [bytearray(length) for length in reversed(lengths)]
            assert os.preadv(file, buffers, offset) == total
            assert b"".join(buffers) == model[offset : offset + total]
            os.lseek(file, offset, os.SEEK_SET)
            assert os.writev(file, pieces) == total
            assert os.lseek(file, 0, os.SEEK_CUR) == offset + total
        buffers = [bytearray(1000), bytearray(5000), bytearray(1)]
        assert os.preadv(file, buffers, SIZE - 1700) == 1700
        assert b"".join(buffers)[:1700] == model[-1700:]
        assert os.pwritev(file, [b"a" * 1000, b"b" * 5000], SIZE - 1700) == 1700
        model[-1700:] = b"a" * 1000 + b"b" * 700
        assert os.preadv(file, buffers, SIZE) == 0
        with raises(errno.ENOSPC):
            os.pwritev(file, [b"a", b"b"], SIZE)
    assert disk.stored.read() == model


@slow
@both_ways
def test_flags_of_single_reads_and_writes(disk: Disk, direct: int) -> None:
    model = bytearray(disk.fill(19))
    with opened(disk.path, os.O_RDWR | direct) as file:
        for number, flag in enumerate((os.RWF_HIPRI, os.RWF_SYNC, os.RWF_DSYNC)):
            model[number * 3000 :][:5] = model[number * 3000 : number * 3000 + 5] = b"flags"
            assert os.pwritev(file, [b"flags"], number * 3000, flag) == 5
            buffer = bytearray(100)
            assert os.preadv(file, [buffer], number * 3000, flag) == 100
            assert buffer == model[number * 3000 :][:100]
        with raises(errno.EOPNOTSUPP):
            os.pwritev(file, [b"x"], 0, os.RWF_NOWAIT)
        with raises(errno.ENOSPC):
            os.pwritev(file, [b"x"], 0, os.RWF_APPEND)
    assert disk.stored.read() == model


# ---- advice ----------------------------------------------------------------------------------------------------

ADVICE = ("NORMAL", "SEQUENTIAL", "RANDOM", "NOREUSE", "WILLNEED", "DONTNEED")


@slow
@both_ways
def test_advice_is_harmless(disk: Disk, direct: int) -> None:
    model = bytearray(disk.fill(20))
    with opened(disk.path, os.O_RDWR | direct) as file:
        for number, advice in enumerate(ADVICE):
            for begin, length in ((0, 0), (4095, 2), (SIZE - 1, 1), (SIZE + 5, 100), (1, 1 << 40)):
                os.posix_fadvise(file, begin, length, getattr(os, f"POSIX_FADV_{advice}"))
            model[number : number + 1] = bytes([number])
            os.pwrite(file, bytes([number]), number)
            assert os.pread(file, SIZE, 0) == model
        call("readahead", file, 100, 2 * SIZE)
        call("sync_file_range", file, 0, 0, 7)  # wait, write, wait: all that there is
        call("syncfs", file)
        os.sync()
        assert os.pread(file, SIZE, 0) == model
    assert disk.stored.read() == model


# ---- allocation ------------------------------------------------------------------------------------------------


def test_the_fallocate_tool_zeroes_what_it_is_told_and_refuses_the_rest(disk: Disk) -> None:
    """The calls themselves are in test_holes.py."""
    content = bytearray(disk.fill(22))
    content[MIB : MIB + 70_000] = bytes(70_000)
    disk.stored.write(bytes(content))
    for option, begin, length in (
        ("--punch-hole", 1, 4096),
        ("--zero-range", OBJECT - 5, 10_000),
        ("--keep-size", 0, SIZE),
    ):
        succeed("fallocate", option, f"--offset={begin}", f"--length={length}", disk.path)
        if option != "--keep-size":
            content[begin : begin + length] = bytes(length)
        assert_same(disk.stored.read(), content, 0, option)
    succeed("fallocate", "--dig-holes", disk.path)  # of the zeros that it reads
    for option in ("--collapse-range", "--insert-range"):
        assert run("fallocate", option, "--offset=0", "--length=4096", disk.path).returncode == 1
    assert disk.path.stat().st_size == SIZE
    assert_same(disk.stored.read(), content, 0, "at last")


@slow
@both_ways
def test_posix_fallocate_keeps_every_byte(disk: Disk, direct: int) -> None:
    """There is nothing to allocate. (Where a file system cannot, glibc writes zeros where it reads some.)"""
    content = bytearray(disk.fill(23))
    for block in range(0, 20):
        content[block * 4096 - (block & 1)] = 0
    disk.stored.write(bytes(content))
    with opened(disk.path, os.O_RDWR | direct) as file:
        for offset, length in ((0, 80_000), (1, 1), (8191, 2), (SIZE - 10_000, 10_000)):
            os.posix_fallocate(file, offset, length)
        for offset in (SIZE - 10_000, SIZE):
            with raises(errno.ENOSPC):
                os.posix_fallocate(file, offset, 20_000)
        assert os.fstat(file).st_size == SIZE
    with opened(disk.path, os.O_RDONLY) as file, raises(errno.EBADF):
        os.posix_fallocate(file, 0, 4096)
    assert disk.stored.read() == content


# ---- positions -------------------------------------------------------------------------------------------------


@slow
@both_ways
def test_lseek_finds_the_end_and_data_everywhere(disk: Disk, direct: int) -> None:
    content = disk.fill(24)
    with opened(disk.path, os.O_RDONLY | direct) as file:
        assert os.lseek(file, -100, os.SEEK_END) == SIZE - 100
        assert os.read(file, 1000) == content[-100:]
        assert os.lseek(file, -150, os.SEEK_CUR) == SIZE - 150
        assert os.read(file, 20) == content[-150:-130]
        assert os.lseek(file, OBJECT - 5, os.SEEK_SET) == OBJECT - 5
        assert os.read(file, 10) == content[OBJECT - 5 : OBJECT + 5]
        assert os.lseek(file, 7, os.SEEK_END) == SIZE + 7  # as with any file
        assert os.read(file, 1) == b""
        for offset in (0, 1, OBJECT, SIZE - 1):
            assert os.lseek(file, offset, os.SEEK_DATA) == offset
            assert os.lseek(file, offset, os.SEEK_HOLE) == SIZE
        for offset in (SIZE, SIZE + 1, 1 << 50):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with raises(errno.ENXIO):
                    os.lseek(file, offset, whence)
        for offset, whence in ((-1, os.SEEK_SET), (-SIZE - 1, os.SEEK_END)):
            with raises(errno.EINVAL):
                os.lseek(file, offset, whence)


@slow
@both_ways
def test_descriptors_that_are_duplicated_and_inherited_share_their_position(disk: Disk, direct: int) -> None:
    model = bytearray(disk.fill(25))
    with opened(disk.path, os.O_RDWR | direct) as file:
        assert os.read(file, 10) == model[:10]
        duplicate = os.dup(file)
        assert os.read(duplicate, 10) == model[10:20]
        child = (
            "import os, sys; file = int(sys.argv[1]); os.write(file, b'child'); print(os.read(file, 5).hex())"
        )
        done = python(child, str(file), pass_fds=[file])
        model[20:25] = b"child"
        assert bytes.fromhex(done.stdout.decode()) == model[25:30]
        assert disk.stored.read() == model  # each close(2) flushes, not only the last one
        assert os.lseek(file, 0, os.SEEK_CUR) == 30
        (volume,) = disk.status().open
        assert volume.handles == 1
        os.write(duplicate, b"twin")
        os.close(duplicate)
        model[30:34] = b"twin"
        assert disk.stored.read() == model
        assert os.read(file, 10) == model[34:44]


# ---- ioctl, locks, events --------------------------------------------------------------------------------------

IOCTLS = {
    "BLKGETSIZE64": (0x80081272, 8, errno.ENOTTY),
    "BLKSSZGET": (0x1268, 4, errno.ENOTTY),
    "BLKDISCARD": (0x1277, 16, errno.ENOTTY),
    "BLKZEROOUT": (0x127F, 16, errno.ENOTTY),
    "HDIO_GETGEO": (0x0301, 24, errno.ENOTTY),
    "SG_IO": (0x2285, 88, errno.ENOTTY),
    "FS_IOC_GETFLAGS": (0x80086601, 8, errno.ENOTTY),
    "FS_IOC_SETFLAGS": (0x40086602, 8, errno.ENOTTY),
    "FS_IOC_FSGETXATTR": (0x801C581F, 28, errno.ENOTTY),
    "FS_IOC_FIEMAP": (0xC020660B, 32, errno.EOPNOTSUPP),
    "FITRIM": (0xC0185879, 24, errno.ENOTTY),
}


@slow
def test_an_ioctl_is_refused_as_by_any_file_that_does_not_know_it(disk: Disk) -> None:
    """BLKGETSIZE64 must not succeed: tools would take the file for a device."""
    content = disk.fill(26)
    with opened(disk.path, os.O_RDWR) as file:
        for request, length, number in IOCTLS.values():
            with raises(number):
                fcntl.ioctl(file, request, bytearray(length))
    for command in (["blockdev", "--getsize64"], ["blkdiscard", "-f"], ["lsattr"]):
        assert run(*command, disk.path).returncode != 0
    assert disk.stored.read() == content


@slow
def test_record_locks_work_between_processes(disk: Disk) -> None:
    code = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
for begin in (0, 100):
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 50, begin)
        print("locked")
    except BlockingIOError:
        print("refused")
"""
    with disk.path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 50, 0)
        assert python(code, disk.path).stdout.split() == [b"refused", b"locked"]
        fcntl.lockf(file, fcntl.LOCK_UN, 50, 0)
        open_file_description_lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 50, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, open_file_description_lock)
        assert python(code, disk.path).stdout.split() == [b"locked", b"refused"]
    assert python(code, disk.path).stdout.split() == [b"locked", b"locked"]


@slow
def test_inotify_tells_of_what_happens_on_this_mount_and_holds_nothing(disk: Disk) -> None:
    everything, modify, close_write = 0xFFF, 0x2, 0x8
    watcher = libc.inotify_init1(os.O_NONBLOCK)
    assert watcher >= 0
    try:
        for path in (disk.path, disk.directory):
            call("inotify_add_watch", watcher, os.fsencode(path), everything)
        assert disk.status().open == []
        assert disk.stored.users() == []
        with disk.path.open("r+b", buffering=0) as file:
            file.write(b"event")
        seen, events = 0, b""
        while select.select([watcher], [], [], 0)[0]:
            events += os.read(watcher, 65536)
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            seen |= mask
            events = events[16 + length :]
        assert seen & modify
        assert seen & close_write
    finally:
        os.close(watcher)


# ---- over a volume ---------------------------------------------------------------------------------------------


@slow
def test_nothing_takes_the_place_of_a_volume(disk: Disk, other_disk: Disk, tmp_path: Path) -> None:
    content, other = disk.fill(27), other_disk.fill(28)
    (tmp_path / "file").write_bytes(b"other")
    paths = [os.fsencode(disk.path), os.fsencode(other_disk.path)]
    here, no_replace, exchange = -100, 1, 2
    attempts: list[tuple[int, Callable[[], object]]] = [
        (errno.EXDEV, lambda: os.rename(tmp_path / "file", disk.path)),
        (errno.EXDEV, lambda: os.rename(disk.path, tmp_path / "new")),
        (errno.EPERM, lambda: os.rename(other_disk.path, disk.path)),
        (errno.EXDEV, lambda: os.link(disk.path, tmp_path / "new")),
        (errno.EEXIST, lambda: os.link(other_disk.path, disk.path)),
        (errno.EEXIST, lambda: os.symlink("x", disk.path)),
        (errno.EEXIST, lambda: os.mkdir(disk.path)),
        (errno.EEXIST, lambda: os.mkfifo(disk.path)),
        (errno.EPERM, lambda: os.mknod(disk.path.with_name("n"), 0o20600, os.makedev(1, 3))),
        (errno.EPERM, lambda: call("renameat2", here, paths[0], here, paths[1], exchange)),
        (errno.EEXIST, lambda: call("renameat2", here, paths[0], here, paths[1], no_replace)),
        (errno.ENOTDIR, lambda: os.rmdir(disk.path)),
    ]
    for number, attempt in attempts:
        with raises(number):
            attempt()
    assert disk.stored.read() == content
    assert other_disk.stored.read() == other
    assert (tmp_path / "file").read_bytes() == b"other"
    assert not (tmp_path / "new").exists()


@slow
@pytest.mark.parametrize(
    "command",
    [
        ("mv", "-f", "{file}", "{volume}"),
        ("mv", "-f", "{volume}", "{file}.new"),
        ("install", "{file}", "{volume}"),
        ("cp", "--remove-destination", "{file}", "{volume}"),
        ("ln", "-f", "{file}", "{volume}"),
        ("ln", "-sf", "{file}", "{volume}"),
        ("sed", "-i", "s/a/b/", "{volume}"),
        ("rm", "-f", "{volume}"),
        ("rm", "-rf", "{directory}"),
        ("unlink", "{volume}"),
    ],
    ids=" ".join,
)
def test_tools_that_replace_or_remove_files_fail_and_leave_the_volume(
    disk: Disk, tmp_path: Path, command: Sequence[str]
) -> None:
    content = disk.fill(29)
    file = tmp_path / "file"
    file.write_bytes(b"other")
    names = {"file": file, "volume": disk.path, "directory": disk.directory}
    done = run(*(argument.format(**names) for argument in command))
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert disk.stored.read() == content
    assert file.read_bytes() == b"other"


@slow
def test_directories_stay_as_they_are(disk: Disk) -> None:
    for directory in (disk.mount.path, disk.mount.path / "attached", disk.directory):
        for attempt in (
            lambda path: os.mkdir(path / "new"),
            lambda path: (path / "new").open("xb"),
            lambda path: os.symlink("x", path / "new"),
            lambda path: os.chmod(path, 0o777),
            lambda path: os.chown(path, os.getuid() + 1, -1),
            lambda path: os.utime(path),
            lambda path: os.setxattr(path, "user.x", b"x"),
        ):
            with raises(errno.EPERM):
                attempt(directory)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
    with raises(errno.EPERM):
        os.rmdir(disk.mount.path / "attached")
    with raises(errno.EPERM):
        os.rename(disk.directory, disk.mount.path / "new")
    assert "new" not in os.listdir(disk.mount.path)


@slow
def test_access_and_statx_tell_what_stat_tells(disk: Disk) -> None:
    disk.fill(30)
    assert os.access(disk.path, os.F_OK | os.R_OK | os.W_OK)
    assert not os.access(disk.path, os.X_OK)
    assert os.access(disk.directory, os.R_OK | os.X_OK)
    for caching in ("always", "default", "never"):
        shown = run("stat", f"--cached={caching}", "--format=%s %F %a %h %i %o %w", disk.path).stdout.decode()
        found = disk.path.stat()
        expected = f"{SIZE} regular file 600 1 {found.st_ino} {found.st_blksize} -"
        assert shown.strip() == expected
    with opened(disk.path, os.O_RDWR) as file:
        assert os.fstat(file).st_size == os.stat(file).st_size == SIZE
        assert os.fstat(file).st_ino == disk.path.stat().st_ino
