"""Reading on in advance for a handle that bypasses the page cache, and with it the kernel's own read-ahead.

A program that reads a volume from one end to the other with O_DIRECT has one request under way at a time, and the
storage idles between them. Once such a stream shows, what it will ask for next is read before it asks.

What was read ahead is given out once, only while it is at most `FRESH_SECONDS` old, and never when anything was
written through this daemon since it was asked for. So a direct read may miss what *another* client wrote less than
`FRESH_SECONDS` before, if the reader came to that place in sequence; close-to-open, which volfs promises, allows more.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from volfs.errors import VolfsError
from volfs.volume import Volume

log = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
PIECE = 128 * 1024  # the least that is read at once; smaller requests are served from one such piece
PIECES = 4  # at most under way or waiting; with more, a plain dd would fall behind one with iflag=direct
STREAM = 4  # reads in a row, each beginning where the one before ended, that make a stream
PATIENCE = 64  # reads in a row before another attempt, where what was read ahead was too old to be used

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Piece:
    """Bytes of the volume that are being read, or wait to be asked for."""

    def __init__(self, volume: Volume, offset: int, length: int) -> None:
        self.offset = offset
        self.end = offset + length
        self._volume = volume
        self._since = trio.current_time()
        self._writes = volume.writes
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

    @property
    def fresh(self) -> bool:
        return trio.current_time() - self._since <= FRESH_SECONDS and self._writes == self._volume.writes

    async def read(self, offset: int, length: int) -> bytes | None:
        """The bytes, or None when they are not to be had this way."""
        await self._done.wait()
        if self._data is None or len(self._data) != self.end - self.offset or not self.fresh:
            return None
        if length == len(self._data):
            return self._data
        return self._data[offset - self.offset : offset - self.offset + length]


class ReadAhead:
    """One handle's reads. Several at once keep the storage busy as they are, and are no stream.

    `window` is how many bytes are read ahead at most; 0 for never. `spawn` starts a task of the daemon's, which ends
    by the volume's own deadline and does not outlive it: closing the volume waits for its reads.
    """

    def __init__(self, volume: Volume, window: int, spawn: Spawn) -> None:
        self._volume = volume
        self._window = window
        self._spawn = spawn
        self._pieces: deque[Piece] = deque()
        self._next = -1  # where the stream's next read begins
        self._streak = 0
        self._reading = 0  # requests under way

    def start_read(self, offset: int, length: int, sink: object) -> bool:
        """As Volume.start_read, but where a stream shows or may begin."""
        if offset == self._next or offset == 0:
            return False
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
        self._streak += 1
        self._next = offset + length
        if self._streak > STREAM:
            self._read_on(length)
        piece = self._piece(offset, length)
        data = None if piece is None else await piece.read(offset, length)
        if data is not None:
            return data
        if piece is not None:
            self._pieces.clear()
            self._streak = min(self._streak, STREAM - PATIENCE)
        return await self._volume.pread(offset, length)

    def _piece(self, offset: int, length: int) -> Piece | None:
        """The piece that holds these bytes; those before it are done with."""
        while self._pieces and self._pieces[0].end <= offset:
            self._pieces.popleft()
        if self._pieces and self._pieces[0].offset <= offset and offset + length <= self._pieces[0].end:
            piece = self._pieces[0]
            if piece.end == offset + length:
                self._pieces.popleft()
            return piece
        return None

    def _read_on(self, length: int) -> None:
        """Start reads, of one size, until the window is full or the volume ends."""
        size = length * -(-PIECE // length)  # of whole requests, so that none lies across two pieces
        begin = self._pieces[-1].end if self._pieces else self._next
        while begin < self._volume.properties.size and len(self._pieces) < min(PIECES, self._window // size):
            piece = Piece(self._volume, begin, min(size, self._volume.properties.size - begin))
            self._pieces.append(piece)
            self._spawn(piece.fetch)
            begin = piece.end
