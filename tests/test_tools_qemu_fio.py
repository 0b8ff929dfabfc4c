"""QEMU's tools and fio on volume files: formats, caching modes, asynchronous I/O, and serving a volume over NBD.

What they wrote is compared with what the storage itself has, past volfs.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from disks import Disk, MakeDisk, disk_maker, run, succeed
from mounts import wait_until
from services import MIB
from volumes import random_bytes, sha256, variants

pytestmark = pytest.mark.slow

SIZE = 8 * MIB
HOLE = bytes(2 * MIB)


make_disk = disk_maker(variants(only=("rbd", "iscsi-512")))


# Where sectors of another size may make a difference.
with_large_sectors = pytest.mark.parametrize(
    "make_disk", variants(only=("rbd", "iscsi-512", "iscsi-4096")), indirect=True
)


@pytest.fixture(scope="module")
def shared_disk(make_disk: MakeDisk) -> Disk:
    return make_disk(SIZE)


def some_bytes(seed: int) -> bytes:
    """Data with a hole in the middle, as long as a volume."""
    content = random_bytes(SIZE - len(HOLE), seed)
    return content[: 3 * MIB] + HOLE + content[3 * MIB :]


def raw_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "raw"
    path.write_bytes(content)
    return path


def qcow2_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "qcow2"
    succeed("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw_file(tmp_path, content), path)
    assert path.stat().st_size < SIZE - MIB, "the hole is not in the file"
    return path


# ---- qemu-img --------------------------------------------------------------------------------------------------


def test_qemu_img_info_and_map_tell_of_the_whole_volume(disk: Disk) -> None:
    disk.fill(1)
    told = json.loads(succeed("qemu-img", "info", "--output=json", disk.path))
    assert (told["format"], told["virtual-size"]) == ("raw", SIZE)
    extents = json.loads(succeed("qemu-img", "map", "--output=json", "-f", "raw", disk.path))
    assert [(it["start"], it["length"], it["data"], it["zero"]) for it in extents] == [(0, SIZE, True, False)]


CONVERSIONS = (
    (),
    ("-t", "none", "-T", "none", "-W", "-m", "16"),
    ("-t", "directsync"),
    ("-t", "unsafe"),
    ("-S", "0"),
)


@pytest.mark.parametrize("options", CONVERSIONS, ids=" ".join)
def test_qemu_img_convert_replaces_all_of_a_used_volume(
    disk: Disk, tmp_path: Path, options: Sequence[str]
) -> None:
    """With -n, from a sparse image: zeros of it have to be written over what was there."""
    content = some_bytes(seed=2)
    for source in (qcow2_file(tmp_path, content), tmp_path / "raw"):
        disk.fill(3)
        command = ("qemu-img", "convert", "-n", "-f", source.name, "-O", "raw", *options)
        succeed(*command, source, disk.path)
        assert disk.stored.sha256() == sha256(content)


@pytest.mark.parametrize("options", [(), ("-T", "none", "-W", "-m", "16"), ("-c",)], ids=" ".join)
def test_qemu_img_convert_reads_a_volume(disk: Disk, tmp_path: Path, options: Sequence[str]) -> None:
    content = some_bytes(seed=4)
    disk.stored.write(content)
    for format_ in ("qcow2", "raw", "vmdk"):
        copy = tmp_path / format_
        if format_ != "qcow2" and "-c" in options:
            continue
        succeed("qemu-img", "convert", "-f", "raw", "-O", format_, *options, disk.path, copy)
        succeed("qemu-img", "compare", "-f", format_, "-F", "raw", copy, disk.path)
        if format_ == "raw":
            assert sha256(copy.read_bytes()) == sha256(content)
        else:
            succeed("qemu-img", "convert", "-f", format_, "-O", "raw", copy, tmp_path / "back")
            assert sha256((tmp_path / "back").read_bytes()) == sha256(content)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "-f", "raw", "-O", "raw", "{other}", "{volume}"),
        ("convert", "-f", "raw", "-O", "qcow2", "{other}", "{volume}"),
        ("dd", "-f", "raw", "-O", "raw", "if={other}", "of={volume}"),
        ("create", "-f", "raw", "{volume}", str(SIZE)),
        ("create", "-f", "qcow2", "{volume}", "1M"),
        ("resize", "-f", "raw", "{volume}", "1G"),
        ("resize", "-f", "raw", "--shrink", "{volume}", "1M"),
    ],
    ids=lambda command: " ".join(command[:5]),
)
def test_qemu_img_that_would_create_or_resize_the_volume_says_so(
    disk: Disk, tmp_path: Path, command: Sequence[str]
) -> None:
    """Without -n, convert creates its target, which is to truncate it."""
    digest = sha256(disk.fill(5))
    other = raw_file(tmp_path, some_bytes(seed=6))
    done = run("qemu-img", *(word.format(other=other, volume=disk.path) for word in command))
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert b"Could not resize file: Operation not permitted" in done.stderr
    assert disk.path.stat().st_size == SIZE
    assert disk.stored.sha256() == digest


def test_qemu_img_compare_finds_a_difference(disk: Disk, tmp_path: Path) -> None:
    content = disk.fill(7)
    other = raw_file(tmp_path, content)
    for cache in ("writeback", "none"):
        command = ("qemu-img", "compare", "-T", cache, "-f", "raw", "-F", "raw", disk.path, other)
        assert b"Images are identical" in succeed(*command)
    disk.stored.write(b"other", 5 * MIB)
    done = run(*command)
    assert done.returncode == 1
    assert f"mismatch at offset {5 * MIB}!" in done.stdout.decode()


@pytest.mark.parametrize("engine", ["native", "io_uring", "threads"])
def test_qemu_img_bench_runs(disk: Disk, engine: str) -> None:
    disk.stored.write(bytes(SIZE))
    bench = ("qemu-img", "bench", "-f", "raw", "-i", engine, "-d", "32", "-s", "4096", "-c", "1000")
    for options in (("-t", "none"), ("-t", "none", "-w", "--pattern=171", "-S", "4096")):
        assert b"Run completed" in succeed(*bench, *options, disk.path)
    assert disk.stored.read()[: 1000 * 4096] == b"\xab" * (1000 * 4096)


# ---- qemu-io ---------------------------------------------------------------------------------------------------


def qemu_io(target: Path | str, *commands: str, options: Sequence[str] = ()) -> str:
    """What it printed; it tells of failed patterns and of errors, and may end with 0 all the same."""
    arguments = [word for command in commands for word in ("-c", command)]
    told = succeed("qemu-io", "-f", "raw", *options, *arguments, target).decode()
    assert "fail" not in told.lower(), told
    assert "error" not in told.lower(), told
    return told


MODES = (
    ("-t", "none", "-i", "native"),
    ("-t", "none", "-i", "io_uring"),
    ("-t", "none", "-i", "threads"),
    ("-t", "writeback", "-i", "io_uring"),
    ("-t", "directsync", "-i", "native"),
)
WRITES = ((0, 4096, 0x11), (3 * MIB + 512, 70_144, 0x22), (4 * MIB - 1, 3, 0x33), (SIZE - 512, 512, 0x44))


@with_large_sectors
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_qemu_io_reads_what_it_wrote(disk: Disk, mode: Sequence[str]) -> None:
    content = bytearray(disk.fill(8))
    commands = []
    for offset, length, pattern in WRITES:
        content[offset : offset + length] = bytes([pattern]) * length
        commands += [f"write -P {pattern} {offset} {length}", f"read -P {pattern} {offset} {length}"]
    asynchronous = [f"aio_write -P {number} {MIB + number * 65536} 65536" for number in range(1, 9)]
    for number in range(1, 9):
        content[MIB + number * 65536 : MIB + (number + 1) * 65536] = bytes([number]) * 65536
    zeroes = ["write -z 2M 1M", "read -P 0 2M 1M", "write -z 6291957 12345"]
    content[2 * MIB : 3 * MIB] = bytes(MIB)
    content[6291957 : 6291957 + 12345] = bytes(12345)
    qemu_io(disk.path, *commands, *asynchronous, "aio_flush", *zeroes, "flush", options=mode)
    assert disk.stored.sha256() == sha256(content)
    qemu_io(disk.path, *commands[1::2], "read -P 0 2M 1M", options=[*mode, "-r"])


def test_qemu_io_finds_a_wrong_pattern(disk: Disk) -> None:
    """The check of the checks above."""
    disk.stored.write(b"\x11" * 8192)
    done = run("qemu-io", "-f", "raw", "-r", "-c", "read -P 0x12 0 8192", disk.path)
    assert b"Pattern verification failed" in done.stdout


def test_qemu_discards_only_what_it_says(disk: Disk) -> None:
    content = disk.fill(9)
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 1M", disk.path)
    qemu_io(disk.path, "write -z -u 4M 1M", "read -P 0 4M 1M", options=("-d", "unmap"))
    stored = disk.stored.read()
    assert stored[MIB : 2 * MIB] in (content[MIB : 2 * MIB], bytes(MIB))
    expected = content[: 4 * MIB] + bytes(MIB) + content[5 * MIB :]
    assert stored[:MIB] + stored[2 * MIB :] == expected[:MIB] + expected[2 * MIB :]


# ---- qemu-nbd --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(path: Path, socket: Path, *options: str) -> Iterator[str]:
    """A file served by qemu-nbd on a Unix socket; yields its URL."""
    command = [
        "qemu-nbd",
        "--persistent",
        "--format=raw",
        f"--socket={socket}",
        "--shared=4",
        *options,
        str(path),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as server:
        try:
            wait_until(lambda: socket.exists() or server.poll() is not None, "qemu-nbd listens")
            assert server.poll() is None, server.stderr and server.stderr.read()
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()
            server.wait(30)
    assert server.returncode == 0


@pytest.mark.parametrize(
    "options",
    [("--cache=none", "--aio=io_uring"), ("--cache=none", "--aio=native"), ("--cache=writeback",)],
    ids=" ".join,
)
def test_qemu_nbd_serves_a_volume(disk: Disk, tmp_path: Path, options: Sequence[str]) -> None:
    content = disk.fill(10)
    new = some_bytes(seed=11)
    with served(disk.path, tmp_path / "socket", *options) as url:
        succeed("qemu-img", "convert", "-f", "raw", "-O", "raw", url, tmp_path / "copy")
        assert sha256((tmp_path / "copy").read_bytes()) == sha256(content)
        succeed("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw_file(tmp_path, new), url)
        succeed("qemu-img", "compare", "-f", "raw", "-F", "raw", url, disk.path)
        commands = []
        for offset, length, pattern in WRITES:
            new = new[:offset] + bytes([pattern]) * length + new[offset + length :]
            commands += [f"write -P {pattern} {offset} {length}", f"read -P {pattern} {offset} {length}"]
        qemu_io(url, *commands, "flush")
        assert disk.stored.sha256() == sha256(new), "stable after a flush over NBD"
    disk.assert_released()
    assert disk.stored.sha256() == sha256(new)


def test_qemu_nbd_serves_a_volume_read_only(disk: Disk, tmp_path: Path) -> None:
    content = disk.fill(12)
    with served(disk.path, tmp_path / "socket", "--read-only") as url:
        done = run("qemu-io", "-f", "raw", "-c", "write 0 4096", url)
        assert done.returncode == 1
        assert b"Permission denied" in done.stderr
        succeed("qemu-img", "convert", "-f", "raw", "-O", "raw", url, tmp_path / "copy")
    assert sha256((tmp_path / "copy").read_bytes()) == sha256(content) == disk.stored.sha256()


def test_a_qcow2_image_may_live_in_a_volume(disk: Disk, tmp_path: Path) -> None:
    """Whoever keeps one there puts it there as it is; QEMU then writes to it within the volume's size."""
    image = qcow2_file(tmp_path, some_bytes(seed=13)[:MIB] + bytes(SIZE - MIB))
    disk.stored.write(image.read_bytes() + bytes(SIZE - image.stat().st_size))
    options = ("-f", "qcow2", "-t", "none", "-i", "io_uring")
    told = succeed("qemu-io", *options, "-c", "write -P 7 2M 1M", "-c", "read -P 7 2M 1M", disk.path).decode()
    assert "fail" not in told.lower(), told
    (tmp_path / "stored").write_bytes(disk.stored.read())
    for path in (disk.path, tmp_path / "stored"):
        succeed("qemu-img", "check", "-f", "qcow2", path)
        succeed("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "guest")
        expected = some_bytes(seed=13)[:MIB] + bytes(MIB) + b"\x07" * MIB + bytes(SIZE - 3 * MIB)
        assert (tmp_path / "guest").read_bytes() == expected


# ---- fio -------------------------------------------------------------------------------------------------------

JOBS = {
    "libaio, direct, mixed sizes": ("--ioengine=libaio", "--direct=1", "--bsrange=4k-256k", "--rw=randwrite"),
    "io_uring, direct, mixed sizes": ("--ioengine=io_uring", "--direct=1", "--bsrange=4k-256k", "--rw=randwrite"),
    "io_uring, buffered, mixed sizes": ("--ioengine=io_uring", "--bsrange=4k-256k", "--rw=randwrite"),
    "libaio, buffered, small": ("--ioengine=libaio", "--bs=4k", "--rw=randwrite", "--size=2M"),
    "libaio, direct, of sectors": ("--ioengine=libaio", "--direct=1", "--bs=1536", "--rw=randwrite", "--size=768k"),
    "sync, buffered, unaligned": ("--ioengine=sync", "--bs=5001", "--rw=randwrite", "--offset=777", "--size=1M"),
    "psync, direct, unaligned": (
        "--ioengine=psync", "--direct=1", "--bs=5001", "--rw=write", "--offset=777", "--size=1M",
    ),
    "io_uring, direct, unaligned": (
        "--ioengine=io_uring", "--direct=1", "--bs=70001", "--rw=randwrite", "--offset=4095", "--size=4M",
    ),
    "io_uring, direct, sequential": ("--ioengine=io_uring", "--direct=1", "--bs=1M", "--rw=write"),
    "sync with fsync after each": ("--ioengine=sync", "--fsync=1", "--bs=64k", "--rw=randwrite", "--size=2M"),
    "mmap": ("--ioengine=mmap", "--bs=4k", "--rw=randwrite", "--size=2M"),
}  # fmt: skip


def fio(path: Path, *options: str) -> dict[str, float]:
    """Run one job on a file that is there; returns what it told of itself."""
    name = str(path).replace(":", "\\:")  # separates names, otherwise
    told = succeed(
        "fio",
        "--name=volume",
        f"--filename={name}",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=42",
        "--output-format=json",
        *([] if any(option.startswith("--size") for option in options) else [f"--size={SIZE}"]),
        *options,
    )
    (job,) = json.loads(told[told.index(b"{") :])["jobs"]
    assert job["error"] == 0, told
    return {"written": job["write"]["io_bytes"], "read": job["read"]["io_bytes"]}


@pytest.mark.parametrize("options", JOBS.values(), ids=JOBS.keys())
def test_fio_verifies_what_it_wrote(disk: Disk, tmp_path: Path, options: Sequence[str]) -> None:
    before = disk.fill(14)
    done = fio(disk.path, "--do_verify=1", *options)
    assert done["read"] >= done["written"] > 0
    disk.assert_released()
    stored = disk.stored.read()
    assert len(stored) == SIZE
    assert stored != before
    copy = raw_file(tmp_path, stored)
    buffered = [option for option in options if not option.startswith(("--direct", "--ioengine", "--fsync"))]
    assert fio(copy, "--verify_only=1", "--ioengine=psync", *buffered)["read"] == done["written"]


def test_fio_finds_what_was_changed_behind_its_back(disk: Disk, tmp_path: Path) -> None:
    """The check of the checks above."""
    job = ("--ioengine=psync", "--bs=64k", "--rw=write")
    fio(disk.path, "--do_verify=0", *job)
    disk.stored.write(b"other", 5 * MIB + 100)
    with pytest.raises(AssertionError, match="verify"):
        fio(disk.path, "--verify_only=1", *job)


@with_large_sectors
def test_fio_mixes_reads_and_writes_of_several_processes(disk: Disk) -> None:
    """Each in its own quarter, deep queues, with direct and buffered ones at once."""
    disk.stored.write(bytes(SIZE))
    jobs = [
        word
        for number in range(4)
        for word in (
            f"--name=job{number}",
            "--filename=" + str(disk.path).replace(":", "\\:"),
            f"--offset={number * SIZE // 4}",
            f"--size={SIZE // 4}",
            f"--direct={number % 2}",
            f"--ioengine={('io_uring', 'libaio')[number // 2]}",
            "--rw=randrw",
            "--bsrange=512-64k",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        )
    ]
    told = json.loads(succeed("fio", "--output-format=json", *jobs))
    assert [job["error"] for job in told["jobs"]] == [0] * 4
    assert all(job["write"]["io_bytes"] > 0 for job in told["jobs"])
