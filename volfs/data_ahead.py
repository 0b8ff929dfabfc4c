"""Reading data in advance for programs that go from one run of data to the next, over the holes between.

Such a program waits for every run that it comes to, for nobody else reads ahead there: the kernel begins anew after a
seek, and copies ask for one range after the other. How a program goes shows in two ways: a read begins just where
SEEK_DATA said that data is, or a copy where the data behind the copy before it is.

The kernel itself reads ahead within a run, and far into the hole behind it, for nobody: 11 MiB with each run of 4 MiB
that a cp copies. Those reads are refused, which no program gets to see: the kernel asks for a page that it lacks by a
request of its own, once a program wants it.
"""

from __future__ import annotations

import errno

from volfs.errors import VolfsError
from volfs.readahead import Piece, Spawn
from volfs.volume import Volume

PIECE = 2 * 1024 * 1024  # bytes that are read at once; pieces meet at multiples of it
PIECES = 16  # at most, where they are smaller than that
PAGE = 4096  # bytes: a request for no more may have a program waiting for it


def piece_length(offset: int, length: int) -> int:
    """How much of a run of data that begins there is one piece."""
    return min(length, PIECE - offset % PIECE)


class DataAhead:
    """One handle's reads where they go by runs of data, and its reads as the source of copies.

    What is given out is as old as ReadAhead's bytes may be, and never from before a write of ours. `spawn` and `window`
    are as there.
    """

    def __init__(self, volume: Volume, window: int, spawn: Spawn) -> None:
        self.volume = volume
        self._window = window
        self._spawn = spawn
        self._pieces: dict[int, Piece] = {}  # by offset
        self._next = -1  # where this program reads or copies next if it goes by runs of data
        self._by_runs = False  # it reads like that
        self._behind: int | None = None  # from where on to read in advance, until the task below has seen it
        self._reading_on = False

    def seeked(self, offset: int) -> None:
        """The program was told that data begins there."""
        self._next = offset

    def copied(self, begin: int, end: int) -> None:
        """A copy of this range was begun."""
        follows, self._next = begin == self._next, -1
        if self._window:
            self._spawn(lambda: self._find_next(end, follows))

    def expects(self, offset: int) -> bool:
        """Whether a read there is for `read` to do; any other may go straight to the volume."""
        return self._by_runs or offset == self._next

    async def read(self, offset: int, length: int) -> bytes:
        """As Volume.pread: the program's own reads. EAGAIN for what only the kernel wants."""
        if not self.expects(offset):
            return await self.volume.pread(offset, length)
        end = min(offset + length, self.volume.properties.size)
        pieces = self._pieces_of(offset, end)
        if offset == self._next:
            self._by_runs, self._next = True, -1
        elif not pieces:
            if length > PAGE and await self._is_hole(offset, end):
                raise VolfsError(
                    f"{self.volume.source.url}: read at {offset}: ahead, in a hole", errno.EAGAIN
                )
            self._by_runs = False
            return await self.volume.pread(offset, length)
        self._read_on(end)
        return await self._join(pieces, offset, end)

    async def pread(self, offset: int, length: int) -> bytes:
        """As Volume.pread: the reads of copies, piece by piece."""
        piece = self._pieces.pop(offset, None)
        return await self._join([piece] if piece else [], offset, offset + length)

    def _piece(self, offset: int) -> Piece | None:
        return next((it for it in self._pieces.values() if it.offset <= offset < it.end), None)

    def _pieces_of(self, offset: int, end: int) -> list[Piece]:
        """The pieces that hold the range from its beginning on, as far as they go."""
        pieces = []
        while offset < end and (piece := self._piece(offset)):
            pieces.append(piece)
            offset = piece.end
        return pieces

    async def _is_hole(self, offset: int, end: int) -> bool:
        while offset < end:
            extent = await self.volume.extent(offset, end - offset)
            if extent.data:
                return False
            offset = extent.end
        return True

    async def _join(self, pieces: list[Piece], offset: int, end: int) -> bytes:
        """The bytes of the range: out of the pieces first, the rest from the volume."""
        parts = []
        for piece in pieces:
            data = await piece.read(offset, min(end, piece.end) - offset)
            if data is None:
                break
            parts.append(data)
            offset += len(data)
        if offset < end:
            parts.append(await self.volume.pread(offset, end - offset))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _find_next(self, offset: int, follows: bool) -> None:
        size = self.volume.properties.size
        try:
            while offset < size:
                extent = await self.volume.extent(offset, size - offset)
                if extent.data:
                    self._next = offset
                    break
                offset = extent.end
        except VolfsError:
            return  # who asks for it will be told
        if follows:
            self._read_on(offset)

    def _read_on(self, offset: int) -> None:
        """Have the data at `offset` and behind it read, as much as the window holds."""
        self._behind = offset
        if self._window and not self._reading_on:
            self._reading_on = True
            self._spawn(self._keep_reading_on)

    async def _keep_reading_on(self) -> None:
        try:
            while self._behind is not None:
                offset, self._behind = self._behind, None
                await self._fill(offset)
        except VolfsError:
            pass  # as above
        finally:
            self._reading_on = False

    async def _fill(self, offset: int) -> None:
        # What is of no use any more, as well: nothing before the offset will be asked for.
        self._pieces = {it.offset: it for it in self._pieces.values() if it.end > offset and it.fresh}
        size = self.volume.properties.size
        room = self._window - sum(it.end - it.offset for it in self._pieces.values())
        while offset < size and room > 0 and len(self._pieces) < PIECES:
            if (piece := self._piece(offset)) is not None:
                offset = piece.end
                continue
            extent = await self.volume.extent(offset, size - offset)
            if not extent.data:
                offset = extent.end
                continue
            length = piece_length(offset, extent.length)
            self._pieces[offset] = piece = Piece(self.volume, offset, length)
            self._spawn(piece.fetch)
            offset += length
            room -= length
