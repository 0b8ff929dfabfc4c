"""Direct I/O on block devices where something goes wrong: errors, a device that hangs, and who else looks at it.

What any volume must do is in test_backend_contract.py, holes and zeros in test_local_extents.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from disks import opened, succeed
from mounts import wait_until
from services import MIB, loop
from test_local_extents import EXT4, FileSystem, mounted_file_system
from volumes import BlockVolume, Storage, assert_same, processes_with, raises, random_bytes

from volfs.backends.block_device import BlockDevice, open_device
from volfs.backends.device_requests import PIECE, THREADS
from volfs.errors import BackendTimeout, VolumeNotFound

SIZE = 8 * MIB
PATIENCE = 0.5  # seconds, of a volume on a device that is to hang


@pytest.fixture
def stored(storage: Storage) -> BlockVolume:
    made = storage.make("block", SIZE, random_bytes(SIZE))
    assert isinstance(made, BlockVolume)
    return made


@contextlib.asynccontextmanager
async def open_block(path: Path, timeout: float = 30.0) -> AsyncIterator[BlockDevice]:
    volume = await open_device(str(path), name="device", writable=True, timeout=timeout)
    try:
        yield volume
    finally:
        await volume.aclose()


@contextlib.contextmanager
def loop_on(made: FileSystem, directory: Path, size: int) -> Iterator[Path]:
    with mounted_file_system(made, directory) as top, loop(top, size) as device:
        yield device


class Frozen:
    """A loop device whose writes hang as long as its file system is frozen."""

    def __init__(self, directory: Path) -> None:
        self._stack = contextlib.ExitStack()
        top = self._stack.enter_context(mounted_file_system(EXT4, directory))
        self.device = self._stack.enter_context(loop(top, SIZE))
        self._top = top
        self._frozen = False

    def freeze(self) -> None:
        succeed("fsfreeze", "--freeze", self._top)
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            succeed("fsfreeze", "--unfreeze", self._top)
            self._frozen = False

    def close(self) -> None:
        self.thaw()
        wait_until(lambda: not processes_with(self.device), "the device is let go")
        self._stack.close()


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Frozen]:
    made = Frozen(tmp_path)
    try:
        yield made
    finally:
        made.close()


async def test_a_write_past_the_page_cache_is_on_the_device_when_it_returns(stored: BlockVolume) -> None:
    """And whoever has read the device before sees it."""
    with opened(stored.device, os.O_RDONLY) as other:
        assert_same(os.pread(other, SIZE, 0), random_bytes(SIZE), 0, "before")
        async with open_block(stored.device) as volume:
            for offset, length in ((0, 4096), (MIB + 1, 700), (3 * MIB - 5, PIECE + 10)):
                await volume.pwrite(offset, b"\xaa" * length)
                assert_same(os.pread(other, length, offset), b"\xaa" * length, offset, "read by another")


async def test_what_another_has_written_to_the_page_cache_is_read(stored: BlockVolume) -> None:
    async with open_block(stored.device) as volume:
        with opened(stored.device, os.O_WRONLY) as other:
            os.pwrite(other, b"not yet on the disk", MIB - 7)
            assert await volume.pread(MIB - 7, 19) == b"not yet on the disk"


async def test_more_requests_than_threads_are_all_answered(stored: BlockVolume) -> None:
    content = random_bytes(SIZE)
    async with open_block(stored.device) as volume, trio.open_nursery() as nursery:

        async def read(offset: int) -> None:
            assert await volume.pread(offset, 5000) == content[offset : offset + 5000]

        for number in range(8 * THREADS):
            nursery.start_soon(read, number * 4097)


async def test_a_read_error_is_that_of_the_device(stored: BlockVolume) -> None:
    async with open_block(stored.device) as volume:
        os.truncate(stored.backing, 4 * MIB)  # what is beyond is an error of the loop device's
        with raises(errno.EIO) as caught:
            await volume.pread(5 * MIB, 4096)
        assert str(caught.value) == f"device: read of 4096 bytes at {5 * MIB}: Input/output error"
        assert await volume.pread(3 * MIB, 512) == random_bytes(SIZE)[3 * MIB : 3 * MIB + 512]
        os.truncate(stored.backing, SIZE)


async def test_a_write_error_is_seen_at_the_write(tmp_path: Path) -> None:
    """By way of the page cache it would be seen at the next flush."""
    small = FileSystem("tmpfs", options=("size=1m",))
    with loop_on(small, tmp_path, SIZE) as device:
        async with open_block(device) as volume:
            with raises(errno.ENOSPC):
                await volume.pwrite(0, random_bytes(2 * MIB))
            await volume.flush()
            assert len(await volume.pread(0, SIZE)) == SIZE


async def test_a_request_that_hangs_ends_at_its_deadline(frozen: Frozen) -> None:
    async with open_block(frozen.device, PATIENCE) as volume:
        await volume.pwrite(0, b"\x11" * SIZE)
        frozen.freeze()
        data = bytearray(b"\x22" * MIB)
        with trio.fail_after(20 * PATIENCE), pytest.raises(BackendTimeout) as caught:
            await volume.pwrite(0, memoryview(data))
        assert str(caught.value) == f"device: write of {MIB} bytes at 0: no answer within 0.5 s"
        data[:] = b"\x33" * MIB  # the caller's again; what is still to be written is not this
        with trio.fail_after(20 * PATIENCE), pytest.raises(BackendTimeout):
            await volume.pwrite(100, b"neighbour")  # waits for the blocks of the first
        frozen.thaw()
        while True:  # until the first write is over
            with contextlib.suppress(BackendTimeout):
                await volume.pwrite(2 * MIB, b"usable again")
                await volume.pwrite(10, b"again")
                break
        now = await volume.pread(0, MIB)
        assert now[10:15] == b"again"
        assert set(now[1000:]) in ({0x11}, {0x22}), "neither before nor after the write"


async def test_closing_a_device_that_hangs_ends_at_the_deadline_and_lets_go_of_it_later(
    frozen: Frozen,
) -> None:
    called = []

    async def closed() -> None:
        called.append("closed")

    volume = await open_device(
        str(frozen.device), name="device", writable=True, timeout=PATIENCE, closed=closed
    )
    await volume.pwrite(0, b"\x11" * MIB)
    frozen.freeze()
    with trio.fail_after(20 * PATIENCE):
        with pytest.raises(BackendTimeout):
            await volume.pwrite(0, b"\x22" * MIB)
        with pytest.raises(BackendTimeout):
            await volume.aclose()
    assert called == ["closed"]
    assert processes_with(frozen.device) == [str(os.getpid())], "its number may not be another file's yet"
    frozen.thaw()
    await trio.to_thread.run_sync(
        wait_until, lambda: not processes_with(frozen.device), "the device is let go"
    )


async def test_what_is_no_block_device_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with raises(errno.ENOTBLK):
        await open_device(str(path), name="device", writable=False, timeout=30)
    with pytest.raises(VolumeNotFound):
        await open_device(str(path) + "x", name="device", writable=False, timeout=30)
