"""Reading on in advance for a handle that bypasses the page cache, and with it the kernel's own read-ahead.

A program that reads a volume from one end to the other with O_DIRECT has one request under way at a time, and the
storage idles between them. Once such a stream shows, what it will ask for next is read before it asks. What the storage
knows to be a hole is not read at all: of a volume that is mostly empty, dd spends most of its time there.

What was read ahead is given out once, only while it is at most `FRESH_SECONDS` old, and never when anything was
written through this daemon since it was asked for. So a direct read may miss what *another* client wrote less than
`FRESH_SECONDS` before, if the reader came to that place in sequence; close-to-open, which volfs promises, allows more.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

import trio

from volfs.errors import VolfsError
from volfs.volume import Volume

log = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
PIECE = 128 * 1024  # the least that is read at once; smaller requests are served from one such piece
PIECES = 8  # at most under way or waiting
STREAM = 4  # reads in a row, each beginning where the one before ended, that make a stream
# Bytes: how far behind a hole data is read ahead, so that it is not too old when its turn comes.
REACH = 32 * 1024 * 1024
PATIENCE = 64  # reads in a row before another attempt, where what was read ahead was too old to be used

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Ahead:
    """A range of the volume that will be asked for. `since`: trio's clock, when the storage was asked about it."""

    def __init__(self, volume: Volume, offset: int, length: int, since: float | None = None) -> None:
        self.offset = offset
        self.end = offset + length
        self._volume = volume
        self._since = trio.current_time() if since is None else since
        self._writes = volume.writes
        self.early = False  # there is a hole before it, in which whoever reads may stay for long

    @property
    def fresh(self) -> bool:
        return trio.current_time() - self._since <= FRESH_SECONDS and self._writes == self._volume.writes


class Piece(Ahead):
    """Bytes that are being read, or wait to be asked for."""

    def __init__(self, volume: Volume, offset: int, length: int) -> None:
        super().__init__(volume, offset, length)
        self._done = trio.Event()
        self._data: bytes | None = None

    async def fetch(self) -> None:
        try:
            self._data = await self._volume.pread(self.offset, self.end - self.offset)
        except VolfsError as exc:
            # Nobody has asked yet. Who does reads for himself, and gets the error as it is then.
            log.debug("read-ahead at %d: %s", self.offset, exc)
        finally:
            self._done.set()

    async def read(self, offset: int, length: int) -> bytes | None:
        """The bytes, or None when they are not to be had this way."""
        await self._done.wait()
        return self.give(offset, length, None) or None

    def give(self, offset: int, length: int, sink: object) -> bytes | Literal[False]:
        """Those that are there already; else False."""
        if self._data is None or len(self._data) != self.end - self.offset or not self.fresh:
            return False
        if length == len(self._data):
            return self._data
        return self._data[offset - self.offset : offset - self.offset + length]


class Hole(Ahead):
    """Zeros that need not be read."""

    ZEROES = bytes(1024 * 1024)  # what most requests are for, or more

    async def read(self, offset: int, length: int) -> bytes | None:
        """As Piece.read."""
        return self.give(offset, length, None) or None

    def give(self, offset: int, length: int, sink: object) -> bytes | Literal[False]:
        """As Piece.give."""
        if not self.fresh:
            return False
        return self.ZEROES[:length] if length <= len(self.ZEROES) else bytes(length)


class Held(Protocol):
    """As native/fuse_session.pyi has it."""

    def begin(self, start: Callable[[int, int, object], bool], offset: int, length: int, /) -> bool: ...
    def give(self, sink: object, begin: int, length: int, /) -> bool: ...


class HeldPiece(Ahead):
    """Bytes that the storage's library hands on by itself, past Python, to whose sink waits for them."""

    def __init__(self, volume: Volume, offset: int, length: int, held: Held) -> None:
        super().__init__(volume, offset, length)
        self._held = held

    def begin(self) -> bool:
        """Whether the driver does that."""
        try:
            return self._held.begin(self._volume.start_read, self.offset, self.end - self.offset)
        except OSError as exc:
            log.debug("read-ahead at %d: %s", self.offset, exc)
            return False

    async def read(self, offset: int, length: int) -> bytes | None:
        """As Piece.read: not at all. Who has no sink reads for himself."""
        return None

    def give(self, offset: int, length: int, sink: object) -> bool:
        """Whether the sink gets them, now or as soon as they come."""
        return self.fresh and self._held.give(sink, offset - self.offset, length)


class ReadAhead:
    """One handle's reads. Several at once keep the storage busy as they are, and are no stream while tasks do them.

    `window` is how many bytes are read ahead at most; 0 for never. `spawn` starts a task of the daemon's, which ends
    by the volume's own deadline and does not outlive it: closing the volume waits for its reads. `held` makes what
    keeps bytes past Python, where there is such a thing.
    """

    def __init__(
        self, volume: Volume, window: int, spawn: Spawn, held: Callable[[], Held] | None = None
    ) -> None:
        self._volume = volume
        self._window = window
        self._spawn = spawn
        self._held = held
        self._pieces: deque[Piece | HeldPiece | Hole] = deque()  # without gaps between them
        self._looking = False  # for holes
        self._next = -1  # where the stream's next read begins
        self._streak = 0
        self._reading = 0  # requests under way

    def start_read(self, offset: int, length: int, sink: object) -> bool | bytes:
        """As Volume.start_read; or the bytes, which the sink does not get then, where they are there already."""
        if offset == self._next or offset == 0:
            return self._start_in_stream(offset, length, sink)
        self._pieces.clear()
        self._streak = 0
        self._next = offset + length
        return self._volume.start_read(offset, length, sink)

    async def pread(self, offset: int, length: int) -> bytes:
        """As Volume.pread."""
        length = min(length, self._volume.properties.size - offset)
        if length <= 0:
            return b""
        self._reading += 1
        try:
            return await self._pread(offset, length)
        finally:
            self._reading -= 1

    async def _pread(self, offset: int, length: int) -> bytes:
        if offset != self._next or self._reading > 1:
            self._pieces.clear()
            self._streak = 0
        self._go_on(offset, length)
        piece = self._piece(offset, length)
        data = None if piece is None else await piece.read(offset, length)
        if data is not None:
            return data
        if piece is not None:
            self._pieces.clear()
            if not (isinstance(piece, Hole) or piece.early):
                self._streak = min(self._streak, STREAM - PATIENCE)
        return await self._volume.pread(offset, length)

    def _start_in_stream(self, offset: int, length: int, sink: object) -> bool | bytes:
        length = min(length, self._volume.properties.size - offset)
        if self._reading or self._streak < STREAM or length <= 0:
            return False
        piece = self._piece(offset, length)
        given = False if piece is None else piece.give(offset, length, sink)
        if given:
            try:
                self._go_on(offset, length, self._held)
            except Exception:  # the sink is answered, or will be: nobody may answer it again
                log.exception("read-ahead at %d: unexpected error; a bug in volfs", offset)
        return given

    def _go_on(self, offset: int, length: int, held: Callable[[], Held] | None = None) -> None:
        """Count one more read of a stream, and read ahead of it; past Python, if whoever reads has a sink."""
        self._streak += 1
        self._next = offset + length
        self._drop_before(offset)
        if self._streak > STREAM:
            self._read_on(length, held)

    def _piece(self, offset: int, length: int) -> Piece | HeldPiece | Hole | None:
        """The piece that holds these bytes."""
        self._drop_before(offset)
        first = self._pieces[0] if self._pieces else None
        return first if first and first.offset <= offset and offset + length <= first.end else None

    def _drop_before(self, offset: int) -> None:
        while self._pieces and self._pieces[0].end <= offset:
            self._pieces.popleft()

    def _read_on(self, length: int, held: Callable[[], Held] | None) -> None:
        """Start reads, of one size, until the window is full or the volume ends; over holes, a little further."""
        size = length * -(-PIECE // length)  # of whole requests, so that none lies across two pieces
        begin = self._pieces[-1].end if self._pieces else self._next
        end = min(self._volume.properties.size, self._next + REACH)
        free = min(PIECES, self._window // size) - sum(not isinstance(piece, Hole) for piece in self._pieces)
        while begin < end and free > 0:
            if (hole := self._hole(begin, length)) is not None:
                self._pieces.append(hole)
                begin = hole.end
                continue
            piece = self._fetch(begin, min(size, self._volume.properties.size - begin), held)
            piece.early = any(isinstance(it, Hole) for it in self._pieces)
            self._pieces.append(piece)
            begin = piece.end
            free -= 1

    def _fetch(self, begin: int, length: int, held: Callable[[], Held] | None) -> Piece | HeldPiece:
        if held is not None and (handed_on := HeldPiece(self._volume, begin, length, held())).begin():
            return handed_on
        piece = Piece(self._volume, begin, length)
        self._spawn(piece.fetch)
        return piece

    def _hole(self, begin: int, length: int) -> Hole | None:
        """What is known to be a hole, for one request of that length or more.

        Where nothing is known, that is asked for, and nobody waits for it: what comes next is read meanwhile.
        """
        known = self._volume.recent_extent(begin)
        if known is None:
            if not self._looking:
                self._looking = True
                self._spawn(lambda: self._look(begin))
            return None
        extent, since = known
        if extent.data:
            return None
        whole = extent.length
        if extent.end < self._volume.properties.size:
            whole -= whole % length
        return Hole(self._volume, begin, whole, since) if whole else None

    async def _look(self, offset: int) -> None:
        try:
            await self._volume.look(offset)
        except VolfsError as exc:
            log.debug("read-ahead at %d: holes: %s", offset, exc)
        finally:
            self._looking = False
