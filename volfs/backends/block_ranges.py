"""Bytes in terms of the blocks of a disk: which blocks are being written, and completing those that a write begins or
ends in.

What begins or ends inside a block is read, changed and written back, alone on the blocks it touches, so that
neighbours who write other bytes of the same block at the same time both find theirs there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


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


async def whole_blocks(
    offset: int, data: bytes | memoryview, block_size: int, read: Callable[[int], Awaitable[bytes]]
) -> list[tuple[int, bytes | memoryview]]:
    """Complete the first and the last block of a write with what is on the disk; `read(number)` gets a block.

    Returns the parts that are to be written, in order, each with the number of its first block. The caller is alone on
    the blocks.
    """
    view = memoryview(data)
    first, head = divmod(offset, block_size)
    last, tail = divmod(offset + len(data), block_size)
    if first == last:
        old = await read(first)
        return [(first, b"".join((old[:head], view, old[tail:])))]
    parts: list[tuple[int, bytes | memoryview]] = []
    start, stop = 0, len(data) - tail
    if head:
        old = await read(first)
        start = block_size - head
        parts.append((first, old[:head] + bytes(view[:start])))
        first += 1
    if start < stop:
        parts.append((first, view[start:stop]))
    if tail:
        old = await read(last)
        parts.append((last, bytes(view[stop:]) + old[tail:]))
    return parts
