"""Copying a range between volumes: what is under way at once, what becomes of holes, and what is told of errors.

On volumes in memory and virtual time, in pieces of PIECE bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import trio
from fakes import MemoryVolume
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LONG_STEPS
from trio.testing import MockClock
from volumes import assert_same, raises, random_bytes

from volfs import data_ahead
from volfs.backends.file import FileSource
from volfs.copy_range import PIECES, copy_range
from volfs.data_ahead import DataAhead
from volfs.volume import Volume

PIECE = 1000
SIZE = 60 * PIECE + 7
LATENCY = 0.01


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_ahead, "PIECE", PIECE)
        yield


class Bench:
    """A source and a target. The target is full of other bytes unless `blank`."""

    def __init__(self, content: bytes, *, blank: bool = False, seconds: float = LATENCY) -> None:
        self.before = bytes(SIZE) if blank else random_bytes(SIZE, 99)
        self.one = MemoryVolume(content, PIECE, seconds)
        self.other = MemoryVolume(self.before, PIECE, seconds)
        self.source = Volume(FileSource(path="/source"), self.one)
        self.target = Volume(FileSource(path="/target"), self.other)
        self.ahead = DataAhead(self.source, 0, self._refuse)

    def _refuse(self, task: object) -> None:
        raise AssertionError("nothing is to be read in advance here")

    def made(self, operation: str) -> list[tuple[int, int]]:
        """The requests of the target that changed it, or those of the source that read."""
        volume = self.one if operation == "pread" else self.other
        return [(offset, length) for name, offset, length in volume.requests if name == operation]

    def check(self, begin: int, to: int, copied: int, asked: int) -> None:
        """`copied` bytes are the source's, and nothing beyond what was asked for has changed."""
        expected = self.before[:to] + bytes(self.one.content[begin : begin + copied])
        assert_same(self.other.content[: to + copied], expected, 0, "copied")
        assert_same(self.other.content[to + asked :], self.before[to + asked :], to + asked, "behind it")


def with_holes() -> bytes:
    """Every other ten pieces."""
    return (
        b"".join(bytes(10 * PIECE) if at % 2 else random_bytes(10 * PIECE, at) for at in range(6))
        + b"the end"
    )


async def test_as_many_pieces_are_under_way_as_may_be_and_no_more(autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    begin = trio.current_time()
    assert await copy_range(bench.ahead, 0, bench.target, 0, SIZE) == SIZE
    bench.check(0, 0, SIZE, SIZE)
    assert bench.one.most_under_way <= PIECES + 1  # and one question for extents
    assert bench.other.most_under_way == PIECES
    rounds = -(-61 // PIECES) + 1
    assert trio.current_time() - begin < 2.5 * LATENCY * rounds


async def test_pieces_come_in_order_and_end_where_the_source_s_do(autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    assert await copy_range(bench.ahead, 1500, bench.target, 20_003, 4000) == 4000
    bench.check(1500, 20_003, 4000, 4000)
    assert bench.made("pread") == [(1500, 500), (2000, 1000), (3000, 1000), (4000, 1000), (5000, 500)]


async def test_holes_become_holes_each_by_one_request(autojump_clock: MockClock) -> None:
    bench = Bench(with_holes())
    assert await copy_range(bench.ahead, 0, bench.target, 0, SIZE) == SIZE
    bench.check(0, 0, SIZE, SIZE)
    assert sorted(bench.made("discard")) == [(at * PIECE, 10 * PIECE) for at in (10, 30, 50)]
    assert all(offset // (10 * PIECE) % 2 == 0 for offset, _ in bench.made("pread"))


async def test_holes_cost_nothing_on_a_blank_target(autojump_clock: MockClock) -> None:
    bench = Bench(with_holes(), blank=True)
    assert await copy_range(bench.ahead, 0, bench.target, 0, SIZE) == SIZE
    bench.check(0, 0, SIZE, SIZE)
    assert bench.made("discard") == []
    assert sum(length for _, length in bench.made("pwrite")) == 30 * PIECE + 7


@pytest.mark.parametrize("blank", [True, False])
async def test_zeros_that_the_source_takes_for_data_become_holes(
    autojump_clock: MockClock, blank: bool
) -> None:
    bench = Bench(with_holes(), blank=blank)
    for at in (10, 30, 50):
        await bench.one.pwrite(at * PIECE, bytes(10 * PIECE))
    assert await copy_range(bench.ahead, 0, bench.target, 0, SIZE) == SIZE
    bench.check(0, 0, SIZE, SIZE)
    assert sum(length for _, length in bench.made("pread")) == SIZE
    assert sum(length for _, length in bench.made("pwrite")) == 30 * PIECE + 7
    assert sum(length for _, length in bench.made("discard")) == (0 if blank else 30 * PIECE)


@pytest.mark.parametrize(
    ("begin", "to", "length", "copied"),
    [
        (0, 0, 0, 0),
        (SIZE, 0, 10, 0),
        (SIZE + 5, SIZE, 10, 0),
        (SIZE - 3, 5, 10, 3),
        (5, SIZE - 3, 10, 3),
        (0, 0, 1 << 62, SIZE),
        (3, 7, 1, 1),
    ],
)
async def test_a_copy_ends_where_a_volume_ends(
    begin: int, to: int, length: int, copied: int, autojump_clock: MockClock
) -> None:
    bench = Bench(random_bytes(SIZE))
    assert await copy_range(bench.ahead, begin, bench.target, to, length) == copied
    bench.check(begin, to, copied, copied)


@pytest.mark.parametrize("to", [SIZE, SIZE + 1, 1 << 62])
async def test_a_copy_past_the_target_s_end_is_enospc(to: int, autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    with raises(errno.ENOSPC):
        await copy_range(bench.ahead, 0, bench.target, to, 10)


async def test_ranges_of_one_volume_may_touch_and_not_overlap(autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    before = bytes(bench.one.content)
    for begin, to in ((0, 9_999), (9_999, 0), (7, 7)):
        with raises(errno.EINVAL):
            await copy_range(bench.ahead, begin, bench.source, to, 10_000)
    assert bench.one.content == before
    assert await copy_range(bench.ahead, 0, bench.source, 10_000, 10_000) == 10_000
    assert await copy_range(bench.ahead, SIZE - 5, bench.source, SIZE - 10, 10_000) == 5  # as long as it is
    assert bench.one.content == before[:10_000] * 2 + before[20_000:-10] + before[-5:] * 2


async def test_a_signal_ends_a_copy_soon_and_what_is_done_is_told(autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    begin = trio.current_time()

    def interrupted() -> bool:
        return trio.current_time() > begin + 3 * LATENCY

    copied = await copy_range(bench.ahead, 0, bench.target, 0, SIZE, interrupted)
    assert PIECE <= copied <= 3 * PIECES * PIECE
    bench.check(0, 0, copied, copied)
    assert trio.current_time() < begin + 8 * LATENCY


async def test_a_signal_before_the_first_byte_is_not_the_end_of_the_file(autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    with raises(errno.EINTR):
        await copy_range(bench.ahead, 0, bench.target, 0, SIZE, lambda: True)
    bench.check(0, 0, 0, 0)


@pytest.mark.parametrize("operation", ["pread", "pwrite", "discard", "extents"])
async def test_an_error_behind_the_first_byte_ends_the_copy_there(
    operation: str, autojump_clock: MockClock
) -> None:
    bench = Bench(with_holes())
    failing = bench.other if operation in ("pwrite", "discard") else bench.one
    at = {"discard": 30 * PIECE, "extents": 20 * PIECE}.get(operation, 24_321)
    failing.bad[operation, at] = errno.EREMOTEIO
    copied = at // PIECE * PIECE
    assert await copy_range(bench.ahead, 0, bench.target, 0, SIZE) == copied
    bench.check(0, 0, copied, SIZE)
    with raises(errno.EREMOTEIO):
        await copy_range(bench.ahead, copied, bench.target, copied, SIZE)


async def test_of_two_errors_the_first_in_the_range_is_told(autojump_clock: MockClock) -> None:
    bench = Bench(random_bytes(SIZE))
    bench.one.bad["pread", 5500] = errno.EREMOTEIO  # soon
    bench.other.bad["pwrite", 100] = errno.EDQUOT  # later, but before it
    with raises(errno.EDQUOT):
        await copy_range(bench.ahead, 0, bench.target, 0, SIZE)


async def test_a_source_that_shrinks_is_an_error_and_not_the_end(autojump_clock: MockClock) -> None:
    bench = Bench(with_holes())
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def shrink() -> None:
            await trio.sleep(1.5 * LATENCY)
            await bench.one.resize(9 * PIECE + 1)

        copied = await copy_range(bench.ahead, 0, bench.target, 0, SIZE)
    assert copied == 9 * PIECE
    bench.check(0, 0, copied, SIZE)
    assert await copy_range(bench.ahead, copied, bench.target, copied, SIZE) == 1


async def test_a_target_that_shrinks_is_enospc_where_it_ends(autojump_clock: MockClock) -> None:
    bench = Bench(with_holes())
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def shrink() -> None:
            await trio.sleep(1.5 * LATENCY)
            await bench.other.resize(5 * PIECE)

        copied = await copy_range(bench.ahead, 0, bench.target, 0, SIZE)
    assert copied <= 5 * PIECE
    bench.check(0, 0, copied, SIZE)
    with raises(errno.ENOSPC):
        await copy_range(bench.ahead, 5 * PIECE, bench.target, 5 * PIECE, SIZE)


@given(
    holes=st.sets(st.integers(0, 59)),
    begin=st.integers(0, SIZE),
    to=st.integers(0, SIZE - 1),
    length=st.integers(0, SIZE),
    bad=st.dictionaries(
        st.tuples(st.sampled_from(["pread", "pwrite", "discard", "extents"]), st.integers(0, SIZE)),
        st.sampled_from([errno.EREMOTEIO, errno.EDQUOT]),
        max_size=3,
    ),
    latencies=st.lists(st.sampled_from([0.0, LATENCY, 9 * LATENCY]), max_size=40),
    patience=st.none() | st.integers(0, 40),
)
@settings(max_examples=LONG_STEPS // 100)
def test_what_is_told_as_copied_is_copied_whatever_goes_wrong(
    holes: set[int],
    begin: int,
    to: int,
    length: int,
    bad: dict[tuple[str, int], int],
    latencies: list[float],
    patience: int | None,
) -> None:
    content = bytearray(random_bytes(SIZE))
    for hole in holes:
        content[hole * PIECE : (hole + 1) * PIECE] = bytes(PIECE)
    bench = Bench(bytes(content))
    bench.one.bad, bench.other.bad = bad, bad
    bench.one.latencies.extend(latencies)
    bench.other.latencies.extend(latencies[::-1])
    asked = max(0, min(length, SIZE - begin, SIZE - to))
    looks = 0

    def interrupted() -> bool:
        nonlocal looks
        looks += 1
        return patience is not None and looks > patience

    async def play() -> None:
        try:
            copied = await copy_range(bench.ahead, begin, bench.target, to, length, interrupted)
        except OSError as exc:
            if exc.errno not in {*bad.values(), *([] if patience is None else [errno.EINTR])}:
                raise
            copied = 0
        else:
            assert copied or not asked, "nothing copied, as at the end of the source"
            assert copied == asked or bad or patience is not None
        assert copied <= asked
        bench.check(begin, to, copied, asked)

    trio.run(play, clock=MockClock(autojump_threshold=0))
