"""Copying ranges from one open volume to another, whatever their drivers, with many requests under way."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from volfs.data_ahead import PIECE, DataAhead, piece_length
from volfs.errors import VolfsError
from volfs.volume import Volume

PIECES = 16  # under way at once, each read and then written; holes too
ZEROES = bytes(PIECE)

Interrupted = Callable[[], bool]


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
        if ZEROES.startswith(data):
            # Of a source that does not know its holes. The comparison ends at the first byte that is not zero.
            await self._zero(offset, length)
        elif await self._target.pwrite(offset + self._shift, data) != length:
            raise VolfsError(f"{self._target.source.url}: shrunk meanwhile", errno.ENOSPC)
