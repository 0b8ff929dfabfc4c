"""Handles that were opened with O_TRUNC: what they skip reads as zeros, what they do not reach stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
import trio.testing
from fakes import MemoryVolume
from faults import FaultyFileBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock
from volumes import raises, random_bytes

from volfs.backends.file import FileSettings, FileSource
from volfs.rewriting import Rewriting
from volfs.volume import Volume

SIZE = 10_000


class Bench:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "disk"
        self.content = random_bytes(SIZE)
        self.path.write_bytes(self.content)
        self.source = FileSource(path=str(self.path))
        self.backend = FaultyFileBackend("files", FileSettings(path=str(directory)))

    async def open(self) -> Volume:
        return Volume(self.source, await self.backend.open(self.source, writable=True))


@pytest.fixture
def bench(volumes: Path) -> Bench:
    return Bench(volumes)


async def test_nothing_changes_until_something_is_written(bench: Bench) -> None:
    volume = await bench.open()
    Rewriting(volume)
    await volume.aclose()
    assert bench.path.read_bytes() == bench.content


async def test_what_is_skipped_is_zero_and_what_is_not_reached_stays(bench: Bench) -> None:
    volume = await bench.open()
    rewriting = Rewriting(volume)
    assert await rewriting.pwrite(100, b"a" * 100) == 100
    assert await rewriting.pwrite(200, b"b" * 50) == 50
    assert await rewriting.pwrite(1000, b"c") == 1
    assert await rewriting.pwrite(150, b"back") == 4
    await volume.aclose()
    written = bytes(100) + b"a" * 50 + b"back" + b"a" * 46 + b"b" * 50 + bytes(750) + b"c"
    assert bench.path.read_bytes() == written + bench.content[1001:]


async def test_a_file_extended_to_its_size_ends_with_zeros(bench: Bench) -> None:
    volume = await bench.open()
    rewriting = Rewriting(volume)
    await rewriting.pwrite(0, b"start")
    await rewriting.finish()
    await rewriting.finish()
    await rewriting.pwrite(SIZE - 3, b"end")
    await volume.aclose()
    assert bench.path.read_bytes() == b"start" + bytes(SIZE - 8) + b"end"


async def test_a_write_past_the_end_is_enospc_and_changes_nothing(bench: Bench) -> None:
    volume = await bench.open()
    with raises(errno.ENOSPC):
        await Rewriting(volume).pwrite(SIZE, b"x")
    await volume.aclose()
    assert bench.path.read_bytes() == bench.content


async def test_zeros_that_fail_fail_the_write_and_are_tried_again(bench: Bench) -> None:
    volume = await bench.open()
    rewriting = Rewriting(volume)
    failing = bench.backend.faults.fail("pwrite")
    with raises(errno.EIO):
        await rewriting.pwrite(100, b"x")
    bench.backend.faults.heal(failing)
    await rewriting.pwrite(100, b"x")
    await volume.aclose()
    assert bench.path.read_bytes() == bytes(100) + b"x" + bench.content[101:]


# ---- without a task, and for other ways to write ----------------------------------------------------------------


class Quick:
    """A full volume in memory, which takes writes without a task, and a handle on it."""

    def __init__(self) -> None:
        self.content = random_bytes(SIZE)
        self.memory = MemoryVolume(self.content, seconds=0.01)
        self.memory.at_once = True
        self.rewriting = Rewriting(Volume(FileSource(path="/quick"), self.memory))


async def test_a_write_that_skips_nothing_needs_no_task(autojump_clock: MockClock) -> None:
    quick = Quick()
    assert quick.rewriting.start_write(0, memoryview(b"a" * 100))
    assert quick.rewriting.start_write(100, memoryview(b"b" * 100))
    assert quick.rewriting.start_write(50, memoryview(b"back"))
    await quick.rewriting.pwrite(200, b"c")
    assert quick.memory.content == b"a" * 50 + b"back" + b"a" * 46 + b"b" * 100 + b"c" + quick.content[201:]


async def test_a_write_that_skips_is_left_to_a_task_and_changes_nothing(autojump_clock: MockClock) -> None:
    quick = Quick()
    assert not quick.rewriting.start_write(1, memoryview(b"x"))
    assert quick.memory.content == quick.content
    await quick.rewriting.pwrite(1, b"x")
    assert quick.memory.content == b"\0x" + quick.content[2:]


async def test_no_write_goes_past_zeros_that_are_on_their_way(autojump_clock: MockClock) -> None:
    """They would land on it."""
    quick = Quick()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quick.rewriting.pwrite, 5000, b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert not quick.rewriting.start_write(0, memoryview(b"y"))
        await quick.rewriting.pwrite(0, b"y")
    assert quick.memory.content == b"y" + bytes(4999) + b"x" + quick.content[5001:]


async def test_a_write_that_the_driver_does_not_take_is_not_counted_as_done(
    autojump_clock: MockClock,
) -> None:
    quick = Quick()
    quick.memory.at_once = False
    assert not quick.rewriting.start_write(0, memoryview(b"x" * 100))
    await quick.rewriting.pwrite(100, b"y")
    assert quick.memory.content == bytes(100) + b"y" + quick.content[101:]


async def test_what_another_call_is_about_to_write_is_reached_by_zeros_and_left_alone(
    autojump_clock: MockClock,
) -> None:
    quick = Quick()
    await quick.rewriting.reach(1000, 500)
    assert quick.memory.content == bytes(1000) + quick.content[1000:]
    await quick.rewriting.reach(1200, 10)
    await quick.rewriting.reach(SIZE, 10)  # where nothing can be written, nothing is skipped
    assert quick.memory.content == bytes(1000) + quick.content[1000:]
    await quick.rewriting.pwrite(2000, b"x")
    assert (
        quick.memory.content
        == bytes(1000) + quick.content[1000:1500] + bytes(500) + b"x" + quick.content[2001:]
    )


@given(
    writes=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3000)), max_size=12),
    at_once=st.booleans(),
    finish=st.booleans(),
)
@settings(max_examples=40)
def test_like_a_regular_file_up_to_where_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int]], at_once: bool, finish: bool
) -> None:
    """In sequence, or all at once where they do not overlap: then zeros must not come over what others write."""
    bench = Bench(tmp_path_factory.mktemp("v"))
    if at_once:
        piece = SIZE // (len(writes) + 1)
        writes = [(number * piece, min(length, piece)) for number, (_, length) in enumerate(writes)][::-1]
    model = bytearray()
    for number, (offset, length) in enumerate(writes):
        model.extend(bytes(max(0, min(offset + length, SIZE) - len(model))))
        model[offset : offset + length] = random_bytes(min(length, SIZE - offset), number)

    async def play() -> None:
        volume = await bench.open()
        rewriting = Rewriting(volume)
        async with trio.open_nursery() as nursery:
            for number, (offset, length) in enumerate(writes):
                data = random_bytes(min(length, SIZE - offset), number)
                if at_once:
                    nursery.start_soon(rewriting.pwrite, offset, data)
                else:
                    await rewriting.pwrite(offset, data)
        if finish:
            await rewriting.finish()
        await volume.aclose()
        await bench.backend.aclose()

    trio.run(play)
    rest = bytes(SIZE - len(model)) if finish else bench.content[len(model) :]
    assert bench.path.read_bytes() == model + rest
    os.unlink(bench.path)
