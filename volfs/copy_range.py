"""Copying ranges from one open volume to another, whatever their drivers, with many requests under way.

A program that copies a sparse volume asks for one run of data after the other, and waits for each. So what follows the
range that it asked for, past the hole, is read in advance once it turns out to go on like that.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from volfs.errors import VolfsError
from volfs.readahead import Piece, Spawn
from volfs.volume import Volume

PIECE = 2 * 1024 * 1024  # bytes of one read and the write that follows
PIECES = 16  # under way at once, holes too; and read in advance

Interrupted = Callable[[], bool]


class DataAhead:
    """The source of copies by one handle: reads, and what was read in advance.

    As old as ReadAhead's bytes may be, and never from before a write of ours. `spawn` and `window` are as there.
    """

    def __init__(self, volume: Volume, window: int, spawn: Spawn) -> None:
        self.volume = volume
        self._spawn = spawn
        self._most = min(PIECES, window // PIECE)
        self._pieces: dict[int, Piece] = {}  # by offset
        self._next = -1  # the data that follows what was copied last

    async def pread(self, offset: int, length: int) -> bytes:
        """As Volume.pread."""
        piece = self._pieces.pop(offset, None)
        if piece is not None:
            data = await piece.read(offset, length)
            if data is not None:
                return data
        return await self.volume.pread(offset, length)

    def copied(self, begin: int, end: int) -> None:
        """A copy of this range was begun: read on behind it if it follows the one before."""
        if self._most:
            follows, self._next = begin == self._next, -1
            self._spawn(lambda: self._read_on(end, follows))

    async def _read_on(self, offset: int, follows: bool) -> None:
        # What is of no use any more, as well: read on from here, nothing before it will be asked for.
        self._pieces = {
            begin: piece for begin, piece in self._pieces.items() if begin >= offset and piece.fresh
        }
        size, first = self.volume.properties.size, True
        try:
            while offset < size and (first or (follows and len(self._pieces) < self._most)):
                extent = await self.volume.extent(offset, size - offset)
                if not extent.data:
                    offset = extent.end
                    continue
                if first:
                    self._next, first = offset, False
                length = piece_length(offset, extent.length)
                if follows and offset not in self._pieces:
                    self._pieces[offset] = piece = Piece(self.volume, offset, length)
                    self._spawn(piece.fetch)
                offset += length
        except VolfsError:
            pass  # who asks for it will be told


async def copy_range(
    source: DataAhead,
    source_offset: int,
    target: Volume,
    target_offset: int,
    length: int,
    interrupted: Interrupted = lambda: False,
) -> int:
    """Copy up to `length` bytes and return how many, from the beginning on, are copied.

    That is less at the end of the source or the target, when an error comes behind the first byte, and soon after
    `interrupted()` holds; EINTR when that is before the first byte. Holes become holes. ENOSPC at or past the target's
    end, EINVAL where the ranges overlap.
    """
    length = min(length, source.volume.properties.size - source_offset)
    if length <= 0:
        return 0
    room = target.properties.size - target_offset
    if room <= 0:
        raise VolfsError(f"{target.source.url}: copy to {target_offset}: past the end", errno.ENOSPC)
    length = min(length, room)
    if source.volume is target and abs(source_offset - target_offset) < length:
        raise VolfsError(f"{target.source.url}: copy: the ranges overlap", errno.EINVAL)
    copy = _Copy(source, target, target_offset - source_offset, interrupted)
    return await copy.run(source_offset, source_offset + length) - source_offset


def piece_length(offset: int, length: int) -> int:
    """How much of a run of data that begins there is one piece: they meet at multiples of PIECE."""
    return min(length, PIECE - offset % PIECE)


class _Copy:
    """One call. Offsets are the source's; `shift` more is the target's."""

    def __init__(self, source: DataAhead, target: Volume, shift: int, interrupted: Interrupted) -> None:
        self._source = source
        self._target = target
        self._shift = shift
        self._interrupted = interrupted
        self._slots = trio.Semaphore(PIECES)
        self._failed_at: int | None = None  # the first piece that failed
        self._failure: VolfsError | None = None

    async def run(self, begin: int, end: int) -> int:
        """Copy, and return where the part ends that is copied without a gap."""
        offset = begin
        async with trio.open_nursery() as nursery:
            while offset < end and self._failure is None and not self._interrupted():
                try:
                    extent = await self._source.volume.extent(offset, end - offset)
                except VolfsError as exc:
                    self._fail(offset, exc)
                    break
                if extent.data:
                    length, piece = piece_length(offset, extent.length), self._copy
                else:
                    length, piece = extent.length, self._zero
                await self._slots.acquire()
                nursery.start_soon(self._run_piece, piece, offset, length)
                offset += length
            if offset == end:
                self._source.copied(begin, end)
        if self._failure is None or self._failed_at is None:
            if offset == begin:  # a count of 0 would tell the program that the source ends here
                raise VolfsError(f"{self._target.source.url}: copy: interrupted", errno.EINTR)
            return offset
        if self._failed_at == begin:
            raise self._failure
        return self._failed_at

    async def _run_piece(
        self, piece: Callable[[int, int], Awaitable[None]], offset: int, length: int
    ) -> None:
        try:
            await piece(offset, length)
        except VolfsError as exc:
            self._fail(offset, exc)
        finally:
            self._slots.release()

    def _fail(self, offset: int, failure: VolfsError) -> None:
        """To be told when the pieces before it are done: one of them may fail, too.

        Not raised at once, either: the nursery would wrap it in a group, which has no errno.
        """
        if self._failed_at is None or offset < self._failed_at:
            self._failed_at, self._failure = offset, failure

    async def _zero(self, offset: int, length: int) -> None:
        await self._target.clear(offset + self._shift, length)

    async def _copy(self, offset: int, length: int) -> None:
        data = await self._source.pread(offset, length)
        if len(data) != length:
            raise VolfsError(
                f"{self._source.volume.source.url}: shrunk to {offset + len(data)} bytes", errno.EIO
            )
        if await self._target.pwrite(offset + self._shift, data) != length:
            raise VolfsError(f"{self._target.source.url}: shrunk meanwhile", errno.ENOSPC)
