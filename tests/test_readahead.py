"""Reading ahead for O_DIRECT handles: what it saves, and that nobody can tell by the bytes.

On virtual time, which pytest-trio takes from a clock among the test's own arguments only.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import pytest
import trio
from fakes import MemoryVolume
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock
from volumes import raises, random_bytes

from volfs.backends.base import BackendVolume, Extent, Properties, Source
from volfs.errors import BackendError
from volfs.readahead import FRESH_SECONDS, PIECE, PIECES, STREAM, ReadAhead
from volfs.volume import Volume

KIB = 1024
SIZE = 4096 * KIB + 1000
UNIT = 4 * KIB  # of SlowMemory's holes
LATENCY = 0.010


class SlowMemory(BackendVolume):
    """Bytes in memory that take LATENCY to read or write, as many at once as one likes. Units of zeros are holes."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.properties = Properties(len(content), 512, writable=True, can_resize=False)
        self.reads: list[tuple[int, int]] = []
        self.bad: set[int] = set()  # offsets that cannot be read

    async def pread(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        data = bytes(self.content[offset : offset + length])  # the storage looks first, and answers later
        await trio.sleep(LATENCY)
        if any(offset <= bad < offset + length for bad in self.bad):
            raise BackendError(f"bad block in {offset}+{length}", errno.EIO)
        return data

    async def pwrite(self, offset: int, data: bytes | memoryview) -> None:
        await trio.sleep(LATENCY)
        self.content[offset : offset + len(data)] = data

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        found = []
        while length:
            size = min(length, UNIT - offset % UNIT)
            found.append(Extent(offset, size, any(self.content[offset : offset + size])))
            offset, length = offset + size, length - size
        await trio.sleep(LATENCY)
        return found

    async def flush(self) -> None: ...

    async def refresh(self) -> Properties:
        return self.properties

    async def resize(self, size: int) -> None:
        raise NotImplementedError

    async def aclose(self) -> None: ...


class Bench:
    def __init__(self, nursery: trio.Nursery, window: int = SIZE, hole: tuple[int, int] = (0, 0)) -> None:
        self.memory = SlowMemory(random_bytes(SIZE))
        self.memory.content[hole[0] : hole[1]] = bytes(hole[1] - hole[0])
        self.volume = Volume(Source(), self.memory)
        self.ahead = ReadAhead(self.volume, window, nursery.start_soon)

    async def stream(self, begin: int, end: int, length: int) -> None:
        """Read it all in sequence; what comes must be what the storage has now."""
        for offset in range(begin, end, length):
            data = await self.read(offset, length)
            assert data == self.memory.content[offset : offset + length], f"read of {length} at {offset}"

    async def read(self, offset: int, length: int) -> bytes:
        at_once = self.ahead.start_read(offset, length, None)
        return at_once if isinstance(at_once, bytes) else await self.ahead.pread(offset, length)


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    return Bench(nursery)


@pytest.mark.parametrize("length", [4 * KIB, 96 * KIB, PIECE, 256 * KIB])
async def test_a_stream_keeps_several_requests_under_way(
    bench: Bench, length: int, autojump_clock: MockClock
) -> None:
    begin = trio.current_time()
    await bench.stream(0, SIZE, length)
    requests = len(bench.memory.reads)
    assert trio.current_time() - begin < LATENCY * (STREAM + 1 + requests / PIECES + 1)
    whole = sum(size for _, size in bench.memory.reads)
    assert whole == SIZE, "nothing is read twice"


async def test_other_reads_are_as_asked(bench: Bench, autojump_clock: MockClock) -> None:
    wanted = [(0, 512), (512, 512), (1024, 512), (512, 512), (SIZE - 10, 100), (4096, 512), (0, PIECE)]
    for offset, length in wanted:
        await bench.ahead.pread(offset, length)
    assert bench.memory.reads == [(offset, min(length, SIZE - offset)) for offset, length in wanted]


async def test_reads_at_once_are_no_stream(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(4 * STREAM):
            nursery.start_soon(bench.ahead.pread, number * PIECE, PIECE)
    assert sorted(bench.memory.reads) == [(number * PIECE, PIECE) for number in range(4 * STREAM)]


async def test_a_window_of_nothing_reads_nothing_ahead(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = Bench(nursery, window=0)
    await bench.stream(0, 20 * PIECE, PIECE)
    assert len(bench.memory.reads) == 20


async def test_no_more_than_the_window_is_ahead(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    bench = Bench(nursery, window=2 * PIECE)
    await bench.stream(0, 10 * PIECE, PIECE)
    assert max(offset for offset, _ in bench.memory.reads) <= 11 * PIECE


async def test_an_end_of_the_volume_is_an_end(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.stream(SIZE - 8 * PIECE - 7, SIZE, PIECE)
    assert await bench.ahead.pread(SIZE, PIECE) == b""
    assert await bench.ahead.pread(SIZE + PIECE, PIECE) == b""


async def test_what_was_written_here_is_never_older_than_the_write(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.stream(0, 8 * PIECE, PIECE)
    await bench.volume.pwrite(9 * PIECE, b"new")  # which has been read ahead
    await bench.stream(8 * PIECE, 20 * PIECE, PIECE)


async def test_what_was_written_elsewhere_is_seen_when_the_reader_pauses(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await bench.stream(0, 8 * PIECE, PIECE)
    bench.memory.content[8 * PIECE : 12 * PIECE] = bytes(4 * PIECE)
    await trio.sleep(FRESH_SECONDS + 0.001)
    await bench.stream(8 * PIECE, 20 * PIECE, PIECE)


async def test_what_is_read_again_comes_from_the_storage(bench: Bench, autojump_clock: MockClock) -> None:
    await bench.stream(0, 8 * PIECE, PIECE)
    bench.memory.content[7 * PIECE] ^= 1
    await bench.stream(7 * PIECE, 8 * PIECE, PIECE)


HOLE = (16 * PIECE, SIZE - 8 * PIECE - SIZE % PIECE)


@pytest.mark.parametrize("length", [4 * KIB, 96 * KIB, PIECE])
async def test_a_hole_is_not_read(nursery: trio.Nursery, length: int, autojump_clock: MockClock) -> None:
    bench = Bench(nursery, hole=HOLE)
    begin = trio.current_time()
    await bench.stream(0, SIZE, length)
    in_hole = [(at, size) for at, size in bench.memory.reads if HOLE[0] <= at and at + size <= HOLE[1]]
    assert sum(size for _, size in in_hole) <= 2 * max(length, PIECE), in_hole
    requests = len(bench.memory.reads)
    # And what comes behind it has been read ahead as well.
    assert trio.current_time() - begin < LATENCY * (STREAM + 1 + requests / PIECES + 2)


async def test_what_was_written_to_a_hole_is_seen_at_once_or_when_another_client_did_it_a_second_later(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = Bench(nursery, hole=HOLE)
    await bench.stream(0, 20 * PIECE, PIECE)
    await bench.volume.pwrite(21 * PIECE, b"new")
    await bench.stream(20 * PIECE, 22 * PIECE, PIECE)
    bench.memory.content[23 * PIECE] = 1
    await trio.sleep(FRESH_SECONDS + 0.001)
    await bench.stream(22 * PIECE, SIZE, PIECE)


async def test_a_slow_reader_of_a_hole_sees_it_looked_for_again_and_data_behind_it_read_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = Bench(nursery, hole=HOLE)
    for offset in range(0, SIZE, PIECE):
        await trio.sleep(FRESH_SECONDS / 4)
        await bench.stream(offset, offset + PIECE, PIECE)
    behind = [at for at, _ in bench.memory.reads if at >= HOLE[1]]
    assert len(behind) <= 9, behind


async def test_where_holes_cannot_be_asked_for_all_is_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def fail(offset: int, length: int) -> Sequence[Extent]:
        raise BackendError("the storage does not say", errno.EIO)

    monkeypatch.setattr(bench.memory, "extents", fail)
    await bench.stream(0, SIZE, PIECE)
    assert sum(size for _, size in bench.memory.reads) == SIZE


async def test_an_error_is_told_where_it_is_and_only_there(bench: Bench, autojump_clock: MockClock) -> None:
    bench.memory.bad.add(9 * PIECE + 5)
    await bench.stream(0, 9 * PIECE, PIECE)
    with raises(errno.EIO):
        await bench.ahead.pread(9 * PIECE, PIECE)
    await bench.stream(10 * PIECE, 20 * PIECE, PIECE)


async def test_an_error_that_has_passed_is_not_told(bench: Bench, autojump_clock: MockClock) -> None:
    bench.memory.bad.add(9 * PIECE)
    await bench.stream(0, 8 * PIECE, PIECE)
    await trio.sleep(2 * LATENCY)
    bench.memory.bad.clear()
    await bench.stream(8 * PIECE, 12 * PIECE, PIECE)


async def test_a_storage_too_slow_for_it_is_not_read_twice_for_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(f"{__name__}.LATENCY", 2 * FRESH_SECONDS)
    await bench.stream(0, 30 * PIECE, PIECE)
    assert len(bench.memory.reads) <= 30 + PIECES + 1


# ---- reads that need no task -------------------------------------------------------------------------------------


@pytest.fixture
def quick(nursery: trio.Nursery) -> tuple[MemoryVolume, ReadAhead]:
    """A volume that answers such reads."""
    memory = MemoryVolume(random_bytes(SIZE), seconds=LATENCY)
    memory.at_once = True
    return memory, ReadAhead(Volume(Source(), memory), SIZE, nursery.start_soon)


async def test_reads_here_and_there_need_no_task(quick: tuple[MemoryVolume, ReadAhead]) -> None:
    memory, ahead = quick
    for offset in (4096, 512, 999_999, 512, SIZE - 5):
        sink: list[bytes] = []
        assert ahead.start_read(offset, 512, sink)
        assert sink == [memory.content[offset : offset + 512]]
    assert not ahead.start_read(SIZE, 512, [])
    assert {name for name, *_ in memory.requests} == {"start_read"}


async def test_a_read_that_goes_on_from_the_last_or_begins_the_volume_is_left_to_a_task(
    quick: tuple[MemoryVolume, ReadAhead], autojump_clock: MockClock
) -> None:
    _, ahead = quick
    assert not ahead.start_read(0, 512, [])
    assert ahead.start_read(4096, 512, [])
    assert not ahead.start_read(4608, 512, [])
    await ahead.pread(4608, 512)
    assert not ahead.start_read(5120, 512, [])


async def test_a_stream_is_one_whose_first_read_needed_no_task(
    quick: tuple[MemoryVolume, ReadAhead], autojump_clock: MockClock
) -> None:
    memory, ahead = quick
    assert ahead.start_read(PIECE, PIECE, [])
    assert not ahead.start_read(2 * PIECE, PIECE, [])
    for offset in range(2 * PIECE, 12 * PIECE, PIECE):
        assert await ahead.pread(offset, PIECE) == memory.content[offset : offset + PIECE]
    assert memory.most_under_way > 1


async def read_until(ahead: ReadAhead, end: int) -> None:
    """In sequence, and wait until what comes next has been read ahead."""
    for offset in range(0, end, PIECE):
        await ahead.pread(offset, PIECE)
    await trio.sleep(2 * LATENCY)


async def test_a_read_of_what_has_been_read_ahead_needs_no_task(
    quick: tuple[MemoryVolume, ReadAhead], autojump_clock: MockClock
) -> None:
    memory, ahead = quick
    await read_until(ahead, 8 * PIECE)
    for offset in range(8 * PIECE, 10 * PIECE, PIECE):
        assert ahead.start_read(offset, PIECE, []) == memory.content[offset : offset + PIECE]
    await trio.sleep(2 * FRESH_SECONDS)
    assert ahead.start_read(10 * PIECE, PIECE, []) is False, "it is too old"


class ListHeld:
    """As native/held_read.c, with lists of bytes for sinks."""

    def __init__(self) -> None:
        self.came: list[bytes] = []

    def begin(self, start: Callable[[int, int, object], bool], offset: int, length: int) -> bool:
        return start(offset, length, self.came)

    def give(self, sink: object, begin: int, length: int) -> bool:
        assert isinstance(sink, list)
        sink.append(self.came[0][begin : begin + length])
        return True


@pytest.mark.parametrize("length", [4 * KIB, PIECE])
async def test_a_stream_with_sinks_is_read_ahead_past_python(
    nursery: trio.Nursery, length: int, autojump_clock: MockClock
) -> None:
    memory = MemoryVolume(random_bytes(SIZE), seconds=LATENCY)
    memory.at_once = True
    ahead = ReadAhead(Volume(Source(), memory), SIZE, nursery.start_soon, ListHeld)
    taken = 0
    for offset in range(0, SIZE - length, length):
        sink: list[bytes] = []
        match ahead.start_read(offset, length, sink):
            case False:
                data = await ahead.pread(offset, length)
            case True:
                (data,), taken = sink, taken + 1
            case data:
                pass
        assert data == memory.content[offset : offset + length], offset
    pieces = [request for request in memory.requests if request[0] == "start_read"]
    assert all(size == max(length, PIECE) for _, _, size in pieces[:-1]), pieces
    assert taken * length >= SIZE - (2 * STREAM + 2 * PIECES) * PIECE, taken


async def test_who_got_what_was_read_ahead_is_answered_whatever_happens_to_what_comes_next(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """Told that it takes a task, the helper would have the request answered twice."""
    bench = Bench(nursery)
    await bench.stream(0, 8 * PIECE, PIECE)
    await trio.sleep(2 * LATENCY)

    def refuse(_: object) -> None:
        raise RuntimeError("Nursery is closed to new arrivals")

    bench.ahead._spawn = refuse
    assert bench.ahead.start_read(8 * PIECE, PIECE, None) == bench.memory.content[8 * PIECE : 9 * PIECE]
    assert "a bug in volfs" in caplog.text


async def test_a_read_elsewhere_ends_a_stream_and_nothing_that_was_read_ahead_is_given_out_later(
    quick: tuple[MemoryVolume, ReadAhead], autojump_clock: MockClock
) -> None:
    memory, ahead = quick
    await read_until(ahead, 8 * PIECE)
    assert ahead.start_read(20 * PIECE, 512, [])
    memory.content[8 * PIECE] ^= 1
    assert await ahead.pread(8 * PIECE, PIECE) == memory.content[8 * PIECE : 9 * PIECE]


LENGTHS = st.sampled_from([1, 512, 4 * KIB, 100 * KIB, PIECE])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("stream"), LENGTHS, st.integers(1, 12)),
        st.tuples(st.just("seek"), st.integers(0, SIZE), st.just(0)),
        st.tuples(st.just("write"), st.integers(-PIECE, 4 * PIECE), LENGTHS),
        st.tuples(st.just("write behind the back"), st.integers(0, SIZE - 1), LENGTHS),
    ),
    max_size=25,
)


@given(steps=STEPS)
@settings(max_examples=40)
def test_nobody_can_tell_by_the_bytes(steps: list[tuple[str, int, int]]) -> None:
    """Reads, writes through the same volume, and other clients' writes that the reader waited for."""

    async def play() -> None:
        async with trio.open_nursery() as nursery:
            bench, position = Bench(nursery, hole=(3 * PIECE, SIZE // 2 + 1)), 0
            for number, (step, first, second) in enumerate(steps):
                match step:
                    case "stream":
                        await bench.stream(position, position + first * second, first)
                        position += first * second
                    case "seek":
                        position = first
                    case "write":
                        offset = min(max(0, position + first), SIZE - 1)
                        await bench.volume.pwrite(offset, random_bytes(second, number))
                    case _:
                        end = min(first + second, SIZE)
                        bench.memory.content[first:end] = random_bytes(end - first, number)
                        await trio.sleep(FRESH_SECONDS + 0.001)

    trio.run(play, clock=MockClock(autojump_threshold=0))
