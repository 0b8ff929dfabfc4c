"""Reading in advance for programs that go by runs of data: what it saves, and that nobody can tell by the bytes.

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
from trio.testing import MockClock
from volumes import assert_same, raises, random_bytes

from volfs import data_ahead as module
from volfs.backends.file import FileSource
from volfs.copy_range import copy_range
from volfs.data_ahead import DataAhead
from volfs.errors import VolfsError
from volfs.readahead import FRESH_SECONDS
from volfs.volume import Volume

PIECE = 1000
RUN = 10 * PIECE
SIZE = 6 * RUN + 7
WINDOW = 4 * PIECE
LATENCY = 0.01
PAGE = 100


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", PIECE)
        patch.setattr(module, "PAGE", PAGE)
        yield


class Bench:
    """A volume of which every other run is a hole, and a handle's reads of it."""

    def __init__(self, nursery: trio.Nursery, window: int = WINDOW) -> None:
        content = b"".join(bytes(RUN) if at % 2 else random_bytes(RUN, at) for at in range(6)) + b"the end"
        self.storage = MemoryVolume(content, PIECE, LATENCY)
        self.volume = Volume(FileSource(path="/source"), self.storage)
        self.ahead = DataAhead(self.volume, window, lambda task: nursery.start_soon(task))

    def reads(self) -> list[tuple[int, int]]:
        return [(offset, length) for name, offset, length in self.storage.requests if name == "pread"]

    async def read(self, offset: int, length: int) -> float:
        """Read as the kernel does, and check it; returns the seconds that it took."""
        begin = trio.current_time()
        try:
            data = await self.ahead.read(offset, length)
        except VolfsError as exc:
            if exc.errno != errno.EAGAIN:
                raise
            assert not any(self.storage.content[offset : offset + length]), "data is not refused"
            pages = [
                await self.ahead.read(at, min(PAGE, offset + length - at))
                for at in range(offset, offset + length, PAGE)
            ]
            data = b"".join(pages)
        assert_same(data, bytes(self.storage.content[offset : offset + length]), offset, "read")
        return trio.current_time() - begin

    async def all_is_read(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(2 * LATENCY)


async def test_a_run_read_from_where_seek_told_is_read_in_advance_and_so_is_the_next(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        waited = []
        for begin in (0, 2 * RUN, 4 * RUN):
            bench.ahead.seeked(begin)
            for offset in range(begin, begin + RUN, PIECE):
                waited.append(await bench.read(offset, PIECE))
                await bench.all_is_read()
        assert waited[0] >= LATENCY
        assert sum(waited[1:]) < LATENCY
    assert len(bench.reads()) == len(set(bench.reads())), "nothing is read twice"
    assert all(offset // RUN % 2 == 0 for offset, _ in bench.reads()), "no hole is read"


@pytest.mark.parametrize("size", [300, 700, 1700, 5000])
async def test_requests_need_not_be_as_long_as_pieces(size: int, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        bench.ahead.seeked(0)
        for offset in range(0, SIZE, size):  # over the holes, too
            await bench.read(offset, size)
            bench.ahead.seeked(offset + size)
    assert len(bench.reads()) == len(set(bench.reads())), "nothing is read twice"


async def test_several_reads_at_once_share_what_is_read_in_advance(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        bench.ahead.seeked(0)
        await bench.read(0, PIECE)
        await bench.all_is_read()
        async with trio.open_nursery() as readers:
            for offset in range(PIECE, WINDOW, PIECE // 2):
                readers.start_soon(bench.read, offset, PIECE // 2)
    assert len(bench.reads()) == len(set(bench.reads()))


async def test_who_only_seeks_or_reads_elsewhere_costs_no_read(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        for begin in (0, 2 * RUN, 4 * RUN):
            bench.ahead.seeked(begin)
        await bench.read(PIECE, PIECE)
        await bench.read(2 * PIECE, PIECE)
        await bench.all_is_read()
    assert bench.reads() == [(PIECE, PIECE), (2 * PIECE, PIECE)]


async def test_the_kernel_s_own_reads_into_a_hole_are_refused_until_a_program_reads_there(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        bench.ahead.seeked(0)
        await bench.read(0, RUN)
        for offset in range(RUN, 2 * RUN, PIECE):
            with raises(errno.EAGAIN):
                await bench.ahead.read(offset, PIECE)
        assert await bench.ahead.read(RUN, PAGE) == bytes(PAGE)
        assert await bench.ahead.read(RUN, PIECE) == bytes(PIECE)
        await bench.all_is_read()


async def test_a_window_of_nothing_reads_nothing_in_advance(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery, window=0)
        bench.ahead.seeked(0)
        await bench.read(0, PIECE)
        await bench.all_is_read()
    assert bench.reads() == [(0, PIECE)]


async def test_a_read_past_the_end_is_short_and_behind_it_empty(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        bench.ahead.seeked(6 * RUN)
        await bench.read(6 * RUN, PIECE)
        bench.ahead.seeked(SIZE)
        await bench.read(SIZE, PIECE)


async def test_what_was_read_too_long_ago_is_read_again(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        bench.ahead.seeked(0)
        await bench.read(0, PIECE)
        await trio.sleep(FRESH_SECONDS + 2 * LATENCY)
        bench.storage.content[PIECE : PIECE + 5] = b"other"  # by another client
        await bench.read(PIECE, PIECE)


async def test_an_error_ahead_is_told_who_reads_there_and_nobody_before(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        bench.storage.bad["pread", 2 * PIECE] = errno.EIO
        bench.ahead.seeked(0)
        for offset in (0, PIECE):
            await bench.read(offset, PIECE)
            await bench.all_is_read()
        with raises(errno.EIO):
            await bench.read(2 * PIECE, PIECE)
        await bench.read(3 * PIECE, PIECE)


@settings(max_examples=200)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["seek", "read", "on", "copy", "write", "punch", "wait"]),
            st.integers(0, SIZE - 1),
            st.integers(1, 2 * RUN),
        ),
        max_size=40,
    )
)
def test_no_bytes_from_before_a_write_come_out(steps: list[tuple[str, int, int]]) -> None:
    async def play() -> None:
        async with trio.open_nursery() as nursery:
            bench = Bench(nursery)
            target = Volume(FileSource(path="/target"), MemoryVolume(bytes(SIZE), PIECE, LATENCY))
            told = 0
            for step, offset, length in steps:
                if step == "seek":
                    told = offset
                    bench.ahead.seeked(offset)
                elif step == "read":
                    await bench.read(offset, length)
                elif step == "on":
                    told += int(await bench.read(told, length) >= 0) * length
                elif step == "copy":
                    await copy_range(bench.ahead, offset, target, offset, length)
                    data = await target.pread(offset, length)
                    assert_same(data, await bench.volume.pread(offset, length), offset, "copied")
                elif step == "write":
                    await bench.volume.pwrite(offset, random_bytes(length, offset))
                elif step == "punch":
                    await bench.volume.discard(offset, min(length, SIZE - offset))
                else:
                    await trio.sleep(length / RUN * LATENCY)

    trio.run(play, clock=MockClock(autojump_threshold=0))


async def test_who_copies_one_run_of_data_after_the_other_finds_the_next_one_read(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        target = Volume(FileSource(path="/target"), MemoryVolume(bytes(SIZE), PIECE, LATENCY))
        for number, begin in enumerate((0, 2 * RUN, 4 * RUN)):
            asked = len(bench.reads())
            assert await copy_range(bench.ahead, begin, target, begin, RUN) == RUN
            await bench.all_is_read()
            read = [offset for offset, _ in bench.reads()[asked:]]
            if number == 0:
                assert max(read) < RUN, "one copy is no stream"
            else:
                next_run = begin + 2 * RUN
                assert sorted(at for at in read if at >= next_run) == [
                    at for at in range(next_run, next_run + WINDOW, PIECE) if at < SIZE
                ]
            copied = await target.pread(begin, RUN)
            assert_same(copied, bytes(bench.storage.content[begin : begin + RUN]), begin, "copied")
    assert len(bench.reads()) == len(set(bench.reads())), "nothing is read twice"


async def test_a_copy_is_not_of_bytes_from_before_a_write(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        target = Volume(FileSource(path="/target"), MemoryVolume(bytes(SIZE), PIECE, LATENCY))
        for begin in (0, 2 * RUN):
            await copy_range(bench.ahead, begin, target, begin, RUN)
        await bench.all_is_read()
        await bench.volume.pwrite(4 * RUN + 5, b"new")
        await copy_range(bench.ahead, 4 * RUN, target, 4 * RUN, RUN)
    assert await target.pread(4 * RUN + 5, 3) == b"new"
