"""Open files: what one open(2) of a volume may do, and which errors it still has to report."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import dataclass

from volfs import extents
from volfs.backends.base import Backend
from volfs.copy_range import Interrupted, copy_range
from volfs.data_ahead import DataAhead
from volfs.errors import VolfsError, VolumeNotFound
from volfs.fuse import helper
from volfs.fuse.tree import VolumeNode
from volfs.readahead import ReadAhead, Spawn
from volfs.rewriting import Rewriting
from volfs.volume import Volume, VolumeTable

# What a file system of this machine would have: there, no hole begins or ends within a block. QEMU relies on that: with
# O_DIRECT it aborts when it finds one.
BLOCK = 4096

# Modes of fallocate(2). The size stays in any case.
PREALLOCATE = 0, extents.KEEP_SIZE
PUNCH_HOLE = extents.PUNCH_HOLE | extents.KEEP_SIZE
ZERO_RANGE = extents.ZERO_RANGE, extents.ZERO_RANGE | extents.KEEP_SIZE


@dataclass(eq=False)
class OpenFile:
    """One handle on a volume. The kernel checks what its flags allow before it asks."""

    node: VolumeNode
    volume: Volume
    writable: bool
    mappable: bool  # for writing: a shared mapping wants a descriptor that reads, too, and has the page cache
    synchronous: bool  # O_SYNC or O_DSYNC: with direct I/O the kernel leaves it to us
    appending: bool  # O_APPEND
    thread: int  # that opened it, and its process; 0 when not in our namespace
    pid: int
    failures_seen: int
    ahead: ReadAhead | None  # of an O_DIRECT handle; for others the kernel reads ahead
    data_ahead: DataAhead  # of copies from it, and of reads past holes that the kernel's would stop at
    untouched: bool = True  # nothing was asked of it yet
    read_to: int = 0  # the end of what was read so far
    rewriting: Rewriting | None = None  # it was opened with O_TRUNC
    closing: bool = False  # close(2) was called, on what may be one of several descriptors
    heard: int = 0  # Volume.writes when another call than close(2) last told the program that some were lost

    def start_read(self, offset: int, length: int, sink: object) -> bool | bytes:
        """Begin a read whose bytes go to the sink, or return them; False when it takes a task (`read`) to do it."""
        self.closing = self.untouched = False
        if self.ahead is None and self.data_ahead.expects(offset):
            return False
        started = (self.ahead or self.volume).start_read(offset, length, sink)
        if started:
            self.read_to = max(self.read_to, min(offset + length, self.volume.properties.size))
        return started

    def start_write(self, offset: int, data: memoryview) -> bool:
        """Do a write at once; False when it takes a task (`write`)."""
        self.closing = self.untouched = False
        if not self.writable or self.appending or self.synchronous:
            return False
        if not (self.rewriting or self.volume).start_write(offset, data):
            return False
        self.node.changed()
        return True

    async def read(self, offset: int, length: int) -> bytes:
        self.closing = self.untouched = False
        data = await (self.ahead.pread if self.ahead else self.data_ahead.read)(offset, length)
        if data:
            self.read_to = max(self.read_to, offset + len(data))
        return data

    async def write(self, offset: int, data: bytes, synchronous: bool = False) -> int:
        if not self.writable:
            raise VolfsError("not open for writing", errno.EBADF)
        self.closing = self.untouched = False
        if self.appending:
            # Past the end always, whatever offset a kernel that was told O_TRUNC takes for it.
            raise VolfsError(f"{self.volume.source.url}: append: a volume does not grow", errno.ENOSPC)
        try:
            written = await (self.rewriting or self.volume).pwrite(offset, data)
        finally:
            self.node.changed()
        if self.synchronous or synchronous:
            await self.fsync()
        return written

    async def seek(self, offset: int, whence: int) -> int:
        """The next place at or after `offset` that is data (SEEK_DATA, ENXIO if none) or hole (SEEK_HOLE, the end).

        Of whole blocks: of a hole, what it has of a block with data is data as well.
        """
        self.closing = self.untouched = False
        size = self.volume.properties.size
        if not 0 <= offset < size:
            raise VolfsError(f"{self.volume.source.url}: seek to {offset}: past the end", errno.ENXIO)
        at = offset - offset % BLOCK
        while at < size:
            end, data = await self._run_of_blocks(at, size)
            if data == (whence == os.SEEK_DATA):
                if data:
                    self.data_ahead.seeked(max(at, offset))
                return max(at, offset)
            at = end
        if whence == os.SEEK_DATA:
            raise VolfsError(f"{self.volume.source.url}: no data behind that", errno.ENXIO)
        return size

    async def _run_of_blocks(self, at: int, size: int) -> tuple[int, bool]:
        """Where the run of whole blocks ends that begins at `at`, and whether it is data: as a block with any is."""
        extent = await self.volume.extent(at, size - at)
        if extent.data:
            return min(-(-extent.end // BLOCK) * BLOCK, size), True
        if extent.end == size:
            return size, False
        if extent.length >= BLOCK:
            return extent.end - extent.end % BLOCK, False
        end = min(at + BLOCK, size)
        while extent.end < end:
            extent = await self.volume.extent(extent.end, end - extent.end)
            if extent.data:
                return end, True
        return end, False

    async def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2). Space is the backend's to allocate; a hole is made where that is asked for."""
        self.closing = self.untouched = False
        room = self.volume.properties.size - offset
        if mode == PUNCH_HOLE:
            length = min(length, room)  # nothing is past the end, nor allocated there
        elif mode not in (*PREALLOCATE, *ZERO_RANGE):
            raise VolfsError(f"{self.volume.source.url}: fallocate: mode {mode:#x}", errno.EOPNOTSUPP)
        elif length > room:
            raise VolfsError(f"{self.volume.source.url}: fallocate: a volume does not grow", errno.ENOSPC)
        if length <= 0 or mode in PREALLOCATE:
            return
        zero = self.volume.discard if mode == PUNCH_HOLE else self.volume.write_zeroes
        try:
            if self.rewriting is not None:
                await self.rewriting.reach(offset, length)
            await zero(offset, length)
        finally:
            self.node.changed()
        if self.synchronous:
            await self.fsync()

    async def copy_from(
        self, source: OpenFile, source_offset: int, offset: int, length: int, interrupted: Interrupted
    ) -> int:
        """copy_file_range(2) from another handle; how much, see `copy_range`."""
        for file in (self, source):
            file.closing = file.untouched = False
        try:
            if self.rewriting is not None:
                length = min(length, source.volume.properties.size - source_offset)
                await self.rewriting.reach(offset, max(length, 0))
            copied = await copy_range(
                source.data_ahead, source_offset, self.volume, offset, length, interrupted
            )
        finally:
            self.node.changed()
        source.read_to = max(source.read_to, source_offset + copied)
        if self.synchronous:
            await self.fsync()
        return copied

    def truncate_at_open(self) -> None:
        """O_TRUNC, which keeps size and content, until the program writes and skips."""
        self.untouched = False
        self.rewriting = Rewriting(self.volume)

    async def extend(self) -> None:
        """ftruncate(2) to the volume's size: what a program does that ends with a hole."""
        self.untouched = False
        if self.rewriting is not None:
            try:
                await self.rewriting.finish()
            finally:
                self.node.changed()

    async def fsync(self) -> None:
        """Flush the volume; an error of an earlier flush that this handle has not reported counts as well."""
        try:
            await self._flush()
        except VolfsError:
            self.heard = self.volume.writes
            raise

    async def _flush(self) -> None:
        try:
            await self.volume.flush()
        finally:
            failed = self.volume.failures > self.failures_seen
            self.failures_seen = self.volume.failures
        if failed and self.volume.last_failure is not None:
            raise self.volume.last_failure

    async def close(self) -> None:
        """close(2): the last call whose error the program sees.

        A handle that may write flushes here, whether it wrote or not: the kernel writes pages of a shared mapping
        through any handle that it finds. One that may not, makes sure that what it read is still there: RBD answers
        reads of an image that was removed or shrunk meanwhile with zeros.
        """
        self.closing, self.untouched = True, False
        if self.writable:
            try:
                await self._flush()
            except VolfsError as exc:
                if self.volume.writes > self.heard:
                    self.volume.unheard = exc
                raise
        elif self.read_to:  # some backends run half a dozen programs to find out
            try:
                size = (await self.volume.refresh()).size
            except VolumeNotFound as exc:
                raise VolfsError(str(exc), errno.ESTALE) from exc
            if size < self.read_to:
                raise VolfsError(f"{self.volume.source.url}: shrunk to {size} bytes meanwhile", errno.ESTALE)


class OpenFiles:
    """The open files by handle number. A number is never used twice."""

    def __init__(self, volumes: VolumeTable, read_ahead: int, spawn: Spawn) -> None:
        """`read_ahead` bytes and `spawn` are for ReadAhead."""
        self._volumes = volumes
        self._read_ahead = read_ahead
        self._spawn = spawn
        self._files: dict[int, OpenFile] = {}
        self._numbers = itertools.count(1)

    def __getitem__(self, handle: int) -> OpenFile:
        return self._files[handle]

    def of(self, backend: Backend, source: object) -> list[OpenFile]:
        """The handles on one volume."""
        return [
            it for it in self._files.values() if it.node.backend is backend and it.node.info.source == source
        ]

    def opening(self, node: VolumeNode, thread: int) -> OpenFile | None:
        """The handle on the volume that a thread is in the middle of opening, as far as can be told.

        The last one: those that it opened before may be untouched as well.
        """
        return next(
            (
                it
                for it in reversed(self._files.values())
                if it.node is node and it.thread == thread and it.untouched
            ),
            None,
        )

    def may_be_mapped(self, node: VolumeNode) -> bool:
        """Whether a program may be changing the volume by mmap, of which we know when the kernel writes back."""
        return any(it.node is node and it.mappable for it in self._files.values())

    def written_inodes(self) -> set[int]:
        """The files that are open for writing, or mapped."""
        return {file.node.inode for file in self._files.values() if file.writable}

    async def open(self, node: VolumeNode, flags: int, thread: int) -> int:
        """Open the node's volume; returns the handle's number. EROFS for a write to what is read-only."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable and node.info.read_only:
            raise VolfsError(f"{node.info.source.url}: read-only", errno.EROFS)
        volume = await self._volumes.open(node.backend, node.info.source, writable=writable)
        handle = next(self._numbers)
        self._files[handle] = file = OpenFile(
            node,
            volume,
            writable=writable,
            mappable=flags & (os.O_ACCMODE | os.O_DIRECT) == os.O_RDWR,
            synchronous=bool(flags & (os.O_SYNC | os.O_DSYNC)),
            appending=bool(flags & os.O_APPEND),
            thread=thread,
            pid=_process(thread),
            failures_seen=volume.failures,
            ahead=self._direct(volume) if flags & os.O_DIRECT else None,
            data_ahead=DataAhead(volume, self._read_ahead, self._spawn),
        )
        if flags & os.O_TRUNC:
            file.truncate_at_open()
        return handle

    def _direct(self, volume: Volume) -> ReadAhead:
        return ReadAhead(volume, self._read_ahead, self._spawn, None if helper is None else helper.HeldRead)

    async def release(self, handle: int) -> None:
        """The last descriptor of the handle is closed."""
        file = self._files.pop(handle)
        await self._volumes.release(file.node.backend, file.node.info.source)


def _process(thread: int) -> int:
    """The process that a thread belongs to: FUSE tells the thread. 0 when that is unknown, or not in our namespace."""
    try:
        with open(f"/proc/{thread}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))
    except (OSError, StopIteration):
        return 0
