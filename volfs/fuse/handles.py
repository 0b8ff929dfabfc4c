"""Open files: what one open(2) of a volume may do, and which errors it still has to report."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import dataclass

from volfs.backends.base import Backend
from volfs.errors import VolfsError, VolumeNotFound
from volfs.fuse.tree import VolumeNode
from volfs.readahead import ReadAhead, Spawn
from volfs.volume import Volume, VolumeTable


@dataclass(eq=False)
class OpenFile:
    """One handle on a volume. The kernel checks what its flags allow before it asks."""

    node: VolumeNode
    volume: Volume
    writable: bool
    synchronous: bool  # O_SYNC or O_DSYNC: with direct I/O the kernel leaves it to us
    pid: int  # who opened it, 0 when not in our namespace
    failures_seen: int
    ahead: ReadAhead | None  # of an O_DIRECT handle; for others the kernel reads ahead
    closing: bool = False  # close(2) was called, on what may be one of several descriptors

    async def read(self, offset: int, length: int) -> bytes:
        self.closing = False
        return await (self.ahead or self.volume).pread(offset, length)

    async def write(self, offset: int, data: bytes) -> int:
        if not self.writable:
            raise VolfsError("not open for writing", errno.EBADF)
        self.closing = False
        try:
            written = await self.volume.pwrite(offset, data)
        finally:
            self.node.changed()
        if self.synchronous:
            await self.fsync()
        return written

    async def fsync(self) -> None:
        """Flush the volume; an error of an earlier flush that this handle has not reported counts as well."""
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
        through any handle that it finds. One that may not, makes sure that the volume is still there: RBD answers
        reads of an image that was removed meanwhile with zeros.
        """
        self.closing = True
        if self.writable:
            await self.fsync()
        else:
            try:
                await self.volume.refresh()
            except VolumeNotFound as exc:
                raise VolfsError(str(exc), errno.ESTALE) from exc


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

    def written_inodes(self) -> set[int]:
        """The files that are open for writing, or mapped."""
        return {file.node.inode for file in self._files.values() if file.writable}

    async def open(self, node: VolumeNode, flags: int, pid: int) -> int:
        """Open the node's volume; returns the handle's number. EROFS for a write to what is read-only."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable and node.info.read_only:
            raise VolfsError(f"{node.info.source.url}: read-only", errno.EROFS)
        volume = await self._volumes.open(node.backend, node.info.source, writable=writable)
        handle = next(self._numbers)
        self._files[handle] = OpenFile(
            node,
            volume,
            writable=writable,
            synchronous=bool(flags & (os.O_SYNC | os.O_DSYNC)),
            pid=_process(pid),
            failures_seen=volume.failures,
            ahead=ReadAhead(volume, self._read_ahead, self._spawn) if flags & os.O_DIRECT else None,
        )
        return handle

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
