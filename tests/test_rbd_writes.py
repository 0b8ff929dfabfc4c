"""Writes to an image that are answered before the cluster confirms them: their order, their room, their errors.

Against a library that confirms when the test says, on a thread of its own, as librbd does.
"""

from __future__ import annotations

import errno
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


class Completion:
    def __init__(self, status: int) -> None:
        self.get_return_value = lambda: status


class Library:
    """Applies a write to `content` when it confirms it."""

    def __init__(self, size: int = 0) -> None:
        self.content = bytearray(size)
        self.under_way: list[tuple[int, bytes, Callable[..., None]]] = []

    def aio_write(self, data: bytes, offset: int, callback: Callable[..., None]) -> Any:
        self.under_way.append((offset, data, callback))

    def confirm(self, index: int = 0, status: int = 0) -> None:
        offset, data, callback = self.under_way.pop(index)
        if status == 0:
            self.content[offset : offset + len(data)] = data
        thread = threading.Thread(target=callback, args=(Completion(status),))
        thread.start()
        thread.join()


class Bench:
    def __init__(self, size: int = 0) -> None:
        self.library = Library(size)
        self.writes = UnconfirmedWrites(SECONDS, "write")

    async def write(self, offset: int, data: bytes) -> None:
        await self.writes.room(offset, len(data))
        self.writes.start(offset, data, self.library.aio_write)


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
def bench() -> Bench:
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


async def test_the_first_error_is_kept_until_it_is_taken(bench: Bench) -> None:
    for offset in range(3):
        await bench.write(offset, b"x")
    bench.library.confirm()
    assert bench.writes.failure == 0
    bench.library.confirm(status=-errno.EROFS)
    bench.library.confirm(status=-errno.EIO)
    await bench.writes.settle()
    assert (bench.writes.failure, bench.writes.take_failure(), bench.writes.failure) == (
        errno.EROFS,
        errno.EROFS,
        0,
    )


async def test_an_answer_that_does_not_come_is_a_timeout(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.write(0, b"x")
    for wait in (bench.writes.settle(), bench.writes.room(0, 1), bench.writes.apart(0, 1)):
        begin = trio.current_time()
        with pytest.raises(BackendTimeout, match=f"write: no answer within {SECONDS:g} s"):
            await wait
        assert trio.current_time() - begin == pytest.approx(SECONDS, abs=0.1)


async def test_the_bytes_live_until_the_library_has_let_go_of_them(bench: Bench) -> None:
    """It reads them when it sends, and holds no reference: without ours they would be somebody else's by then."""
    freed = []

    class Data(bytes):
        def __del__(self) -> None:
            freed.append(bytes(self))

    bench.library.aio_write = lambda data, offset, callback: confirm.append(callback)  # type: ignore[method-assign]
    confirm: list[Callable[..., None]] = []
    await bench.write(0, Data(b"mine"))
    assert freed == []
    confirm.pop()(Completion(0))
    await bench.writes.settle()
    assert freed == [b"mine"]


async def test_a_write_that_does_not_begin_leaves_nothing(bench: Bench) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("closed")

    with pytest.raises(ValueError, match="closed"):
        bench.writes.start(0, b"x", refuse)
    assert await finishes(bench.writes.settle)


@given(
    steps=st.lists(st.tuples(st.sampled_from("wr"), st.integers(0, 60), st.integers(1, 40)), max_size=30),
    seed=st.integers(0, 1 << 16),
)
@settings(deadline=None, max_examples=60)
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
