"""Writes to an image that are answered before the cluster confirms them: their order, their room, their errors.

Against a library that confirms when the test says, on a thread of its own, as librbd does.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from volfs.backends.rbd_writes import REQUESTS, WINDOW, UnconfirmedWrites
from volfs.errors import BackendTimeout

SECONDS = 5.0


class Library:
    """Applies a write to `content` when it confirms it. In place of volfs.native.rbd_image.Image."""

    def __init__(self, wake: Callable[[], None], size: int) -> None:
        self.content = bytearray(size)
        self.under_way: list[tuple[int, bytes]] = []
        self.numbers: list[int] = []  # of these, in the same order
        self.begun = 0
        self.reads = 0
        self._wake = wake
        self._wake_at: tuple[int, int] | None = None

    @property
    def writes(self) -> int:
        return len(self.under_way)

    @property
    def size(self) -> int:
        return sum(len(data) for _, data in self.under_way)

    def begin(self, offset: int, data: bytes) -> None:
        self.under_way.append((offset, data))
        self.numbers.append(self.begun)
        self.begun += 1

    def overlaps(self, offset: int, length: int, before: int) -> bool:
        return any(
            number < before and begin < offset + length and offset < begin + len(data)
            for number, (begin, data) in zip(self.numbers, self.under_way, strict=True)
        )

    def wake_at(self, writes: int, size: int) -> None:
        self._wake_at = writes, size

    def confirm(self, index: int = 0) -> None:
        offset, data = self.under_way.pop(index)
        del self.numbers[index]
        self.content[offset : offset + len(data)] = data
        self._answered()

    def answer_read(self) -> None:
        self.reads -= 1
        self._answered()

    def _answered(self) -> None:
        if self._wake_at is not None and self.writes <= self._wake_at[0] and self.size <= self._wake_at[1]:
            self._wake_at = None
            thread = threading.Thread(target=self._wake)
            thread.start()
            thread.join()


class Bench:
    def __init__(self, size: int = 0) -> None:
        self.writes = UnconfirmedWrites(lambda wake: Library(wake, size), SECONDS, "volume")  # type: ignore[arg-type, return-value]
        self.library: Library = self.writes.requests  # type: ignore[assignment]

    async def write(self, offset: int, data: bytes) -> None:
        await self.writes.room(offset, len(data))
        self.library.begin(offset, data)


async def finishes(call: Callable[..., Any], *args: Any) -> bool:
    """Whether the call returns without anything else happening."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def cancel() -> None:
                await wait_all_tasks_blocked()
                scope.cancel()

            await call(*args)
            nursery.cancel_scope.cancel()
    return not scope.cancel_called


@pytest.fixture
async def bench() -> Bench:
    return Bench(100)


async def test_a_write_returns_before_it_is_confirmed(bench: Bench) -> None:
    await bench.write(0, b"first")
    await bench.write(5, b"second")
    assert len(bench.library.under_way) == 2


async def test_a_write_over_one_that_is_unconfirmed_waits_for_it(bench: Bench) -> None:
    await bench.write(10, b"0123456789")
    for offset, length, free in (
        (0, 10, True),
        (0, 11, False),
        (19, 1, False),
        (20, 1, True),
        (12, 2, False),
    ):
        assert await finishes(bench.writes.room, offset, length) is free, f"{length} at {offset}"
    bench.library.confirm()
    assert await finishes(bench.writes.room, 12, 2)


async def test_a_read_waits_for_what_it_overlaps_alone(bench: Bench) -> None:
    await bench.write(10, b"0123456789")
    await bench.write(50, b"x")
    assert await finishes(bench.writes.apart, 20, 30)
    assert not await finishes(bench.writes.apart, 19, 1)
    bench.library.confirm()
    assert await finishes(bench.writes.apart, 19, 1)


async def test_bytes_under_way_are_limited(bench: Bench) -> None:
    half = bytes(WINDOW // 2)
    await bench.write(0, half)
    await bench.write(WINDOW, half)
    assert not await finishes(bench.write, 2 * WINDOW, b"x")
    bench.library.confirm()
    assert await finishes(bench.write, 2 * WINDOW, b"x")


async def test_who_found_no_room_waits_until_half_of_it_is_free(bench: Bench) -> None:
    piece = bytes(WINDOW // 8)
    for number in range(8):
        await bench.write(number * len(piece), piece)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.write, WINDOW, piece)
        for _ in range(4):
            await wait_all_tasks_blocked()
            bench.library.confirm()
        await wait_all_tasks_blocked()
        assert len(bench.library.under_way) == 4, "it has not started yet"
        bench.library.confirm()
        await wait_all_tasks_blocked()
        assert len(bench.library.under_way) == 4, "three of the first and itself"


async def test_a_write_larger_than_the_limit_goes_alone(bench: Bench) -> None:
    await bench.write(0, b"x")
    assert not await finishes(bench.writes.room, 1, WINDOW + 1)
    bench.library.confirm()
    assert await finishes(bench.writes.room, 1, WINDOW + 1)


async def test_requests_under_way_are_limited(bench: Bench) -> None:
    for number in range(REQUESTS):
        await bench.write(number, b"x")
    assert not await finishes(bench.write, REQUESTS, b"x")
    bench.library.confirm()
    assert await finishes(bench.write, REQUESTS, b"x")


async def test_settle_returns_when_all_are_confirmed(bench: Bench) -> None:
    await bench.write(0, b"a")
    await bench.write(1, b"b")
    bench.library.confirm(1)
    assert not await finishes(bench.writes.settle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.writes.settle)
        await wait_all_tasks_blocked()
        bench.library.confirm()
    assert bench.library.content[:2] == b"ab"


@pytest.mark.parametrize("wait", ["settle", "apart", "room"])
async def test_nobody_waits_for_what_a_busy_writer_begins_later(bench: Bench, wait: str) -> None:
    """Who would, waits until the deadline while the storage answers all the time."""
    returned = trio.Event()

    async def waiter() -> None:
        await getattr(bench.writes, wait)(*() if wait == "settle" else (0, 30))
        returned.set()

    await bench.write(0, b"0123456789")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter)
        await wait_all_tasks_blocked()
        await bench.write(10, b"0123456789")
        assert not returned.is_set()
        bench.library.confirm()
        await wait_all_tasks_blocked()
        assert returned.is_set(), "what was begun before has been confirmed"
        nursery.cancel_scope.cancel()


async def test_reads_that_were_started_are_waited_for(bench: Bench) -> None:
    assert await finishes(bench.writes.settle_reads)
    bench.library.reads = 2
    bench.library.answer_read()
    assert not await finishes(bench.writes.settle_reads)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.writes.settle_reads)
        await wait_all_tasks_blocked()
        bench.library.answer_read()


async def test_a_write_that_does_not_wait_is_not_to_pass_those_that_do(bench: Bench) -> None:
    piece = bytes(WINDOW // 8)
    for number in range(8):
        assert bench.writes.room_now(number * len(piece), len(piece))
        await bench.write(number * len(piece), piece)
    assert not bench.writes.room_now(WINDOW, 1), "the window is full"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.write, WINDOW, piece)
        await wait_all_tasks_blocked()
        for _ in range(3):
            bench.library.confirm()
        assert not bench.writes.room_now(2 * WINDOW, 1), "there is room, and somebody waits for more of it"
        while bench.library.under_way:
            bench.library.confirm()
    assert not bench.writes.room_now(WINDOW, 1), "it is being written"
    assert bench.writes.room_now(2 * WINDOW, 1)


async def test_an_answer_that_does_not_come_is_a_timeout(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.write(0, b"x")
    for wait in (bench.writes.settle(), bench.writes.room(0, 1), bench.writes.apart(0, 1)):
        begin = trio.current_time()
        with pytest.raises(BackendTimeout, match=f"volume: write: no answer within {SECONDS:g} s"):
            await wait
        assert trio.current_time() - begin == pytest.approx(SECONDS, abs=0.1)


@given(
    steps=st.lists(st.tuples(st.sampled_from("wr"), st.integers(0, 60), st.integers(1, 40)), max_size=30),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=60)
def test_reads_see_what_was_written_in_whatever_order_it_is_confirmed(
    steps: list[tuple[str, int, int]], seed: int
) -> None:
    chance = random.Random(seed)

    async def confirm_some(bench: Bench) -> None:
        while True:
            await wait_all_tasks_blocked()
            while bench.library.under_way and chance.random() < 0.6:
                bench.library.confirm(chance.randrange(len(bench.library.under_way)))
            await trio.sleep(0.01)

    async def play() -> None:
        bench, model = Bench(100), bytearray(100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(confirm_some, bench)
            for number, (step, offset, length) in enumerate(steps):
                if step == "w":
                    data = chance.randbytes(length)
                    await bench.write(offset, data)
                    model[offset : offset + length] = data
                else:
                    await bench.writes.apart(offset, length)
                    found = bench.library.content[offset : offset + length]
                    assert found == model[offset : offset + length], f"step {number}"
            await bench.writes.settle()
            assert bench.library.content == model
            nursery.cancel_scope.cancel()

    trio.run(play, clock=MockClock(autojump_threshold=0.001))
