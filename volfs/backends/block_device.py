"""An open block device of this machine: O_DIRECT requests, many under way, each with a deadline.

Direct, since the page cache of the mount is above us: a second one below would keep everything twice, tell a write's
error at some later flush, and take writes that are not to be had back from a disk that hangs. In exchange a request is
of whole blocks (`BLKSSZGET`), in memory that begins with a page. What begins or ends inside a block is read, changed
and written back (block_ranges.py).

Who else has the device open by way of its page cache, such as a mounted file system, sees what we write: the kernel
drops the pages that a direct write covers. We see what they write once it was written back to the device: direct
reads write back what is dirty in their range first, other caches (of another machine) they cannot know.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from volfs.backends.base import Properties, deadline
from volfs.backends.block_ranges import BlockRanges, whole_blocks
from volfs.backends.device_requests import PIECE, Buffer, DeviceRequests
from volfs.backends.local import LocalVolume, end_of, fallocate_some, local_errors

T = TypeVar("T")

BLKSSZGET = 0x1268  # logical block size, linux/fs.h


class BlockDevice(LocalVolume):
    """An open block device. Owns its descriptor, made by `open_device`."""

    def __init__(
        self,
        fd: int,
        name: str,
        properties: Properties,
        requests: DeviceRequests,
        closed: Callable[[], Awaitable[None]] | None,
        resize: Callable[[int], Awaitable[None]] | None,
    ) -> None:
        super().__init__(fd, name, properties, zero_unit=properties.block_size)
        self._requests = requests
        self._ranges = BlockRanges()
        self._after_close = closed
        self._resize = resize

    async def pread(self, offset: int, length: int) -> bytes:
        begin, end = self._blocks(offset, length)
        data = await self._read(begin, end, f"read of {length} bytes at {offset}")
        return data if len(data) == length else data[offset - begin : offset - begin + length]

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        self.check_writable(self._name)
        self._dirty = True
        what = f"write of {len(data)} bytes at {offset}"
        begin, end = self._blocks(offset, len(data))
        release = await self._hold(begin, end, what, alone=end - begin != len(data))
        try:
            if end - begin != len(data):
                data = await self._completed(offset, data, what)
            elif isinstance(data, memoryview) and not isinstance(data.obj, bytes):
                data = bytes(
                    data
                )  # what is written after its caller gave up must not be what he did next with it
        except BaseException:
            release()
            raise
        view = memoryview(data)
        calls = [
            partial(_pwrite_all, self._fd, begin + at, view[at : at + PIECE])
            for at in range(0, len(view), PIECE)
        ]
        with local_errors(what, self._name):
            await self._requests.run_all(calls, what, settled=release)

    async def resize(self, size: int) -> None:
        if self._resize is None:
            await super().resize(size)
        else:
            await self._resize(size)
            await self.refresh()

    async def aclose(self) -> None:
        if self._fd < 0:
            return
        end = trio.current_time() + self._requests.timeout
        try:
            with trio.CancelScope(shield=True):
                if self._dirty:
                    await self.flush()
        finally:
            close, self._fd = partial(os.close, self._fd), -1
            try:
                with local_errors("close", self._name):
                    await self._requests.aclose(end, close)
            finally:
                if self._after_close is not None:
                    with trio.CancelScope(shield=True):
                        await self._after_close()

    async def _zero_some(self, modes: Sequence[int], begin: int, stop: int, doing: str) -> int:
        # As a write: what is read, changed and written back meanwhile would bring a block's old bytes back.
        release = await self._hold(begin, stop, doing, alone=False)
        with local_errors(doing, self._name):
            return await self._requests.run(
                lambda _: fallocate_some(self._fd, modes, begin, stop), doing, settled=release
            )

    async def _run(self, call: Callable[..., T], *args: object, doing: str) -> T:
        with local_errors(doing, self._name):
            return await self._requests.run(lambda _: call(*args), doing)

    async def _read(self, begin: int, end: int, what: str) -> bytes:
        calls = [partial(_pread_all, self._fd, at, min(PIECE, end - at)) for at in range(begin, end, PIECE)]
        with local_errors(what, self._name):
            parts = await self._requests.run_all(calls, what)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _completed(self, offset: int, data: bytes | memoryview, what: str) -> bytes:
        """The data, with what is on the device before and behind it in the same blocks."""
        block_size = self.properties.block_size

        def read(block: int) -> Awaitable[bytes]:
            return self._read(block * block_size, (block + 1) * block_size, what)

        return b"".join(part for _, part in await whole_blocks(offset, data, block_size, read))

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """Where the blocks begin and end that the range touches."""
        block_size = self.properties.block_size
        return offset - offset % block_size, offset + length + -(offset + length) % block_size

    async def _hold(self, begin: int, end: int, what: str, *, alone: bool) -> Callable[[], None]:
        """Take the blocks [begin, end) for a write; returns how to give them back."""
        block_size = self.properties.block_size
        with deadline(self._requests.timeout, f"{self._name}: {what}"):
            held = await self._ranges.acquire(begin // block_size, end // block_size, alone=alone)
        return partial(self._ranges.release, held)


async def open_device(
    path: str,
    *,
    name: str,
    writable: bool,
    timeout: float,
    closed: Callable[[], Awaitable[None]] | None = None,
    resize: Callable[[int], Awaitable[None]] | None = None,
) -> BlockDevice:
    """Open the block device at `path`; messages call it `name`. VolumeNotFound, BackendError; BackendTimeout after
    `timeout` seconds.

    `closed` is called once the volume has let go of the device, or has given up to: to take away what was set up for
    it. Not when this fails. `resize` makes the device that many bytes long, if somebody can.
    """
    requests = DeviceRequests(name, timeout)
    try:
        with local_errors("open", name):
            fd, block_size, size = await requests.run(
                lambda _: _open(path, writable), "open", late=lambda opened: os.close(opened[0])
            )
    except BaseException:
        requests.start_closing(lambda: None)
        raise
    properties = Properties(size, block_size, writable, can_resize=writable and resize is not None)
    return BlockDevice(fd, name, properties, requests, closed, resize)


def _open(path: str, writable: bool) -> tuple[int, int, int]:
    fd = os.open(path, os.O_CLOEXEC | os.O_DIRECT | (os.O_RDWR if writable else os.O_RDONLY))
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
        (block_size,) = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, b"\0" * 4))
        return fd, block_size, end_of(fd)
    except BaseException:
        os.close(fd)
        raise


def _pread_all(fd: int, offset: int, length: int, buffer: Buffer) -> bytes:
    memory = buffer.of(length)
    done = 0
    while done < length:
        got = os.preadv(fd, [memory[done:]], offset + done)
        if not got:
            # Somebody shortened it behind our back. A short answer would look like the end of the volume.
            raise OSError(errno.EIO, f"ends at {offset + done}, before {offset + length}")
        done += got
    return bytes(memory)


def _pwrite_all(fd: int, offset: int, data: memoryview, buffer: Buffer) -> None:
    memory = buffer.of(len(data))
    memory[:] = data
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memory[done:], offset + done)
