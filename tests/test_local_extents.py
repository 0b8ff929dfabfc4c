"""Holes and zeros of local files and devices: on the file systems there are, and where the kernel cannot do it.

What every driver must do is in test_backend_contract.py; this is about space, and about the ways round.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from disks import opened, succeed
from services import MIB, loop, skip_or_fail
from volumes import (
    BlockVolume,
    Storage,
    all_extents,
    assert_holes_are_zero,
    assert_same,
    random_bytes,
    write_file,
)

from volfs.backends.base import Extent, VolumeInfo
from volfs.backends.block import BlockBackend, BlockSettings, BlockSource
from volfs.backends.file import FileBackend, FileSettings, FileSource
from volfs.backends.local import LocalVolume
from volfs.backends.raw_file import MAX_EXTENTS
from volfs.errors import BackendError

SIZE = 4 * MIB
BLOCK = 4096  # of all file systems here
LITTLE = 64 << 10  # bytes of blocks that were touched, and of what a file system needs to find them
TIB = 1 << 40
by_each_zeroing = pytest.mark.parametrize("zeroing", ["discard", "write_zeroes"])


@dataclass(frozen=True)
class FileSystem:
    kind: str
    command: tuple[str, ...] = ()  # makes one; without it is one of memory
    holes: bool = True  # it knows them, and makes some
    mib: int = 32
    options: tuple[str, ...] = ("rw",)  # of its mount


TMPFS = FileSystem("tmpfs")  # punches, but zeroes no range
RAMFS = FileSystem("ramfs", holes=False)  # neither punches nor seeks to data: all the ways round
EXT4 = FileSystem("ext4", ("mkfs.ext4", "-q", "-F", "-b", str(BLOCK)))
XFS = FileSystem("xfs", ("mkfs.xfs", "-q", "-f"), mib=304)  # it makes none below 300 MiB


@contextlib.contextmanager
def mounted_file_system(made: FileSystem, top: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can mount a file system")
    directory = top / "files"
    directory.mkdir()
    if made.command:
        image = top / "image"
        image.touch()
        os.truncate(image, made.mib * MIB)
        succeed(*made.command, image)
        succeed("mount", "-t", made.kind, "-o", ",".join(("loop", *made.options)), image, directory)
    else:
        succeed("mount", "-t", made.kind, "-o", ",".join(made.options), "none", directory)
    try:
        yield directory
    finally:
        succeed("umount", directory)


@pytest.fixture(scope="module", params=[TMPFS, RAMFS, EXT4, XFS], ids=lambda it: it.kind)
def file_system(request: pytest.FixtureRequest) -> FileSystem:
    made = request.param
    assert isinstance(made, FileSystem)
    return made


@pytest.fixture(scope="module")
def directory(file_system: FileSystem, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted_file_system(file_system, tmp_path_factory.mktemp(file_system.kind)) as directory:
        yield directory


only_on_ext4 = pytest.mark.parametrize("file_system", [EXT4], indirect=True, ids=lambda it: it.kind)


def sparse_file(path: Path, size: int = SIZE) -> Path:
    with path.open("xb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def path(directory: Path) -> Iterator[Path]:
    """A sparse file on each file system."""
    path = sparse_file(directory / "volume")
    yield path
    path.unlink()


@contextlib.asynccontextmanager
async def open_file(path: Path) -> AsyncIterator[LocalVolume]:
    backend = FileBackend("files", FileSettings(path=str(path.parent)))
    async with backend, await backend.open(FileSource(path=str(path)), writable=True) as volume:
        yield volume


@contextlib.asynccontextmanager
async def open_device(path: Path) -> AsyncIterator[LocalVolume]:
    backend = BlockBackend("devices", BlockSettings(devices=(str(path),)))
    async with backend, await backend.open(BlockSource(path=str(path)), writable=True) as volume:
        yield volume


async def zero(volume: LocalVolume, zeroing: str, offset: int, length: int) -> None:
    await (volume.discard if zeroing == "discard" else volume.write_zeroes)(offset, length)


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def allocated(path: Path) -> int:
    """Bytes of the disk."""
    return os.stat(path).st_blocks * 512


def data_of(extents: list[Extent]) -> list[tuple[int, int]]:
    """Where the data begins and ends, with neighbours joined."""
    found: list[tuple[int, int]] = []
    for extent in extents:
        if extent.data and found and found[-1][1] == extent.offset:
            found[-1] = (found[-1][0], extent.end)
        elif extent.data:
            found.append((extent.offset, extent.end))
    return found


# ---- files -----------------------------------------------------------------------------------------------------


async def test_the_data_of_a_file_is_what_was_written_to_the_block(
    file_system: FileSystem, path: Path
) -> None:
    expected = [(BLOCK, 2 * BLOCK), (MIB, MIB + 3 * BLOCK), (SIZE - BLOCK, SIZE)]
    async with open_file(path) as volume:
        for begin, end in expected:
            await volume.pwrite(begin, b"\xaa" * (end - begin))
        if not file_system.holes:
            expected = [(0, SIZE)]
        assert data_of(await all_extents(volume, 0, SIZE)) == expected, "not flushed"
        await volume.flush()
        assert data_of(await all_extents(volume, 0, SIZE)) == expected, "flushed"
        part = await all_extents(volume, MIB + 1, BLOCK)
        assert part == [Extent(MIB + 1, BLOCK, data=True)]


@by_each_zeroing
async def test_zeros_in_a_file_are_zero_on_any_file_system(path: Path, zeroing: str) -> None:
    model = bytearray(random_bytes(SIZE))
    async with open_file(path) as volume:
        await volume.pwrite(0, bytes(model))
        for offset, length in ((1, 1), (BLOCK - 1, BLOCK + 2), (MIB, MIB), (3 * MIB + 7, MIB - 8)):
            await zero(volume, zeroing, offset, length)
            model[offset : offset + length] = bytes(length)
            assert_same(await volume.pread(0, SIZE), model, 0, f"{length} zeros at {offset}")
            await assert_holes_are_zero(volume, model, 0, SIZE, f"{length} zeros at {offset}")
    assert_same(content_of(path), model, 0, "closed")


async def test_a_discard_in_a_file_gives_its_space_back(file_system: FileSystem, path: Path) -> None:
    write_file(path, random_bytes(SIZE), 0)
    async with open_file(path) as volume:
        before = allocated(path)
        await volume.discard(100, SIZE - 200)
        await volume.flush()
        if file_system.holes:
            assert before >= SIZE
            assert allocated(path) <= LITTLE
            assert data_of(await all_extents(volume, 0, SIZE)) == [(0, BLOCK), (SIZE - BLOCK, SIZE)]
    expected = random_bytes(SIZE)[:100] + bytes(SIZE - 200) + random_bytes(SIZE)[-100:]
    assert_same(content_of(path), expected, 0, "closed")


async def test_a_discard_of_a_hole_takes_no_space(file_system: FileSystem, path: Path) -> None:
    async with open_file(path) as volume:
        await volume.discard(1, SIZE - 2)
        await volume.flush()
    assert allocated(path) <= LITTLE or not file_system.holes


async def test_stat_tells_what_a_file_takes_of_the_disk(path: Path) -> None:
    backend = FileBackend("files", FileSettings(path=str(path.parent)))
    source = FileSource(path=str(path))
    async with backend:
        for content in (b"", random_bytes(MIB)):
            write_file(path, content, 0)
            listed = [entry for entry in await backend.list(()) if entry.name == path.name]
            for info in (*listed, await backend.stat(source)):
                assert isinstance(info, VolumeInfo)
                assert info.allocated == allocated(path)


@by_each_zeroing
async def test_a_file_that_was_only_zeroed_is_made_stable_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeroing: str
) -> None:
    """Nothing short of a power failure would show it otherwise, as the page cache has the zeros."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    async with open_file(sparse_file(tmp_path / "volume")) as volume:
        await zero(volume, zeroing, 0, SIZE)
    assert len(synced) == 1


@only_on_ext4
@by_each_zeroing
async def test_a_file_that_may_not_be_zeroed_tells_why(path: Path, zeroing: str) -> None:
    async with open_file(path) as volume:
        await volume.pwrite(0, b"content")
        succeed("chattr", "+i", path)
        try:
            with pytest.raises(BackendError, match=os.strerror(errno.EPERM)) as caught:
                await zero(volume, zeroing, 0, SIZE)
            assert caught.value.errno == errno.EPERM
        finally:
            succeed("chattr", "-i", path)
        assert await volume.pread(0, 7) == b"content"


@only_on_ext4
async def test_a_full_file_system_has_no_space_for_zeros_but_can_discard(
    file_system: FileSystem, path: Path
) -> None:
    size = 2 * file_system.mib * MIB
    os.truncate(path, size)
    async with open_file(path) as volume:
        with pytest.raises(BackendError) as caught:
            await volume.write_zeroes(0, size)
        assert caught.value.errno == errno.ENOSPC
        await volume.discard(0, size)
        await volume.pwrite(size - 3, b"end")
        await volume.flush()
        assert data_of(await all_extents(volume, 0, size)) == [(size - BLOCK, size)]


async def test_a_file_of_very_many_extents_is_told_in_parts(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "volume", 2 * MAX_EXTENTS * 2 * BLOCK)
    expected = [(at, at + BLOCK) for at in range(0, path.stat().st_size, 2 * BLOCK)]
    async with open_file(path) as volume:
        for begin, _ in expected:
            await volume.pwrite(begin, b"\xaa" * BLOCK)
        first = await volume.extents(0, volume.properties.size)
        assert len(first) < len(expected)
        assert data_of(await all_extents(volume, 0, volume.properties.size)) == expected


async def test_what_was_cut_off_a_file_is_no_hole(tmp_path: Path) -> None:
    """Its reader is to meet the error."""
    path = sparse_file(tmp_path / "volume")
    async with open_file(path) as volume:
        os.truncate(path, MIB)
        assert data_of(await all_extents(volume, 0, SIZE)) == [(MIB, SIZE)]
        assert data_of(await all_extents(volume, 2 * MIB, MIB)) == [(2 * MIB, 3 * MIB)]
        with pytest.raises(BackendError):
            await volume.pread(0, SIZE)
        await volume.discard(0, SIZE)
    assert path.stat().st_size == MIB


async def test_a_terabyte_of_holes_is_soon_told_and_discarded(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "volume", TIB)
    spots = (0, 300 * MIB, TIB // 2 + BLOCK, TIB - BLOCK)
    async with open_file(path) as volume:
        for spot in spots:
            await volume.pwrite(spot, b"\xaa" * BLOCK)
        with trio.fail_after(60):
            assert data_of(await all_extents(volume, 0, TIB)) == [(spot, spot + BLOCK) for spot in spots]
            await volume.discard(0, TIB)
            assert data_of(await all_extents(volume, 0, TIB)) == []
    assert allocated(path) <= LITTLE


async def test_a_cancelled_discard_of_terabytes_stops_on_its_way(tmp_path: Path) -> None:
    size = 15 * TIB  # ext4 takes no larger one
    path = sparse_file(tmp_path / "volume", size)
    async with open_file(path) as volume:
        await volume.pwrite(size - 3, b"end")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.discard, 0, size)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await volume.pread(size - 3, 3) == b"end"


# ---- devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_a_discard_on_a_device_gives_space_back_and_keeps_to_its_range(
    storage: Storage, sector_size: int
) -> None:
    content = random_bytes(SIZE)
    stored = storage.make("block", SIZE, content, sector_size=sector_size)
    assert isinstance(stored, BlockVolume)
    assert allocated(stored.backing) >= SIZE
    async with open_device(stored.device) as volume:
        await volume.discard(100, SIZE - 200)
    assert_same(stored.read(), content[:100] + bytes(SIZE - 200) + content[-100:], 0, "on the storage")
    assert allocated(stored.backing) <= LITTLE


@by_each_zeroing
async def test_a_device_that_ends_inside_a_page_is_zeroed_to_its_end(storage: Storage, zeroing: str) -> None:
    size = MIB + 3 * 512
    stored = storage.make("block", size, random_bytes(size))
    async with stored.make_backend() as backend, await backend.open(stored.source, writable=True) as volume:
        assert isinstance(volume, LocalVolume)
        await zero(volume, zeroing, 512, size - 512)
    assert_same(stored.read(), random_bytes(size)[:512] + bytes(size - 512), 0, "on the storage")


@by_each_zeroing
async def test_zeros_on_a_device_are_seen_by_whoever_has_read_it(storage: Storage, zeroing: str) -> None:
    stored = storage.make("block", SIZE, random_bytes(SIZE))
    assert isinstance(stored, BlockVolume)
    with opened(stored.device, os.O_RDONLY) as other:
        assert os.pread(other, SIZE, 0) == random_bytes(SIZE)  # it is in the page cache now
        async with open_device(stored.device) as volume:
            await volume.pwrite(MIB, b"not yet on the disk")
            await zero(volume, zeroing, 0, SIZE)
            assert_same(os.pread(other, SIZE, 0), bytes(SIZE), 0, "through another descriptor")


@by_each_zeroing
async def test_a_device_that_somebody_holds_is_zeroed_all_the_same(storage: Storage, zeroing: str) -> None:
    """The kernel refuses then to throw away what is in its page cache and not yet on the disk."""
    stored = storage.make("block", SIZE, random_bytes(MIB))
    assert isinstance(stored, BlockVolume)
    with opened(stored.device, os.O_RDONLY | os.O_EXCL):
        async with open_device(stored.device) as volume:
            await volume.pwrite(BLOCK, b"not yet on the disk")
            await zero(volume, zeroing, 0, SIZE)
            assert_same(await volume.pread(0, SIZE), bytes(SIZE), 0, "at once")
    assert_same(stored.read(), bytes(SIZE), 0, "on the storage")
    if zeroing == "discard":
        assert allocated(stored.backing) <= MIB + LITTLE  # the holes were not filled


@pytest.mark.parametrize("file_system", [RAMFS], indirect=True, ids=lambda it: it.kind)
@by_each_zeroing
async def test_a_device_that_cannot_punch_is_zeroed_by_writing(directory: Path, zeroing: str) -> None:
    model = bytearray(random_bytes(SIZE))
    with loop(directory, SIZE) as device:
        async with open_device(device) as volume:
            await volume.pwrite(0, bytes(model))
            for offset, length in ((1, 1), (MIB - 513, BLOCK), (2 * MIB + 7, MIB)):
                await zero(volume, zeroing, offset, length)
                model[offset : offset + length] = bytes(length)
                assert_same(await volume.pread(0, SIZE), model, 0, f"{length} zeros at {offset}")
        (backing,) = os.listdir(directory)
        assert_same(content_of(directory / backing), model, 0, "closed")


async def test_all_of_a_device_is_data(storage: Storage) -> None:
    """Nothing tells what of it is not."""
    stored = storage.make("block", SIZE)
    assert isinstance(stored, BlockVolume)
    async with open_device(stored.device) as volume:
        assert data_of(await all_extents(volume, 0, SIZE)) == [(0, SIZE)]
    async with stored.make_backend() as backend:
        assert (await backend.stat(stored.source)).allocated is None
