"""Reading ahead of whoever writes or compares: blocks of a stream, or data and holes of a descriptor."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from volfs.descriptors import Place
from volfs.extents import Extent

BLOCKS_AHEAD = 4  # read but not yet taken; bounds the memory, and more hide no more latency

Piece = bytes | int  # data, or the length of a hole that was not read


def pieces_at(
    place: Place, found: Iterable[Extent], block_size: int, what: str
) -> Generator[Piece, None, None]:
    """The extents, which are counted from the descriptor's beginning: each hole, and the data in blocks.

    Several blocks are read at once, across the holes between them. Close the iterator to end the threads.
    """
    pending: deque[int | Future[bytes]] = deque()
    reading = 0
    with ThreadPoolExecutor(BLOCKS_AHEAD, "volfs-read-ahead") as pool:
        try:
            for extent in found:
                if not extent.data:
                    pending.append(extent.length)
                    continue
                for offset in range(extent.offset, extent.end, block_size):
                    length = min(block_size, extent.end - offset)
                    pending.append(pool.submit(_read_at, place, offset, length, what))
                    reading += 1
                    while reading > BLOCKS_AHEAD:
                        piece = pending.popleft()
                        if isinstance(piece, Future):
                            reading -= 1
                            yield piece.result()
                        else:
                            yield piece
            while pending:
                piece = pending.popleft()
                yield piece.result() if isinstance(piece, Future) else piece
        finally:
            for piece in pending:
                if isinstance(piece, Future):
                    piece.cancel()


def _read_at(place: Place, offset: int, length: int, what: str) -> bytes:
    data = os.pread(place.number, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    missing = length - len(data)
    while missing:
        data = os.pread(place.number, missing, offset + length - missing)
        if not data:
            raise ended(what, offset + length - missing - place.start)
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def blocks_ahead(file: IO[bytes], size: int, block_size: int, what: str) -> Generator[Piece, None, None]:
    """The next `size` bytes of the file in blocks, read ahead by a thread. Close the iterator to end the thread."""
    blocks: queue.Queue[bytes | BaseException] = queue.Queue(BLOCKS_AHEAD)
    stop = threading.Event()

    def read() -> None:
        try:
            for offset in range(0, size, block_size):
                if stop.is_set():
                    return
                blocks.put(_read_exactly(file, min(block_size, size - offset), offset, what))
        except BaseException as exc:
            blocks.put(exc)

    thread = threading.Thread(target=read, name="volfs-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(0, size, block_size):
            block = blocks.get()
            if isinstance(block, BaseException):
                raise block
            yield block
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            try:
                blocks.get(timeout=0.05)
            except queue.Empty:
                pass


def _read_exactly(file: IO[bytes], length: int, offset: int, what: str) -> bytes:
    data: bytes | None = file.read(length)
    if data is not None and len(data) == length:
        return data
    parts = []
    missing = length
    while data:
        parts.append(data)
        missing -= len(data)
        if not missing:
            return b"".join(parts)
        data = file.read(missing)
    if data is None:
        raise would_block()
    raise ended(what, offset + length - missing)


def ended(what: str, offset: int) -> OSError:
    """The error of a file that is shorter than it should be."""
    return OSError(errno.ENODATA, f"the {what} ends at {offset}")


def would_block() -> OSError:
    """The error of a file that answered None."""
    return BlockingIOError(errno.EAGAIN, "a non-blocking file is not ready")
