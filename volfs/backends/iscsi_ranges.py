"""Which blocks of a LUN are being written: what begins or ends inside a block wants that block for itself."""

from __future__ import annotations

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
