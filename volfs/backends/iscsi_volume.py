"""One open LUN: its bytes in terms of its blocks.

A request is split into commands that the target takes; their number under way is the session's matter.

Durability. A disk with a volatile cache (Caching mode page, WCE) may forget acknowledged writes until SYNCHRONIZE
CACHE. When a connection breaks, the initiator cannot tell whether the target has restarted meanwhile: targets greet
every new session with UNIT ATTENTION 29/00, "power on, reset, or bus device reset occurred", whether it was one or not.
Kernel initiators disregard it, and lose data if it was. To fail the next flush whenever a connection broke would be
honest, but wrong nearly always. So the volume keeps the writes since the last flush, `UNFLUSHED_BYTES` at most (it
flushes by itself when there are more), and writes them again, in order, on every new connection and after a reset.
A flush that returns therefore covers all writes before it, whatever happened in between. NFS clients do the same.
Blocks that were zeroed (iscsi_provisioning.py says how) are in that list, too, as a range: a write from before must not
come back over them.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from volfs.backends import scsi
from volfs.backends.base import ZEROES, BackendVolume, Extent, Properties
from volfs.backends.block_ranges import BlockRanges, whole_blocks
from volfs.backends.iscsi_disk import Disk, capacity, probe
from volfs.backends.iscsi_provisioning import Provisioner, Step
from volfs.backends.iscsi_session import Request, SenseError, Session
from volfs.errors import BackendError, BackendTimeout

if TYPE_CHECKING:
    from volfs.native.libiscsi import Command

log = logging.getLogger(__name__)

COMMAND_BYTES = 256 * 1024  # of one command: more in one go is no faster, and less keeps several under way
UNFLUSHED_BYTES = 64 * 1024 * 1024  # kept in memory for each volume that is being written
REPEATED_BYTES = 4 * 1024 * 1024  # after which what is repeated is flushed: the next break finds less of it
ZEROED_BYTES = REPEATED_BYTES  # that zeroing a range counts for among those above, at most: it is one command


class _Change(NamedTuple):
    """What was done to the bytes from `offset` on, and may have to be done again."""

    number: int  # in the order they finished
    offset: int
    length: int
    data: bytes | memoryview | None  # None: whole blocks became zeros

    @property
    def cost(self) -> int:
        """Bytes that it takes up, or stands for."""
        return self.length if self.data is not None else min(self.length, ZEROED_BYTES)


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
        self._unflushed: deque[_Change] = deque()
        self._unflushed_bytes = 0
        self._remembered = 0  # the serial number of the last one
        self._can_flush = True
        self._provisioner = Provisioner(session, disk, timeout)
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
        self.check_writable(self._session.name)
        if self._session.capacity_changed:
            await self.refresh()
        await self._write(offset, data, f"write of {len(data)} bytes at {offset}")
        await self._remember(offset, len(data), data)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        if self._session.capacity_changed:
            await self.refresh()
        block_size = self._disk.block_size
        first, end = offset // block_size, -(-(offset + length) // block_size)
        extents = []
        for run in await self._provisioner.runs(first, end):
            start, stop = max(offset, run.first * block_size), min(offset + length, run.end * block_size)
            extents.append(Extent(start, stop - start, run.data))
        return extents

    async def discard(self, offset: int, length: int) -> None:
        """As `write_zeroes`, which gives back what the disk unmaps by WRITE SAME.

        Where the disk has UNMAP instead, what holds data is zeroed, and then unmapped: in steps, so that a full disk
        that allocates what is zeroed gets it back on the way.
        """
        self.check_writable(self._session.name)
        block_size, end = self._disk.block_size, offset + length
        while offset < end:
            step = self._provisioner.unmap_step(-(-offset // block_size), end // block_size)
            if step is None:
                await self.write_zeroes(offset, end - offset)
                break
            at, stop = offset, step.end * block_size
            while at < stop:
                for extent in await self.extents(at, stop - at):
                    if extent.data:
                        await self.write_zeroes(extent.offset, extent.length)
                    at = extent.end
            if await self._carry_out(step):
                offset = stop

    async def write_zeroes(self, offset: int, length: int) -> None:
        self.check_writable(self._session.name)
        if self._session.capacity_changed:
            await self.refresh()
        block_size, end = self._disk.block_size, offset + length
        first, last = -(-offset // block_size), end // block_size
        if first >= last:
            await super().write_zeroes(offset, length)
            return
        await super().write_zeroes(offset, first * block_size - offset)
        await self._zero_blocks(first, last)
        await super().write_zeroes(last * block_size, end - last * block_size)

    async def flush(self) -> None:
        async with self._flushing:
            await self._flush()

    async def refresh(self) -> Properties:
        self._session.capacity_changed = False
        blocks, block_size, _, answer = await capacity(self._session, self._disk.lun)
        if block_size != self._disk.block_size:
            raise BackendError(f"{self._session.name}: its blocks have another size now", errno.ESTALE)
        self._disk = replace(self._disk, blocks=blocks)
        promises = replace(self._provisioner.promises, reads_zeros=scsi.parse_reads_zeros(answer))
        self._provisioner.promises = promises
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

                def read(block: int) -> Awaitable[bytes]:
                    return self._read(block, block + 1, what, setup=setup)

                for block, part in await whole_blocks(offset, data, block_size, read):
                    self._add_write(request, block, part)
            await self._session.execute(request)
        finally:
            # A write whose caller has gone may still land. Nobody may read the block's old bytes until it has.
            if blocks is not None:
                request.when_settled(partial(self._ranges.release, blocks))
            self._writes += 1

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

    async def _zero_blocks(self, first: int, last: int, *, setup: bool = False) -> None:
        """Zero blocks [first, last), and remember each step that is done."""
        block_size = self._disk.block_size
        while first < last:
            step = self._provisioner.zero_step(first, last)
            if step is None:
                break
            if await self._carry_out(step, setup=setup):
                first = step.end
                if not setup:
                    await self._remember(step.first * block_size, step.blocks * block_size, None)
        for offset in range(first * block_size, last * block_size, len(ZEROES)):
            data = memoryview(ZEROES)[: last * block_size - offset]
            if setup:
                await self._write(
                    offset, data, f"repeated zeroing of {len(data)} bytes at {offset}", setup=True
                )
            else:
                await self.pwrite(offset, data)

    async def _carry_out(self, step: Step, *, setup: bool = False) -> bool:
        """False when the disk does not take the command, or not so long a one."""
        block_size = self._disk.block_size
        what = f"{step.way.value} of {step.blocks * block_size} bytes at {step.first * block_size}"
        request = Request(what, setup=setup, undivided=True)
        # As in `_write`: what is read, changed and written back meanwhile would bring a block's old bytes back.
        blocks = None if setup else await self._ranges.acquire(step.first, step.end, alone=False)
        try:
            return await self._provisioner.carry_out(step, request)
        finally:
            if blocks is not None:
                request.when_settled(partial(self._ranges.release, blocks))
            self._writes += 1

    # --- durability ---------------------------------------------------------------------------------------------

    async def _remember(self, offset: int, length: int, data: bytes | memoryview | None) -> None:
        """Keep what was written (None: zeros over whole blocks) until the next flush, if the disk may lose it.

        Bytes cannot change; what else a view shows might, when we return.
        """
        if not self._disk.mode.volatile_cache:
            return
        if isinstance(data, memoryview) and not isinstance(data.obj, bytes):
            data = bytes(data)
        self._remembered += 1
        self._unflushed.append(_Change(self._remembered, offset, length, data))
        self._unflushed_bytes += self._unflushed[-1].cost
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
        """Let go of the changes up to serial number `last`: they are stable."""
        while self._unflushed and self._unflushed[0].number <= last:
            self._unflushed_bytes -= self._unflushed.popleft().cost

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
        self._provisioner.promises = disk.provisioning
        repeated = 0
        for change in list(self._unflushed):
            await self._repeat(change)
            repeated += change.cost
            if repeated >= REPEATED_BYTES and self._can_flush:
                await self._synchronize(setup=True)
                self._forget(change.number)
                repeated = 0

    async def _repeat(self, change: _Change) -> None:
        offset, length, data = change.offset, change.length, change.data
        if data is not None:
            await self._write(offset, data, f"repeated write of {length} bytes at {offset}", setup=True)
        else:
            block_size = self._disk.block_size
            await self._zero_blocks(offset // block_size, (offset + length) // block_size, setup=True)
