"""What is known of a volume's data and holes, so that programs that ask for each in turn are answered quickly.

The rule that no data is ever hidden: a run is a hole only as long as nothing was written to it since the backend was
asked, by whatever handle, and nothing was being written while it was asked. All else is unknown, and asked again.
What another client writes is not seen here; an open forgets all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from volfs.backends.base import Extent

MAX_RUNS = 100_000  # remembered at once: a few MiB


class Writing:
    """Ranges that are being written. Those begun or under way during a question spoil its answer there."""

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[int, int]] = {}
        self._number = 0
        # By number: equal lists are not the same question.
        self._questions: dict[int, list[tuple[int, int]]] = {}

    def begin(self, offset: int, length: int) -> int:
        self._number += 1
        self._under_way[self._number] = (offset, offset + length)
        self.note(offset, length)
        return self._number

    def end(self, number: int) -> None:
        del self._under_way[number]

    def note(self, offset: int, length: int) -> None:
        """A write that is done at once."""
        for spoilt in self._questions.values():
            spoilt.append((offset, offset + length))

    @contextmanager
    def question(self) -> Iterator[list[tuple[int, int]]]:
        """Yields the ranges that are not to be believed; complete when the block ends."""
        spoilt = list(self._under_way.values())
        self._number += 1
        number = self._number
        self._questions[number] = spoilt
        try:
            yield spoilt
        finally:
            del self._questions[number]


class KnownExtents:
    """Runs by offset, apart from each other. Ends are exclusive."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._runs: list[tuple[int, int, bool]] = []  # begin, end, whether it is data

    def __len__(self) -> int:
        return len(self._runs)

    def at(self, offset: int) -> Extent | None:
        """What is known from `offset` on, as far as one run goes; None when nothing is."""
        index = bisect_right(self._begins, offset) - 1
        if index < 0 or self._runs[index][1] <= offset:
            return None
        _, end, data = self._runs[index]
        return Extent(offset, end - offset, data)

    def learn(self, extents: Iterable[Extent], spoilt: Iterable[tuple[int, int]] = ()) -> None:
        """Take these for true, but not what is spoilt; what was known there before is forgotten."""
        for extent in extents:
            self.forget(extent.offset, extent.length)
            if len(self._runs) >= MAX_RUNS:
                self.clear()
            self._insert(extent.offset, extent.end, extent.data)
        for begin, end in spoilt:
            self.forget(begin, end - begin)

    def forget(self, offset: int, length: int) -> None:
        """Nothing is known of the range any more."""
        end = offset + length
        first = bisect_right(self._begins, offset) - 1
        if first < 0 or self._runs[first][1] <= offset:
            first += 1
        last = first
        while last < len(self._runs) and self._runs[last][0] < end:
            last += 1
        if first == last:
            return
        kept = []
        begin, stop, data = self._runs[first]
        if begin < offset:
            kept.append((begin, offset, data))
        begin, stop, data = self._runs[last - 1]
        if stop > end:
            kept.append((end, stop, data))
        self._runs[first:last] = kept
        self._begins[first:last] = [run[0] for run in kept]

    def written(self, offset: int, length: int) -> None:
        """The range is data, or about to be. What is known to be data stays so, which costs next to nothing."""
        known = self.at(offset)
        if known is None or not (known.data and known.length >= length):
            self.forget(offset, length)

    def clear(self) -> None:
        self._begins.clear()
        self._runs.clear()

    def _insert(self, begin: int, end: int, data: bool) -> None:
        """Between what is there, joined to a neighbour of its kind before it."""
        index = bisect_right(self._begins, begin)
        if index and self._runs[index - 1][1:] == (begin, data):
            self._runs[index - 1] = (self._runs[index - 1][0], end, data)
        else:
            self._runs.insert(index, (begin, end, data))
            self._begins.insert(index, begin)
