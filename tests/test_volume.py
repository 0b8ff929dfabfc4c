"""Open volumes, attachments and the backends behind them, on the loop: bounds, sharing, errors, release.

Around the file driver and real files; tests/faults.py makes it fail and stall.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from fakes import MemoryVolume
from faults import FaultyFileBackend
from trio.testing import MockClock
from volumes import raises, random_bytes

from volfs.attached import Attachments
from volfs.backends import DRIVERS, Registration
from volfs.backends.base import Extent
from volfs.backends.file import FileSettings, FileSource
from volfs.backends.registry import Backends
from volfs.errors import SourceError, VolumeNotFound
from volfs.fuse.handles import OpenFile, OpenFiles
from volfs.fuse.tree import VolumeNode
from volfs.volume import FRESH_SECONDS, Volume, VolumeTable

SIZE = 100_003
RDONLY, RDWR = os.O_RDONLY, os.O_RDWR


class Bench:
    """A table of volumes over one faulty backend, and a volume in it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "disk"
        self.content = random_bytes(SIZE)
        self.path.write_bytes(self.content)
        self.source = FileSource(path=str(self.path))
        self.backend = FaultyFileBackend("files", FileSettings(path=str(directory)))
        self.faults = self.backend.faults
        self.backends = Backends({"files": self.backend})
        self.table = VolumeTable(self.backends)
        self.files = OpenFiles(self.table, 0, pytest.fail)

    async def open(self, *, writable: bool = True) -> Volume:
        return await self.table.open(self.backend, self.source, writable=writable)

    async def release(self) -> None:
        await self.table.release(self.backend, self.source)

    async def open_file(self, flags: int = RDWR) -> tuple[int, OpenFile]:
        """A handle as the mount has it."""
        info = await self.backend.stat(self.source)
        number = await self.files.open(VolumeNode(9, backend=self.backend, info=info, read_at=0), flags, 0)
        return number, self.files[number]


@pytest.fixture
async def bench(volumes: Path) -> AsyncIterator[Bench]:
    """Nothing may be open in it at the end."""
    bench = Bench(volumes)
    yield bench
    assert [volume.source.url for volume in bench.table] == []
    assert bench.faults.opened == 0


@pytest.fixture
async def volume(bench: Bench) -> AsyncIterator[Volume]:
    volume = await bench.open()
    yield volume
    await bench.release()


# ---- bounds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, SIZE, SIZE),
        (0, SIZE + 1, SIZE),
        (SIZE - 1, 1, 1),
        (SIZE - 1, 4096, 1),
        (SIZE, 1, 0),
        (SIZE + 1, 1, 0),
        (1 << 62, 1, 0),
        (0, 0, 0),
        (SIZE - 10, 1 << 40, 10),
    ],
)
async def test_a_read_is_short_only_where_the_volume_ends(
    bench: Bench, volume: Volume, offset: int, length: int, expected: int
) -> None:
    assert await volume.pread(offset, length) == bench.content[offset : offset + expected]


async def test_reads_and_writes_of_nothing_do_not_reach_the_backend(bench: Bench, volume: Volume) -> None:
    assert await volume.pread(SIZE, 4096) == b""
    assert await volume.pread(5, 0) == b""
    assert await volume.pwrite(5, b"") == 0
    assert await volume.pwrite(SIZE + 5, b"") == 0
    await volume.flush()
    assert bench.faults.calls.keys() <= {"open-writable"}


async def test_a_write_across_the_end_is_short(bench: Bench, volume: Volume) -> None:
    assert await volume.pwrite(SIZE - 3, b"across the end") == 3
    await volume.flush()
    assert bench.path.read_bytes() == bench.content[:-3] + b"acr"


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, 1 << 62])
async def test_a_write_past_the_end_is_enospc(bench: Bench, volume: Volume, offset: int) -> None:
    with raises(errno.ENOSPC):
        await volume.pwrite(offset, b"x")
    assert bench.path.read_bytes() == bench.content


async def test_bounds_are_those_of_the_last_refresh(bench: Bench, volume: Volume) -> None:
    with bench.path.open("ab") as file:
        file.write(b"more")
    assert await volume.pread(SIZE, 10) == b""
    assert (await volume.refresh()).size == SIZE + 4
    assert await volume.pread(SIZE, 10) == b"more"
    assert await volume.pwrite(SIZE + 3, b"!!") == 1


async def test_resize_moves_the_end(bench: Bench, volume: Volume) -> None:
    await volume.resize(SIZE + 10)
    assert await volume.pread(SIZE - 1, 100) == bench.content[-1:] + bytes(10)
    await volume.resize(10)
    assert await volume.pread(0, 100) == bench.content[:10]
    with raises(errno.ENOSPC):
        await volume.pwrite(10, b"x")


# ---- extents and zeros ------------------------------------------------------------------------------------------


class Sparse:
    """A volume in memory: a hole, data, a hole."""

    def __init__(self) -> None:
        self.content = bytes(10_000) + random_bytes(10_000) + bytes(10_000)
        self.memory = MemoryVolume(self.content, seconds=0.01)
        self.volume = Volume(FileSource(path="/sparse"), self.memory)

    def asked(self, operation: str) -> list[tuple[int, int]]:
        return [(offset, length) for name, offset, length in self.memory.requests if name == operation]

    async def extents(self) -> list[Extent]:
        found = [await self.volume.extent(0, 30_000)]
        while found[-1].end < 30_000:
            found.append(await self.volume.extent(found[-1].end, 30_000 - found[-1].end))
        return found


@pytest.fixture
def sparse() -> Sparse:
    return Sparse()


async def test_extents_are_asked_for_once_and_cut_to_the_range(
    sparse: Sparse, autojump_clock: MockClock
) -> None:
    hole, data, rest = Extent(0, 10_000, False), Extent(10_000, 10_000, True), Extent(20_000, 10_000, False)
    for _ in range(3):
        assert await sparse.extents() == [hole, data, rest]
    assert await sparse.volume.extent(5, 7) == Extent(5, 7, False)
    assert await sparse.volume.extent(19_999, 7) == Extent(19_999, 1, True)
    assert len(sparse.asked("extents")) == 3
    sparse.volume.opened_again()
    assert await sparse.volume.extent(5, 7) == Extent(5, 7, False)
    assert len(sparse.asked("extents")) == 4


async def test_an_answer_from_before_an_open_is_not_for_who_opened(
    sparse: Sparse, autojump_clock: MockClock
) -> None:
    """The driver had looked already when another client wrote and a program opened the volume."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sparse.volume.extent, 0, 30_000)
        await trio.testing.wait_all_tasks_blocked()
        sparse.memory.at_once = True
        assert sparse.memory.start_write(0, memoryview(b"another client's"))
        sparse.volume.opened_again()
    assert len(sparse.asked("extents")) == 2
    assert (await sparse.volume.extent(0, 30_000)).data


async def test_what_is_past_the_end_of_a_shrunk_volume_is_data(
    sparse: Sparse, autojump_clock: MockClock
) -> None:
    await sparse.volume.resize(5_000)
    assert await sparse.volume.extent(6_000, 100) == Extent(6_000, 100, True)
    assert sparse.asked("extents") == []
    with raises(errno.ENOSPC):
        await sparse.volume.discard(4_000, 1_001)


@pytest.mark.parametrize(
    ("begin", "seconds"),
    [(0.0, 0.001), (0.0, 0.03), (0.007, 0.001), (0.007, 0.03), (0.016, 0.001)],
    ids=["before", "around", "within", "across the end of", "after"],
)
@pytest.mark.parametrize("way", ["pwrite", "start_write", "write_zeroes"])
async def test_what_is_written_is_no_hole_from_when_it_begins(
    sparse: Sparse, way: str, begin: float, seconds: float, autojump_clock: MockClock
) -> None:
    """Begun and ended at these times; a question is under way from 0.005 to 0.015."""
    memory, volume = sparse.memory, sparse.volume
    memory.at_once = way == "start_write"

    async def write() -> None:
        await trio.sleep(begin)
        memory.latencies.append(seconds)
        if way == "pwrite":
            await volume.pwrite(5_000, b"x" * 100)
        elif way == "write_zeroes":
            await volume.write_zeroes(5_000, 100)
        else:
            memory.latencies.clear()
            assert volume.start_write(5_000, memoryview(b"x" * 100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await trio.sleep(0.005)
        await volume.extent(5_000, 1)
        await trio.sleep(0.002)
        for at in (5_000, 5_099):
            assert (await volume.extent(at, 1)).data, f"byte {at} at {trio.current_time()}"
    for at in (5_000, 5_099):
        assert (await volume.extent(at, 1)).data, f"byte {at} at the end"
    assert not (await volume.extent(0, 1)).data


async def test_two_that_ask_at_once_both_hear_of_a_write(sparse: Sparse, autojump_clock: MockClock) -> None:
    sparse.memory.at_once = True
    sparse.memory.latencies.extend([0.03, 0.01])  # the first that asks is answered last, by what it was
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sparse.volume.extent, 0, 30_000)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(sparse.volume.extent, 0, 30_000)
        await trio.sleep(0.02)
        assert sparse.volume.start_write(5_000, memoryview(b"x"))
    assert (await sparse.volume.extent(5_000, 1)).data


@pytest.mark.parametrize("way", ["discard", "write_zeroes"])
async def test_what_was_data_is_asked_for_again_when_it_was_zeroed(
    sparse: Sparse, way: str, autojump_clock: MockClock
) -> None:
    await sparse.extents()
    zero = sparse.volume.discard if way == "discard" else sparse.volume.write_zeroes
    await zero(10_000, 10_000)
    asked = len(sparse.asked("extents"))
    await sparse.volume.extent(10_000, 10_000)
    assert len(sparse.asked("extents")) == asked + 1
    assert (await sparse.volume.extent(10_000, 1)).data == (way == "write_zeroes")


async def test_a_discard_leaves_holes_alone_by_what_the_storage_says_now(
    sparse: Sparse, autojump_clock: MockClock
) -> None:
    await sparse.extents()
    await sparse.volume.discard(5_000, 20_000)
    assert sparse.asked("discard") == [(10_000, 10_000)]
    await sparse.memory.pwrite(7_000, b"another client's")
    await trio.sleep(1.1 * FRESH_SECONDS)
    await sparse.volume.discard(5_000, 20_000)
    assert sparse.memory.content == bytes(30_000)


async def test_a_discard_that_meets_a_write_under_way_does_not_trust_the_hole(
    sparse: Sparse, autojump_clock: MockClock
) -> None:
    """The write may have landed before the discard began, for all that its writer knows."""
    sparse.memory.latencies.append(0.001)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sparse.volume.pwrite, 5_000, b"x")
        await trio.testing.wait_all_tasks_blocked()
        await sparse.volume.discard(0, 10_000)
    assert sparse.asked("discard") == [(5_000, 1_000)], "as far as the memory tells data apart"
    assert sparse.memory.content[:10_000] == bytes(10_000)


async def test_what_is_started_is_within_bounds_or_left_to_a_task(sparse: Sparse) -> None:
    volume, memory = sparse.volume, sparse.memory
    assert not volume.start_write(0, memoryview(b"x")), "the driver does not take it"
    assert not volume.dirty
    memory.at_once = True
    assert not volume.start_write(0, memoryview(b""))
    assert not volume.start_write(29_999, memoryview(b"xy"))
    assert volume.writes == 0
    assert volume.start_write(29_999, memoryview(b"x"))
    assert volume.writes == 1
    assert volume.dirty
    sink: list[bytes] = []
    assert volume.start_read(29_990, 4096, sink)
    assert sink == [bytes(9) + b"x"]
    assert not volume.start_read(30_000, 1, sink)
    await volume.flush()
    assert not volume.dirty


# ---- sharing ---------------------------------------------------------------------------------------------------


async def test_many_handles_share_one_backend_open(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(bench.open)
    assert bench.faults.calls["open-writable"] == 1
    (volume,) = bench.table
    assert volume.handles == 20
    for left in range(19, -1, -1):
        assert bench.faults.opened == 1
        await bench.release()
        assert volume.handles == left
    assert bench.faults.opened == 0
    assert bench.table.get(bench.backend, bench.source) is None


async def test_equal_sources_are_one_volume_and_others_are_not(bench: Bench, volumes: Path) -> None:
    (volumes / "other").write_bytes(b"other")
    one = await bench.table.open(bench.backend, FileSource(path=str(bench.path)), writable=False)
    same = await bench.table.open(bench.backend, FileSource(path=str(bench.path)), writable=False)
    other = await bench.table.open(bench.backend, FileSource(path=str(volumes / "other")), writable=False)
    assert one is same
    assert other is not one
    assert await other.pread(0, 10) == b"other"
    for source in (bench.source, bench.source, other.source):
        await bench.table.release(bench.backend, source)


async def test_a_read_only_volume_is_opened_read_only(bench: Bench) -> None:
    volume = await bench.open(writable=False)
    assert not volume.properties.writable
    assert bench.faults.calls["open-writable"] == 0
    await bench.release()


async def test_a_volume_turns_writable_while_it_is_read(bench: Bench) -> None:
    reader = await bench.open(writable=False)
    bench.faults.stall("pread", offset=5)
    results: list[bytes] = []

    async def read() -> None:
        results.append(await reader.pread(0, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(bench.open)  # waits for the read before it closes what that uses
        with trio.fail_after(5):
            while not reader.properties.writable:
                await trio.testing.wait_all_tasks_blocked()
        assert bench.faults.opened == 2
        assert await reader.pread(10, 10) == bench.content[10:20]  # others go on, on the new one
        assert await reader.pwrite(20, b"new") == 3
        bench.faults.heal()
    assert results == [bench.content[:10]]
    assert bench.faults.opened == 1
    assert reader.handles == 2
    await bench.release()
    await bench.release()
    assert bench.path.read_bytes()[20:23] == b"new"


async def test_a_volume_that_cannot_turn_writable_stays_readable(bench: Bench) -> None:
    reader = await bench.open(writable=False)
    bench.faults.fail("open-writable", errno.EROFS)
    with raises(errno.EROFS):
        await bench.open()
    assert await reader.pread(0, 10) == bench.content[:10]
    assert reader.handles == 1
    bench.faults.heal()
    assert await bench.open() is reader
    await bench.release()
    await bench.release()


async def test_a_failed_open_leaves_nothing(bench: Bench) -> None:
    bench.faults.fail("open-writable", errno.EBUSY)
    with raises(errno.EBUSY):
        await bench.open()
    assert list(bench.table) == []
    assert bench.faults.calls["aclose"] == 0
    bench.faults.calls.clear()
    bench.faults.heal()
    await bench.open()
    await bench.release()


async def test_a_volume_that_is_opening_does_not_hold_up_another(bench: Bench, volumes: Path) -> None:
    (volumes / "other").write_bytes(b"other")
    bench.faults.stall("open-writable")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.open)
        await trio.testing.wait_all_tasks_blocked()
        other = FileSource(path=str(volumes / "other"))
        with trio.fail_after(5):
            await bench.table.open(bench.backend, other, writable=False)
            await bench.table.release(bench.backend, other)
        bench.faults.heal()
    await bench.release()


async def test_an_open_asks_for_the_size_again(bench: Bench, volume: Volume) -> None:
    with bench.path.open("ab") as file:
        file.write(b"more")
    assert (await bench.open()) is volume
    assert volume.properties.size == SIZE + 4
    await bench.release()


async def test_an_open_that_is_cancelled_leaves_the_count_right(bench: Bench, volume: Volume) -> None:
    bench.faults.stall("refresh")
    with trio.move_on_after(0.05):
        await bench.open()
    bench.faults.heal()
    assert volume.handles == 1


async def test_closing_waits_for_requests_under_way(bench: Bench) -> None:
    volume = await bench.open()
    bench.faults.stall("pwrite")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(volume.pwrite, 0, b"late")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(bench.release)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.faults.calls["aclose"] == 0
        bench.faults.heal()
    assert bench.path.read_bytes()[:4] == b"late"


async def test_a_volume_opened_while_it_closes_is_opened_anew(bench: Bench) -> None:
    first = await bench.open()
    await first.pwrite(0, b"one")
    bench.faults.stall("aclose")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.release)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(bench.open)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.faults.calls["open-writable"] == 1
        bench.faults.heal()
    (second,) = bench.table
    assert second is not first
    assert await second.pread(0, 3) == b"one"
    await bench.release()


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOSPC])
async def test_an_error_of_the_backend_keeps_its_errno(bench: Bench, volume: Volume, number: int) -> None:
    bench.faults.fail("pread", number, offset=50_000)
    bench.faults.fail("pwrite", number, offset=60_000)
    with raises(number):
        await volume.pread(49_990, 20)
    with raises(number):
        await volume.pwrite(59_990, bytes(20))
    assert await volume.pread(0, 50_000) == bench.content[:50_000]  # it is a fault of that place only
    assert await volume.pwrite(0, b"x") == 1


async def test_a_failed_write_wants_a_flush_all_the_same(bench: Bench, volume: Volume) -> None:
    """Some of it may have been written."""
    bench.faults.fail("pwrite", errno.EIO)
    with raises(errno.EIO):
        await volume.pwrite(0, b"x")
    await volume.flush()
    assert bench.faults.calls["flush"] == 1


async def test_a_flush_with_nothing_to_flush_does_not_reach_the_backend(bench: Bench, volume: Volume) -> None:
    await volume.flush()
    await volume.pwrite(0, b"x")
    await volume.flush()
    await volume.flush()
    assert bench.faults.calls["flush"] == 1


async def test_a_flush_covers_the_writes_that_returned_before_it(bench: Bench, volume: Volume) -> None:
    """And not one that returns while it is under way: that one wants another flush."""
    await volume.pwrite(0, b"before")
    bench.faults.stall("flush")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(volume.flush)
        await trio.testing.wait_all_tasks_blocked()
        await volume.pwrite(10, b"meanwhile")
        bench.faults.heal()
    assert bench.faults.calls["flush"] == 1
    await volume.flush()
    assert bench.faults.calls["flush"] == 2


async def test_a_failed_flush_is_tried_again(bench: Bench, volume: Volume) -> None:
    await volume.pwrite(0, b"x")
    bench.faults.fail("flush", errno.EIO)
    for _ in range(2):
        with raises(errno.EIO):
            await volume.flush()
    bench.faults.heal()
    await volume.flush()
    assert bench.faults.calls["flush"] == 3
    assert volume.failures == 2


async def test_a_failed_flush_is_told_to_each_handle_once(bench: Bench) -> None:
    (_, one), (_, two), (_, three) = handles = [await bench.open_file() for _ in range(3)]
    await one.write(0, b"one")
    await two.write(10, b"two")
    bench.faults.fail("flush", errno.ENOSPC)
    with raises(errno.ENOSPC):
        await one.fsync()
    bench.faults.heal()
    with raises(errno.ENOSPC):  # found out by another handle, and concerns this one's writes as well
        await two.fsync()
    with raises(errno.ENOSPC):
        await three.fsync()
    for handle in (one, two, three):
        await handle.fsync()
    number, later = await bench.open_file()
    await later.fsync()  # opened after that
    for opened, _ in [*handles, (number, later)]:
        await bench.files.release(opened)


async def test_closing_a_handle_that_wrote_flushes_and_tells(bench: Bench) -> None:
    number, file = await bench.open_file()
    await file.close()
    assert bench.faults.calls["flush"] == 0
    await file.write(0, b"x")
    bench.faults.fail("flush", errno.EIO)
    with raises(errno.EIO):
        await file.close()
    bench.faults.heal()
    await file.close()  # another descriptor of the same handle
    await bench.files.release(number)


async def test_a_handle_that_only_reads_flushes_nothing_when_closed(bench: Bench) -> None:
    writer_number, writer = await bench.open_file()
    number, reader = await bench.open_file(RDONLY)
    await writer.write(0, b"x")
    await reader.close()
    assert bench.faults.calls["flush"] == 0
    with raises(errno.EBADF):
        await reader.write(0, b"x")
    await bench.files.release(number)
    await bench.files.release(writer_number)


async def test_emptied_is_the_handle_that_is_being_opened_and_not_another_of_its_thread(bench: Bench) -> None:
    """O_TRUNC comes as a request of its own, which tells the thread and not the handle. Earlier ones may be idle."""
    info = await bench.backend.stat(bench.source)
    node = VolumeNode(9, backend=bench.backend, info=info, read_at=0)
    thread = os.getpid()
    numbers = [await bench.files.open(node, RDWR, thread) for _ in range(3)]
    files = [bench.files[number] for number in numbers]
    other = await bench.files.open(node, RDWR, 1)
    for expected in reversed(files):
        found = bench.files.opening(node, thread)
        assert found is expected
        found.truncate_at_open()
    assert bench.files.opening(node, thread) is None
    for number in [*numbers, other]:
        await bench.files.release(number)


async def test_an_error_of_the_last_close_is_raised_and_the_volume_is_gone(bench: Bench) -> None:
    volume = await bench.open()
    await volume.pwrite(0, b"x")
    bench.faults.fail("aclose", errno.EIO)
    with raises(errno.EIO):
        await bench.release()
    assert list(bench.table) == []
    bench.faults.heal()
    again = await bench.open()
    assert again is not volume
    await bench.release()


async def test_closing_the_table_closes_all_and_tells_what_failed(bench: Bench, volumes: Path) -> None:
    sources = [FileSource(path=str(volumes / name)) for name in "abc"]
    for source in sources:
        (volumes / source.name).write_bytes(bytes(10))
        volume = await bench.table.open(bench.backend, source, writable=True)
        await volume.pwrite(0, source.name.encode())
    bench.faults.fail("aclose", errno.EIO)
    errors = await bench.table.aclose()
    assert [error.errno for error in errors] == [errno.EIO] * 3
    assert [(volumes / name).read_bytes()[:1] for name in "abc"] == [b"a", b"b", b"c"]


async def test_closing_the_table_closes_side_by_side(bench: Bench, volumes: Path) -> None:
    for name in "abc":
        (volumes / name).write_bytes(bytes(10))
        await bench.table.open(bench.backend, FileSource(path=str(volumes / name)), writable=False)
    bench.faults.stall("aclose")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.table.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.faults.stalled == 3
        bench.faults.heal()


async def test_waiting_for_a_release_returns_with_it(bench: Bench) -> None:
    await bench.open()
    done = trio.Event()

    async def wait() -> None:
        await bench.table.wait_changed(lambda: bench.table.get(bench.backend, bench.source) is None)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        await bench.release()


# ---- backends --------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FaultyFileBackend]:
    """The backends of driver `file` that were made, in order, each a faulty one."""
    found: list[FaultyFileBackend] = []

    class Recorded(FaultyFileBackend):
        def __init__(self, name: str, settings: FileSettings) -> None:
            super().__init__(name, settings)
            found.append(self)

    monkeypatch.setattr("faults.RecordedBackend", Recorded, raising=False)
    monkeypatch.setitem(DRIVERS, "file", Registration("faults", "RecordedBackend"))
    return found


def file_source(directory: Path, name: str, content: bytes = b"content") -> FileSource:
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(content)
    return FileSource(path=str(directory / name))


async def test_a_configured_backend_serves_its_own_and_is_never_released(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    configured = FaultyFileBackend("files", FileSettings(path=str(volumes)))
    backends = Backends({"files": configured})
    backend = backends.acquire(file_source(volumes, "disk"))
    assert backend is configured
    await backends.release(backend)
    assert configured.faults.calls["release"] == 0
    assert made == []
    await backends.aclose()
    assert configured.faults.calls["release"] == 1


async def test_a_backend_made_on_demand_is_shared_and_goes_with_its_last_user(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    backends = Backends({})
    sources = [file_source(volumes, name) for name in ("one", "two")]
    first, second = (backends.acquire(source) for source in sources)
    assert first is second is made[0]
    await backends.release(first)
    assert made[0].faults.calls["release"] == 0
    await backends.release(second)
    assert made[0].faults.calls["release"] == 1
    third = backends.acquire(sources[0])
    assert third is made[1]
    await backends.release(third)
    assert made[1].faults.calls["release"] == 1


async def test_sources_of_other_places_get_backends_of_their_own(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    backends = Backends({})
    here = backends.acquire(file_source(volumes / "here", "disk"))
    there = backends.acquire(file_source(volumes / "there", "disk"))
    assert here is not there
    await backends.aclose()
    assert [backend.faults.calls["release"] for backend in made] == [1, 1]


async def test_an_open_volume_keeps_the_backend_made_for_it(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    backends = Backends({})
    table = VolumeTable(backends)
    source = file_source(volumes, "disk")
    backend = backends.acquire(source)
    await table.open(backend, source, writable=False)
    await backends.release(backend)
    assert made[0].faults.calls["release"] == 0
    await table.release(backend, source)
    assert made[0].faults.calls["release"] == 1


# ---- attachments -----------------------------------------------------------------------------------------------


async def test_an_attachment_lives_as_long_as_a_lease_is_on_it(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    attachments = Attachments(Backends({}))
    source = file_source(volumes, "disk")
    one, first = await attachments.attach(source, None)
    two, second = await attachments.attach(source, None)
    assert one is two
    assert one.name == "disk"
    assert first != second
    assert attachments.find("disk") is attachments.find(source.url) is one
    attachments.give_up(first)
    await attachments.remove_unleased(one)
    assert attachments.get("disk") is one
    assert attachments.give_up(first) is None  # given up before
    assert attachments.give_up(second) is one
    await attachments.remove_unleased(one)
    assert len(attachments) == 0
    assert [backend.faults.calls["release"] for backend in made] == [1]


async def test_attaching_opens_nothing(made: list[FaultyFileBackend], volumes: Path) -> None:
    attachments = Attachments(Backends({}))
    attachment, lease = await attachments.attach(file_source(volumes, "disk"), None)
    assert made[0].faults.calls.keys() <= {"stat"}
    attachments.give_up(lease)
    await attachments.remove_unleased(attachment)


async def test_attaching_what_is_not_there_fails_and_leaves_nothing(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    attachments = Attachments(Backends({}))
    with pytest.raises(VolumeNotFound):
        await attachments.attach(FileSource(path=str(volumes / "missing")), None)
    assert len(attachments) == 0
    assert made[0].faults.calls["release"] == 1


async def test_one_name_is_for_one_volume(made: list[FaultyFileBackend], volumes: Path) -> None:
    backends = Backends({})
    attachments = Attachments(backends)
    disk, other = file_source(volumes / "a", "disk"), file_source(volumes / "b", "disk")
    await attachments.attach(disk, "disk")
    with raises(errno.EEXIST):
        await attachments.attach(other, "disk")
    with raises(errno.EEXIST):
        await attachments.attach(msgspec.structs.replace(disk, read_only=True), "disk")
    await attachments.attach(other, "another")
    assert sorted(attachment.name for attachment in attachments) == ["another", "disk"]
    assert made[1].faults.calls["release"] == 1  # of the attempt under the taken name
    await backends.aclose()


async def test_a_volume_whose_own_name_is_taken_gets_a_number_behind_it(volumes: Path) -> None:
    attachments = Attachments(Backends({}))
    disk, other = file_source(volumes / "a", "disk"), file_source(volumes / "b", "disk")
    names = [(await attachments.attach(source, None))[0].name for source in (disk, other, disk, other)]
    assert names == ["disk", "disk-2", "disk", "disk-2"]


async def test_the_same_volume_may_have_two_names(volumes: Path) -> None:
    attachments = Attachments(Backends({}))
    source = file_source(volumes, "disk")
    one, _ = await attachments.attach(source, "one")
    two, _ = await attachments.attach(source, "two")
    assert one.backend is two.backend


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256, "é" * 128])
async def test_a_name_that_no_file_can_have_is_refused(volumes: Path, name: str) -> None:
    with pytest.raises(SourceError):
        await Attachments(Backends({})).attach(file_source(volumes, "disk"), name)


async def test_racing_attachments_of_one_volume_share_it(
    made: list[FaultyFileBackend], volumes: Path
) -> None:
    attachments = Attachments(Backends({}))
    source = file_source(volumes, "disk")
    leases: list[int] = []

    async def attach() -> None:
        leases.append((await attachments.attach(source, None))[1])

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(attach)
    assert len(set(leases)) == 10
    (attachment,) = attachments
    for lease in leases:
        attachments.give_up(lease)
    await attachments.remove_unleased(attachment)
    assert sum(backend.faults.calls["release"] for backend in made) == len(made)


# ---- volumes that a client knows to be blank --------------------------------------------------------------------


async def test_a_blank_volume_is_a_hole_but_where_it_was_written_through_all_opens(bench: Bench) -> None:
    """The file has data everywhere: only the promise makes it a hole."""
    bench.table.promise_blank(bench.backend, bench.source, SIZE)
    volume = await bench.open()
    assert await volume.extent(0, SIZE) == Extent(0, SIZE, False)
    await volume.pwrite(50_000, b"x" * 1000)
    await bench.release()
    volume = await bench.open()
    assert await volume.extent(0, SIZE) == Extent(0, 50_000, False)
    assert (await volume.extent(50_000, 1000)).data
    assert await volume.extent(51_000, SIZE) == Extent(51_000, SIZE - 51_000, False)
    await bench.release()


async def test_a_promise_that_is_forgotten_counts_no_more(bench: Bench) -> None:
    bench.table.promise_blank(bench.backend, bench.source, SIZE)
    bench.table.forget_blank(bench.backend, bench.source)
    assert (await (await bench.open()).extent(0, SIZE)).data
    await bench.release()


async def test_nothing_is_promised_of_a_volume_in_use(bench: Bench) -> None:
    """Who uses it may have written."""
    volume = await bench.open()
    bench.table.promise_blank(bench.backend, bench.source, SIZE)
    assert (await volume.extent(0, SIZE)).data
    await bench.release()
    assert (await (await bench.open()).extent(0, SIZE)).data
    await bench.release()


# ---- what was lost without anybody having heard of it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "told_at_detach"),
    [("write close", True), ("write fsync close", False), ("write fsync write close", True)],
)
async def test_a_lost_write_is_told_at_the_detach_if_programs_heard_of_it_by_close_alone(
    bench: Bench, calls: str, told_at_detach: bool
) -> None:
    """qemu-img does not look at what close(2) returns."""
    number, file = await bench.open_file()
    bench.faults.fail("flush", errno.EDQUOT)
    for call in calls.split():
        if call == "write":
            await file.write(0, b"new")
        else:
            with raises(errno.EDQUOT):
                await getattr(file, call)()
    bench.faults.heal()
    await bench.files.release(number)
    failure = bench.table.take_failure(bench.backend, bench.source)
    assert (failure and failure.errno) == (errno.EDQUOT if told_at_detach else None)


async def test_what_is_known_of_holes_is_as_old_as_the_oldest_question(autojump_clock: MockClock) -> None:
    """The one that was asked later may be answered first."""
    memory = MemoryVolume(bytes(10_000) + random_bytes(10_000))
    memory.latencies.extend((5.0, 0.1))
    volume = Volume(FileSource(path="/x"), memory)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(volume.extent, 0, 1)
        await trio.sleep(4.85)
        await volume.extent(15_000, 1)
        assert volume.recent_extent(15_000) is not None
    assert volume.recent_extent(0) is None
    await volume.look(0)
    assert volume.recent_extent(0) == (Extent(0, 10_000, data=False), trio.current_time())


async def test_a_change_of_the_size_makes_old_what_was_read_before(bench: Bench) -> None:
    volume = await bench.open()
    before = volume.writes
    await volume.resize(SIZE + 1)
    assert volume.writes > before
    assert not volume.dirty
    await bench.release()
