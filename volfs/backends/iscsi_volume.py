"""One open LUN: its bytes in terms of its blocks.

A request is split into commands that the target takes; their number under way is the session's matter. What begins or
ends inside a block is read, changed and written back, alone on the blocks it touches, so that neighbours who write
other bytes of the same block at the same time both find theirs there.

Durability. A disk with a volatile cache (Caching mode page, WCE) may forget acknowledged writes until SYNCHRONIZE
CACHE. When a connection breaks, the initiator cannot tell whether the target has restarted meanwhile: targets greet
every new session with UNIT ATTENTION 29/00, "power on, reset, or bus device reset occurred", whether it was one or not.
Kernel initiators disregard it, and lose data if it was. To fail the next flush whenever a connection broke would be
honest, but wrong nearly always. So the volume keeps the writes since the last flush, `UNFLUSHED_BYTES` at most (it
flushes by itself when there are more), and writes them again, in order, on every new connection and after a reset.
A flush that returns therefore covers all writes before it, whatever happened in between. NFS clients do the same.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from volfs.backends import scsi
from volfs.backends.base import BackendVolume, Properties
from volfs.backends.iscsi_disk import Disk, capacity, probe
from volfs.backends.iscsi_session import Request, SenseError, Session
from volfs.errors import BackendError, BackendTimeout

if TYPE_CHECKING:
    from volfs.native.libiscsi import Command

log = logging.getLogger(__name__)

COMMAND_BYTES = 256 * 1024  # of one command: more in one go is no faster, and less keeps several under way
UNFLUSHED_BYTES = 64 * 1024 * 1024  # kept in memory for each volume that is being written
REPEATED_BYTES = (
    4 * 1024 * 1024
)  # after which what is repeated is flushed, so that the next break finds less of it


class _Range:
    """Blocks [first, end) that a write is under way on; `alone` when it also writes bytes that are not its own."""

    __slots__ = ("alone", "done", "end", "first")

    def __init__(self, first: int, end: int, alone: bool) -> None:
        self.first, self.end, self.alone = first, end, alone
        self.done: trio.Event | None = None


class BlockRanges:
    """The writes under way. Two that share a block exclude each other when one of them is to be alone on it."""

    def __init__(self) -> None:
        self._held: set[_Range] = set()
        self._alone = 0

    async def acquire(self, first: int, end: int, *, alone: bool) -> _Range:
        while (alone or self._alone) and (other := self._conflict(first, end, alone)):
            if other.done is None:
                other.done = trio.Event()
            await other.done.wait()
        held = _Range(first, end, alone)
        self._held.add(held)
        self._alone += alone
        return held

    def release(self, held: _Range) -> None:
        self._held.remove(held)
        self._alone -= held.alone
        if held.done is not None:
            held.done.set()

    def _conflict(self, first: int, end: int, alone: bool) -> _Range | None:
        for held in self._held:
            if first < held.end and held.first < end and (alone or held.alone):
                return held
        return None


class IscsiVolume(BackendVolume):
    """An open LUN. Owns its session."""

    def __init__(self, session: Session, disk: Disk, *, writable: bool, timeout: float) -> None:
        self._session = session
        self._disk = disk
        self._max_blocks = min(disk.max_blocks, max(1, COMMAND_BYTES // disk.block_size))  # in one command
        self._timeout = timeout
        self._ranges = BlockRanges()
        self._flushing = trio.Lock()
        self._writes = 0  # finished since the last flush began
        # Serial number, offset and data of writes, in the order they finished.
        self._unflushed: deque[tuple[int, int, bytes | memoryview]] = deque()
        self._unflushed_bytes = 0
        self._remembered = 0  # the serial number of the last one
        self._can_flush = True
        self._closed = False
        self.properties = Properties(disk.size, disk.block_size, writable)
        session.resume = self._resume
        session.resume_after_reset = disk.mode.volatile_cache

    async def pread(self, offset: int, length: int) -> bytes:
        if self._session.capacity_changed:
            await self.refresh()
        block_size = self._disk.block_size
        first, end = offset // block_size, -(-(offset + length) // block_size)
        data = await self._read(first, end, f"read of {length} bytes at {offset}")
        start = offset - first * block_size
        return data if len(data) == length else data[start : start + length]

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        if self._session.capacity_changed:
            await self.refresh()
        await self._write(offset, data, f"write of {len(data)} bytes at {offset}")
        if self._disk.mode.volatile_cache:
            await self._remember(offset, data)

    async def flush(self) -> None:
        async with self._flushing:
            await self._flush()

    async def refresh(self) -> Properties:
        self._session.capacity_changed = False
        blocks, block_size, _ = await capacity(self._session, self._disk.lun)
        if block_size != self._disk.block_size:
            raise BackendError(f"{self._session.name}: its blocks have another size now", errno.ESTALE)
        self._disk = replace(self._disk, blocks=blocks)
        self.properties = Properties(self._disk.size, block_size, self.properties.writable)
        return self.properties

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        end = trio.current_time() + self._timeout
        try:
            with trio.move_on_at(end) as scope:
                scope.shield = True
                await self.flush()
            if scope.cancelled_caught:
                raise BackendTimeout(f"{self._session.name}: close: no answer within {self._timeout:g} s")
        finally:
            await self._session.aclose(end)

    # --- blocks -------------------------------------------------------------------------------------------------

    async def _read(self, first: int, end: int, what: str, *, setup: bool = False) -> bytes:
        disk, library = self._disk, self._session.library
        request = Request(what, setup=setup)
        data: bytes = library.new_buffer((end - first) * disk.block_size)
        for block in range(first, end, self._max_blocks):
            count = min(self._max_blocks, end - block)
            command: Command = library.Command(
                disk.lun,
                disk.transfers.read(block, count),
                request,
                into=data,
                start=(block - first) * disk.block_size,
                length=count * disk.block_size,
            )
            request.commands.append(command)
        missing = await self._session.execute(request)
        if missing:  # there would be in its place what was in memory before
            raise BackendError(f"{self._session.name}: {what}: {missing} bytes are missing", errno.EIO)
        return data

    async def _write(self, offset: int, data: bytes | memoryview, what: str, *, setup: bool = False) -> None:
        block_size = self._disk.block_size
        end = offset + len(data)
        whole = offset % block_size == 0 and end % block_size == 0
        request = Request(what, setup=setup, undivided=True)
        blocks = None
        if not setup:  # else nothing is under way, and what waits to be sent again waits for us
            blocks = await self._ranges.acquire(offset // block_size, -(-end // block_size), alone=not whole)
        try:
            if whole:
                self._add_write(request, offset // block_size, data)
            else:
                for block, part in await self._whole_blocks(offset, data, what, setup):
                    self._add_write(request, block, part)
            await self._session.execute(request)
        finally:
            # A write whose caller has gone may still land. Nobody may read the block's old bytes until it has.
            if blocks is not None:
                request.when_settled(partial(self._ranges.release, blocks))
            self._writes += 1

    async def _whole_blocks(
        self, offset: int, data: bytes | memoryview, what: str, setup: bool
    ) -> list[tuple[int, bytes | memoryview]]:
        """Complete the first and the last block with what is on the disk. The caller is alone on them."""
        block_size = self._disk.block_size
        view = memoryview(data)
        first, head = divmod(offset, block_size)
        last, tail = divmod(offset + len(data), block_size)
        if first == last:
            old = await self._read(first, first + 1, what, setup=setup)
            return [(first, b"".join((old[:head], view, old[tail:])))]
        parts: list[tuple[int, bytes | memoryview]] = []
        start, stop = 0, len(data)
        if head:
            old = await self._read(first, first + 1, what, setup=setup)
            start = block_size - head
            parts.append((first, old[:head] + bytes(view[:start])))
            first += 1
        if tail:
            old = await self._read(last, last + 1, what, setup=setup)
            stop -= tail
            parts.append((last, bytes(view[stop:]) + old[tail:]))
        if start < stop:
            parts.append((first, view[start:stop]))
        return parts

    def _add_write(self, request: Request, first: int, data: bytes | memoryview) -> None:
        """Add the commands that write whole blocks from `first` on."""
        disk, library = self._disk, self._session.library
        end = first + len(data) // disk.block_size
        for block in range(first, end, self._max_blocks):
            count = min(self._max_blocks, end - block)
            command: Command = library.Command(
                disk.lun,
                disk.transfers.write(block, count),
                request,
                data=data,
                start=(block - first) * disk.block_size,
                length=count * disk.block_size,
            )
            request.commands.append(command)

    # --- durability ---------------------------------------------------------------------------------------------

    async def _remember(self, offset: int, data: bytes | memoryview) -> None:
        """Keep a write until the next flush. Bytes cannot change; what else a view shows might, when we return."""
        if isinstance(data, memoryview) and not isinstance(data.obj, bytes):
            data = bytes(data)
        self._remembered += 1
        self._unflushed.append((self._remembered, offset, data))
        self._unflushed_bytes += len(data)
        # While one flush is under way, writers go on, but not for ever.
        if self._unflushed_bytes >= UNFLUSHED_BYTES * (2 if self._flushing.locked() else 1):
            async with self._flushing:
                if self._unflushed_bytes >= UNFLUSHED_BYTES:
                    await self._flush()

    async def _flush(self) -> None:
        writes, last = self._writes, self._remembered
        if writes and self._can_flush:
            await self._synchronize()
        self._writes -= writes
        self._forget(last)
        error, self._session.deferred_error = self._session.deferred_error, None
        if error is not None:
            raise error

    def _forget(self, last: int) -> None:
        """Let go of the writes up to serial number `last`: they are stable."""
        while self._unflushed and self._unflushed[0][0] <= last:
            _, _, data = self._unflushed.popleft()
            self._unflushed_bytes -= len(data)

    async def _synchronize(self, *, setup: bool = False) -> None:
        request = Request("SYNCHRONIZE CACHE", setup=setup)
        request.commands.append(
            self._session.library.Command(self._disk.lun, self._disk.transfers.synchronize_cache(), request)
        )
        try:
            await self._session.execute(request)
        except SenseError as exc:
            if (exc.sense_key, exc.ascq) != (scsi.ILLEGAL_REQUEST, scsi.INVALID_OPCODE):
                raise
            # The command may be missing only where there is no cache that it could write out.
            log.info("%s: no SYNCHRONIZE CACHE: every write is stable", self._session.name)
            self._can_flush = False

    async def _resume(self) -> None:
        """Make a new connection as good as the old one was. Nothing else is under way on it."""
        disk = await probe(self._session, self._disk.lun, setup=True)
        if disk is None or disk.identity != self._disk.identity:
            raise BackendError(f"{self._session.name}: this is another disk now", errno.ESTALE)
        repeated = 0
        for number, offset, data in list(self._unflushed):
            await self._write(offset, data, f"repeated write of {len(data)} bytes at {offset}", setup=True)
            repeated += len(data)
            if repeated >= REPEATED_BYTES and self._can_flush:
                await self._synchronize(setup=True)
                self._forget(number)
                repeated = 0
