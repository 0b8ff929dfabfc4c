"""What every driver must do: base.py's promises, over each of them, without exceptions for any.

The volumes are real ones. What they hold is written and read straight at the storage, past volfs.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounts import wait_until
from services import MIB
from volumes import (
    BRICK,
    Storage,
    StoredVolume,
    all_extents,
    assert_holes_are_zero,
    assert_same,
    raises,
    random_bytes,
    variants,
)

from volfs.backends import backend_class
from volfs.backends.base import Backend, BackendVolume, Directory, Properties, Source, VolumeInfo
from volfs.errors import BackendError, VolumeNotFound

SIZE = 9 * MIB + 4096  # ends inside an RBD object, on a sector
OBJECT = 4 * MIB  # of RBD
SECTOR = 4096  # the largest one here
EDGES = (
    (0, 1),
    (1, 1),
    (511, 2),
    (512, 512),
    (SECTOR - 1, 2),
    (SECTOR, SECTOR),
    (SECTOR + 1, 2 * SECTOR),
    (OBJECT - 1, 2),
    (OBJECT - 513, 1026),
    (OBJECT - SECTOR, 2 * SECTOR),
    (7, 3 * MIB + 13),
    (OBJECT - 5, OBJECT + 10),
    (SIZE - 1, 1),
    (SIZE - SECTOR - 1, SECTOR + 1),
    (1, SIZE - 2),
    (0, SIZE),
)


@pytest.fixture(params=[*variants(quick=("file",)), pytest.param(BRICK, marks=pytest.mark.slow, id="brick")])
def make(request: pytest.FixtureRequest, storage: Storage) -> Callable[..., StoredVolume]:
    """make(size, content): a volume of each driver in turn."""
    _, driver, options = request.param
    return partial(storage.make, driver, **options)


@pytest.fixture
def stored(make: Callable[..., StoredVolume]) -> StoredVolume:
    return make(SIZE)


@pytest.fixture
async def backend(stored: StoredVolume) -> AsyncIterator[Backend]:
    backend = stored.make_backend()
    yield backend
    await backend.aclose()


@pytest.fixture
async def volume(stored: StoredVolume, backend: Backend) -> AsyncIterator[BackendVolume]:
    """The stored volume, open for writing."""
    volume = await backend.open(stored.source, writable=True)
    yield volume
    await volume.aclose()


async def read_all(volume: BackendVolume) -> bytes:
    return await volume.pread(0, volume.properties.size)


# ---- bytes -----------------------------------------------------------------------------------------------------


async def test_a_read_of_any_range_returns_exactly_its_bytes(stored: StoredVolume, backend: Backend) -> None:
    content = random_bytes(SIZE)
    stored.write(content)
    async with await backend.open(stored.source, writable=False) as volume:
        for offset, length in EDGES:
            data = await volume.pread(offset, length)
            assert type(data) is bytes, (offset, length)
            assert data == content[offset : offset + length], f"{length} bytes at {offset} differ"


async def test_a_volume_nobody_wrote_to_reads_as_zeros(volume: BackendVolume) -> None:
    assert await read_all(volume) == bytes(SIZE)


async def test_a_write_of_any_range_changes_exactly_its_bytes(
    stored: StoredVolume, volume: BackendVolume
) -> None:
    model = bytearray(SIZE)
    for seed, (offset, length) in enumerate(reversed(EDGES)):
        data = random_bytes(length, seed)
        model[offset : offset + length] = data
        await volume.pwrite(offset, data)
        around = max(0, offset - SECTOR), min(SIZE, offset + length + SECTOR)
        assert await volume.pread(around[0], around[1] - around[0]) == model[slice(*around)], (
            f"after a write of {length} bytes at {offset}"
        )
    await volume.flush()
    assert stored.read() == model


async def test_a_write_takes_a_view_of_a_larger_buffer(stored: StoredVolume, volume: BackendVolume) -> None:
    data = random_bytes(3 * MIB)
    await volume.pwrite(OBJECT - MIB, memoryview(data)[5 : 2 * MIB + 5])
    await volume.pwrite(1, memoryview(bytearray(data))[-3:])
    await volume.flush()
    expected = bytearray(SIZE)
    expected[OBJECT - MIB : OBJECT + MIB] = data[5 : 2 * MIB + 5]
    expected[1:4] = data[-3:]
    assert stored.read() == expected


async def test_many_requests_at_once_each_get_their_own_bytes(
    stored: StoredVolume, volume: BackendVolume
) -> None:
    """Reads in one half while the other one is written, in pieces that fit no sector."""
    content = random_bytes(SIZE)
    half, piece = SIZE // 2, 50_021
    await volume.pwrite(0, content[:half])

    async def read(offset: int, length: int) -> None:
        assert await volume.pread(offset, length) == content[offset : offset + length], (offset, length)

    async def write(offset: int, length: int) -> None:
        await volume.pwrite(offset, content[offset : offset + length])

    async with trio.open_nursery() as nursery:
        for offset in range(0, half, piece):
            nursery.start_soon(read, offset, min(piece, half - offset))
        for offset in range(half, SIZE, piece):
            nursery.start_soon(write, offset, min(piece, SIZE - offset))
    await volume.flush()
    assert stored.read() == content


@pytest.mark.parametrize("piece", [1, 37, 500, 4099])
async def test_writes_at_once_keep_their_neighbours_bytes(
    stored: StoredVolume, volume: BackendVolume, piece: int
) -> None:
    """Many writers in the same sectors, each with bytes of its own; what is around them keeps its value."""
    content = random_bytes(SIZE)
    await volume.pwrite(0, content)
    begin = OBJECT - 64 * piece + 11
    model = bytearray(content)
    model[begin : begin + 128 * piece] = random_bytes(128 * piece, seed=1)
    async with trio.open_nursery() as nursery:
        for offset in range(begin, begin + 128 * piece, piece):
            nursery.start_soon(volume.pwrite, offset, bytes(model[offset : offset + piece]))
    await volume.flush()
    assert stored.read() == model


NEAR_EDGES = st.sampled_from([0, SECTOR, OBJECT, 2 * OBJECT, SIZE]).flatmap(
    lambda edge: st.integers(max(0, edge - 600), min(SIZE - 1, edge + 600))
)
STEPS = st.tuples(
    st.sampled_from(["read", "write", "flush", "refresh"]),
    NEAR_EDGES | st.integers(0, SIZE - 1),
    st.integers(1, 9000) | st.sampled_from([SECTOR, MIB, OBJECT + 1]),
)


@given(steps=st.lists(STEPS, max_size=15))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_sequence_of_requests_does_what_a_bytearray_does(
    stored: StoredVolume, steps: list[tuple[str, int, int]]
) -> None:
    model = bytearray(stored.read())  # of the example before
    async with stored.make_backend() as backend, await backend.open(stored.source, writable=True) as volume:
        for number, (step, offset, length) in enumerate(steps):
            length = min(length, SIZE - offset)
            match step:
                case "read":
                    got = await volume.pread(offset, length)
                    assert got == model[offset : offset + length], f"{length} bytes at {offset} differ"
                case "write":
                    model[offset : offset + length] = payload = random_bytes(length, seed=number)
                    await volume.pwrite(offset, payload)
                case "flush":
                    await volume.flush()
                case "refresh":
                    assert (await volume.refresh()).size == SIZE
    assert stored.read() == model


# ---- holes and zeros --------------------------------------------------------------------------------------------

by_each_zeroing = pytest.mark.parametrize("zeroing", ["discard", "write_zeroes"])
SPOTS = ((0, 1), (SECTOR - 1, 2), (OBJECT - 1, 1), (OBJECT + MIB, 70_000), (SIZE - 1, 1))  # to be written


def zero(volume: BackendVolume, zeroing: str, offset: int, length: int) -> Awaitable[None]:
    """discard or write_zeroes."""
    call: Callable[[int, int], Awaitable[None]] = getattr(volume, zeroing)
    return call(offset, length)


async def assert_is_data(volume: BackendVolume, offset: int, length: int, when: str) -> None:
    extents = await all_extents(volume, offset, length)
    assert all(extent.data for extent in extents), f"{when}: {extents}"


@by_each_zeroing
async def test_a_range_of_zeroes_is_exactly_that(
    stored: StoredVolume, volume: BackendVolume, zeroing: str
) -> None:
    model = bytearray(random_bytes(SIZE))
    stored.write(bytes(model))
    await volume.pwrite(0, model[:1000])  # not yet confirmed by the storage, it may be
    for offset, length in (*EDGES, (500, OBJECT), (0, SIZE)):
        when = f"after {length} zeroes at {offset}"
        begin, end = max(0, offset - SECTOR), min(SIZE, offset + length + SECTOR)
        if not any(model[offset : offset + length]):  # nothing to see any more
            model[begin:end] = random_bytes(end - begin, seed=offset)
            await volume.pwrite(begin, model[begin:end])
        await zero(volume, zeroing, offset, length)
        model[offset : offset + length] = bytes(length)
        assert_same(await volume.pread(begin, end - begin), model[begin:end], begin, when)
        await assert_holes_are_zero(volume, model, begin, end - begin, when)
    await volume.flush()
    assert_same(stored.read(), model, 0, "on the storage")


@by_each_zeroing
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (OBJECT - 513, MIB + 1026)])
async def test_closing_makes_stable_what_was_zeroed(
    stored: StoredVolume, backend: Backend, zeroing: str, offset: int, length: int
) -> None:
    model = bytearray(random_bytes(SIZE))
    stored.write(bytes(model))
    async with await backend.open(stored.source, writable=True) as volume:
        await zero(volume, zeroing, offset, length)
    model[offset : offset + length] = bytes(length)
    assert_same(stored.read(), model, 0, "on the storage")
    async with await backend.open(stored.source, writable=False) as volume:
        assert_same(await read_all(volume), model, 0, "opened again")
        await assert_holes_are_zero(volume, model, 0, SIZE, "opened again")


@by_each_zeroing
async def test_a_volume_nobody_wrote_to_stays_zero(
    stored: StoredVolume, volume: BackendVolume, zeroing: str
) -> None:
    for offset, length in ((1, SECTOR), (OBJECT - 1, 2), (0, SIZE)):
        await zero(volume, zeroing, offset, length)
    assert_same(await read_all(volume), bytes(SIZE), 0, "at once")
    await volume.flush()
    assert_same(stored.read(), bytes(SIZE), 0, "on the storage")


@by_each_zeroing
async def test_what_is_written_after_zeroing_is_there(
    stored: StoredVolume, volume: BackendVolume, zeroing: str
) -> None:
    await volume.pwrite(0, random_bytes(SIZE))
    await zero(volume, zeroing, 0, SIZE)
    model = bytearray(SIZE)
    for offset, length in SPOTS:
        model[offset : offset + length] = data = b"\xaa" * length
        await volume.pwrite(offset, data)
        await assert_is_data(volume, offset, length, f"{length} bytes at {offset}")
    assert_same(await read_all(volume), model, 0, "at once")
    await volume.flush()
    assert_same(stored.read(), model, 0, "on the storage")
    await assert_holes_are_zero(volume, model, 0, SIZE, "flushed")


@pytest.mark.parametrize("piece", [1500, 50_021])
async def test_zeroing_and_writing_at_once_keep_to_their_ranges(
    stored: StoredVolume, volume: BackendVolume, piece: int
) -> None:
    """Neighbours that share sectors, each zeroed, discarded or written, all under way together."""
    content = random_bytes(SIZE)
    await volume.pwrite(0, content)
    begin, end = OBJECT - 30 * piece - 7, OBJECT + 30 * piece + 9
    model = bytearray(content)
    async with trio.open_nursery() as nursery:
        for number, offset in enumerate(range(begin, end, piece)):
            length = min(piece, end - offset)
            how = ("discard", "pwrite", "write_zeroes", "pwrite", "")[number % 5]
            if how == "pwrite":
                model[offset : offset + length] = data = random_bytes(length, seed=number + 1)
                nursery.start_soon(volume.pwrite, offset, data)
            elif how:
                model[offset : offset + length] = bytes(length)
                nursery.start_soon(zero, volume, how, offset, length)
    assert_same(await read_all(volume), model, 0, "at once")
    await volume.flush()
    assert_same(stored.read(), model, 0, "on the storage")
    await assert_holes_are_zero(volume, model, 0, SIZE, "flushed")


@by_each_zeroing
async def test_a_cancelled_zeroing_keeps_to_its_range(
    stored: StoredVolume, volume: BackendVolume, zeroing: str
) -> None:
    """It may be zero or not; what is around it is not touched."""
    content = random_bytes(SIZE)
    stored.write(content)
    begin, end = MIB + 7, 6 * MIB + 9
    async with trio.open_nursery() as nursery:
        nursery.start_soon(zero, volume, zeroing, begin, end - begin)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await volume.flush()
    now = await read_all(volume)
    assert_same(now[:begin], content[:begin], 0, "before it")
    assert_same(now[end:], content[end:], end, "behind it")
    changed = {new for new, old in zip(now[begin:end:97], content[begin:end:97], strict=True) if new != old}
    assert changed <= {0}


@pytest.mark.parametrize("protected", [False, True], ids=["", "protected"])
@pytest.mark.parametrize("change", ["pwrite", "start_write", "discard", "write_zeroes"])
async def test_a_volume_that_is_open_for_reading_only_cannot_be_changed(
    stored: StoredVolume, backend: Backend, change: str, protected: bool
) -> None:
    """Whether or not the storage would let it."""
    content = random_bytes(SIZE)
    stored.write(content)
    source = stored.source_of(stored.protect()) if protected else stored.source
    async with await backend.open(source, writable=False) as volume:
        for offset, length in ((0, SIZE), (1, SECTOR), (SECTOR, SECTOR), (SIZE - 1, 1)):
            if change == "start_write":
                assert not volume.start_write(offset, memoryview(bytes(length)))
                continue
            with raises(errno.EROFS):
                if change == "pwrite":
                    await volume.pwrite(offset, bytes(length))
                else:
                    await zero(volume, change, offset, length)
        await volume.flush()
        assert_same(await read_all(volume), content, 0, "afterwards")
    assert_same(stored.read(), content, 0, "on the storage")


async def test_extents_cover_any_range_and_hide_nothing(stored: StoredVolume, backend: Backend) -> None:
    model = bytearray(SIZE)
    for seed, (offset, length) in enumerate(SPOTS):
        model[offset : offset + length] = data = random_bytes(length, seed)
        stored.write(data, offset)
    async with await backend.open(stored.source, writable=False) as volume:
        for offset, length in EDGES:
            await assert_holes_are_zero(volume, model, offset, length, f"{length} bytes at {offset}")
        for offset, length in SPOTS:
            await assert_is_data(volume, offset, length, f"written past volfs at {offset}")
        assert_same(await read_all(volume), model, 0, "afterwards")


async def test_what_was_written_is_data_at_once_and_stays_it(stored: StoredVolume, backend: Backend) -> None:
    async with await backend.open(stored.source, writable=True) as volume:
        await all_extents(volume, 0, SIZE)  # whatever it remembers of that is of the past
        for offset, length in SPOTS:
            await volume.pwrite(offset, b"\xaa" * length)
            await assert_is_data(volume, offset, length, f"{length} bytes at {offset}, not flushed")
        await volume.flush()
        for offset, length in SPOTS:
            await assert_is_data(volume, offset, length, f"{length} bytes at {offset}, flushed")
    async with await backend.open(stored.source, writable=False) as volume:
        for offset, length in SPOTS:
            await assert_is_data(volume, offset, length, f"{length} bytes at {offset}, opened again")


async def test_a_range_that_becomes_data_and_hole_by_turns_hides_nothing(volume: BackendVolume) -> None:
    model = bytearray(SIZE)
    offset, length = OBJECT - 3 * SECTOR, 6 * SECTOR
    for turn in range(6):
        data = random_bytes(length, seed=turn)
        await volume.pwrite(offset, data)
        model[offset : offset + length] = data
        await assert_is_data(volume, offset, length, f"turn {turn}")
        await volume.discard(offset + SECTOR, length - 2 * SECTOR)
        model[offset + SECTOR : offset + length - SECTOR] = bytes(length - 2 * SECTOR)
        await assert_holes_are_zero(volume, model, 0, SIZE, f"turn {turn}")


async def test_extents_go_along_with_requests(stored: StoredVolume, volume: BackendVolume) -> None:
    """Half of the pieces are written, and data from then on; the other half discarded; all asked for meanwhile."""
    piece = 16 * SECTOR
    stored.write(random_bytes(SIZE))

    async def write(offset: int) -> None:
        await volume.pwrite(offset, b"\xaa" * piece)
        await assert_is_data(volume, offset, piece, f"{piece} bytes at {offset}")

    async def discard(offset: int) -> None:
        await volume.discard(offset, piece)
        await all_extents(volume, max(0, offset - piece), 3 * piece)
        assert_same(await volume.pread(offset, piece), bytes(piece), offset, "discarded")

    async with trio.open_nursery() as nursery:
        for offset in range(0, 32 * piece, piece):
            nursery.start_soon(discard if offset % (2 * piece) else write, OBJECT - 16 * piece + offset)


# ---- stable storage --------------------------------------------------------------------------------------------


async def test_a_flush_makes_stable_what_was_written(stored: StoredVolume, volume: BackendVolume) -> None:
    model = bytearray(SIZE)
    await volume.flush()  # nothing to do
    for offset in (0, OBJECT + 3, SIZE - 5):
        await volume.pwrite(offset, b"bytes")
        model[offset : offset + 5] = b"bytes"
        await volume.flush()
        assert stored.read() == model, f"after the write at {offset}"


async def test_a_flush_goes_along_with_writes_and_other_flushes(
    stored: StoredVolume, volume: BackendVolume
) -> None:
    content = random_bytes(SIZE)

    async def write_and_flush(offset: int) -> None:
        await volume.pwrite(offset, content[offset : offset + 300_007])
        await volume.flush()

    async with trio.open_nursery() as nursery:
        for offset in range(0, SIZE, 300_007):
            nursery.start_soon(write_and_flush, offset)
    assert stored.read() == content


async def test_closing_makes_stable_what_was_written(stored: StoredVolume, backend: Backend) -> None:
    content = random_bytes(SIZE)
    volume = await backend.open(stored.source, writable=True)
    await volume.pwrite(0, content)
    await volume.aclose()
    assert stored.read() == content


async def test_closing_finishes_in_spite_of_a_cancellation(stored: StoredVolume, backend: Backend) -> None:
    content = random_bytes(SIZE)
    volume = await backend.open(stored.source, writable=True)
    await volume.pwrite(0, content)
    with trio.CancelScope() as scope:
        scope.cancel()
        await volume.aclose()
    assert stored.users() == []
    assert stored.read() == content


async def test_closing_twice_is_harmless(stored: StoredVolume, backend: Backend) -> None:
    for writable in (False, True):
        volume = await backend.open(stored.source, writable=writable)
        await volume.aclose()
        await volume.aclose()
    assert stored.users() == []
    await backend.aclose()
    await backend.aclose()


# ---- opening ---------------------------------------------------------------------------------------------------


async def test_an_open_volume_tells_its_properties(stored: StoredVolume, backend: Backend) -> None:
    for writable in (False, True):
        async with await backend.open(stored.source, writable=writable) as volume:
            assert isinstance(volume.properties, Properties)
            assert volume.properties.size == SIZE
            assert volume.properties.writable is writable
            assert volume.properties.block_size in (1, 512, 4096)


async def test_a_volume_is_in_use_until_it_is_closed(stored: StoredVolume, backend: Backend) -> None:
    volume = await backend.open(stored.source, writable=True)
    await volume.pwrite(0, b"x")
    assert stored.users() != []
    await volume.aclose()
    assert stored.users() == []


@pytest.mark.parametrize("forbidden_by", ["source", "settings"])
async def test_what_is_declared_read_only_is_not_opened_for_writing(
    stored: StoredVolume, backend: Backend, forbidden_by: str
) -> None:
    stored.write(b"content")
    source = stored.source
    if forbidden_by == "source":
        source = msgspec.structs.replace(source, read_only=True)
    else:
        read_only = msgspec.structs.replace(backend.settings, read_only=True)
        backend = backend_class(stored.driver)(backend.name, read_only)
    assert backend.serves(source)
    assert (await backend.stat(source)).read_only
    with pytest.raises(BackendError) as caught:
        await backend.open(source, writable=True)
    assert caught.value.errno == errno.EROFS
    async with await backend.open(source, writable=False) as volume:
        assert await volume.pread(0, 7) == b"content"
        assert not volume.properties.writable
    await backend.aclose()
    assert stored.users() == []


async def test_what_the_storage_protects_is_not_opened_for_writing(
    stored: StoredVolume, backend: Backend
) -> None:
    stored.write(b"content")
    source = stored.source_of(stored.protect())
    with pytest.raises(BackendError) as caught:
        await backend.open(source, writable=True)
    assert caught.value.errno == errno.EROFS
    async with await backend.open(source, writable=False) as volume:
        assert await volume.pread(0, 7) == b"content"
    assert stored.users() == []


# ---- names -----------------------------------------------------------------------------------------------------


def as_shown(info: VolumeInfo) -> tuple[object, ...]:
    return info.name, info.source, info.size, info.mtime_ns, info.allocated, info.read_only


@pytest.mark.parametrize("make", variants(quick=("file",)), indirect=True)
async def test_list_lookup_and_stat_agree_and_leave_nothing_behind(
    stored: StoredVolume, backend: Backend
) -> None:
    stored.write(b"content")
    *directories, name = stored.place
    path: tuple[str, ...] = ()
    for directory in directories:
        assert Directory(directory) in await backend.list(path)
        path = (*path, directory)
        assert await backend.lookup(path) == Directory(directory)
    (listed,) = [entry for entry in await backend.list(path) if entry.name == name]
    assert isinstance(listed, VolumeInfo)
    found = await backend.lookup(stored.place)
    assert isinstance(found, VolumeInfo)
    stated = await backend.stat(stored.source)
    assert backend.serves(stored.source)
    assert as_shown(stated) == as_shown(found) == as_shown(listed)
    assert stated.size == SIZE
    assert stated.source == stored.source  # one volume is one, whichever way it was found
    assert stated.identity == found.identity == listed.identity != ""
    assert not stated.read_only
    assert stored.users() == []


async def test_stat_is_the_same_as_long_as_nobody_writes(stored: StoredVolume, backend: Backend) -> None:
    stored.write(random_bytes(SIZE))
    before = await backend.stat(stored.source)
    async with await backend.open(stored.source, writable=False) as volume:
        await read_all(volume)
        during = await backend.stat(stored.source)
    await backend.list(stored.place[:-1])
    other = stored.make_backend()  # which remembers nothing
    after = await other.stat(stored.source)
    await other.aclose()
    assert as_shown(before) == as_shown(during) == as_shown(after)


async def test_describe_tells_of_its_keys_and_leaves_nothing_behind(
    stored: StoredVolume, backend: Backend
) -> None:
    told = await backend.describe(stored.source)
    assert set(told) <= set(backend.describes)
    assert all(isinstance(value, str) for value in told.values())
    assert stored.users() == []


def names_not_there(stored: StoredVolume) -> list[tuple[str, ...]]:
    *directory, name = stored.place
    near = [name + "x", name + "@", "@" + name, " " + name, name + " ", "0" + name, f"{name}@{name}"]
    return [(*directory, other) for other in near] + [(*stored.place, "below"), (*stored.place, "a", "b")]


async def test_looking_up_what_is_not_there_is_not_found(stored: StoredVolume, backend: Backend) -> None:
    for path in names_not_there(stored):
        with pytest.raises(VolumeNotFound) as caught:
            pytest.fail(f"{path}: {await backend.lookup(path)}")
        assert caught.value.errno == errno.ENOENT


async def test_listing_what_is_not_there_is_not_found(stored: StoredVolume, backend: Backend) -> None:
    *directories, _ = stored.place
    missing = [(*directories[:depth], "not-there") for depth in range(len(directories) + 1)]
    for path in [*missing, stored.place, (*stored.place, "below")]:
        with pytest.raises(VolumeNotFound):
            pytest.fail(f"{path}: {await backend.list(path)}")


def sibling_not_there(stored: StoredVolume) -> Source:
    """The source of a volume that would be beside this one. A LUN's number stays one."""
    return stored.source_of(stored.url + "7")


async def test_a_source_that_is_not_there_is_not_found(stored: StoredVolume, backend: Backend) -> None:
    source = sibling_not_there(stored)
    with pytest.raises(VolumeNotFound):
        await backend.stat(source)
    with pytest.raises(VolumeNotFound):
        await backend.describe(source)
    for writable in (False, True):
        with pytest.raises(VolumeNotFound):
            await backend.open(source, writable=writable)
    assert stored.users() == []


def test_a_source_is_the_same_each_time_it_is_parsed(stored: StoredVolume) -> None:
    source, again = stored.source, stored.source
    assert source == again
    assert hash(source) == hash(again)
    assert stored.source_of(source.url) == source
    assert source.driver == stored.driver
    assert source.url == stored.url
    assert source.name
    assert "/" not in source.name
    assert source != sibling_not_there(stored)


async def test_a_backend_made_for_a_source_serves_it(stored: StoredVolume) -> None:
    cls = backend_class(stored.driver)
    backend = cls("made", cls.settings_for(stored.source))
    assert backend.serves(stored.source)
    assert backend.settings == cls.settings_for(stored.source)
    assert hash(backend.settings) == hash(cls.settings_for(stored.source))
    assert (await backend.stat(stored.source)).size == SIZE
    async with await backend.open(stored.source, writable=True) as volume:
        await volume.pwrite(0, b"content")
    await backend.aclose()
    assert stored.read()[:8] == b"content\0"


# ---- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [False, True])
async def test_refresh_sees_a_volume_grow(stored: StoredVolume, backend: Backend, writable: bool) -> None:
    stored.write(b"begin")
    larger = SIZE + OBJECT + SECTOR
    async with await backend.open(stored.source, writable=writable) as volume:
        stored.resize(larger)
        assert (await volume.refresh()).size == larger
        assert volume.properties.size == larger
        assert volume.properties.writable is writable
        assert await volume.pread(SIZE, larger - SIZE) == bytes(larger - SIZE)
        assert await volume.pread(0, 5) == b"begin"
        if writable:
            await volume.pwrite(larger - 3, b"end")
    assert stored.users() == []
    assert len(stored.read()) == larger
    assert stored.read().endswith(b"end" if writable else b"\0\0\0")


@pytest.mark.parametrize("writable", [False, True])
async def test_refresh_sees_a_volume_shrink(stored: StoredVolume, backend: Backend, writable: bool) -> None:
    stored.write(random_bytes(SIZE))
    smaller = OBJECT - SECTOR
    async with await backend.open(stored.source, writable=writable) as volume:
        stored.resize(smaller)
        assert (await volume.refresh()).size == smaller
        assert await volume.pread(0, smaller) == random_bytes(SIZE)[:smaller]
    assert stored.users() == []


async def test_refresh_goes_along_with_requests(stored: StoredVolume, backend: Backend) -> None:
    content = random_bytes(SIZE)
    stored.write(content)

    async def read(offset: int) -> None:
        assert await volume.pread(offset, 100_003) == content[offset : offset + 100_003], offset

    async with await backend.open(stored.source, writable=False) as volume:
        stored.resize(SIZE + MIB)
        async with trio.open_nursery() as nursery:
            for offset in range(0, SIZE - 100_003, 100_003):
                nursery.start_soon(read, offset)
                nursery.start_soon(volume.refresh)
        assert volume.properties.size == SIZE + MIB
    assert stored.users() == []


async def test_resize_is_real_or_refused(
    stored: StoredVolume, backend: Backend, volume: BackendVolume
) -> None:
    await volume.pwrite(SIZE - 3, b"end")
    if volume.properties.can_resize:
        await volume.resize(SIZE + MIB)
        assert volume.properties.size == SIZE + MIB
        assert await volume.pread(SIZE - 3, MIB + 3) == b"end" + bytes(MIB)
        await volume.resize(OBJECT)
        assert volume.properties.size == OBJECT
        expected = OBJECT
    else:
        with pytest.raises(BackendError) as caught:
            await volume.resize(SIZE + MIB)
        assert caught.value.errno == errno.EOPNOTSUPP
        expected = SIZE
    await volume.flush()
    assert len(stored.read()) == expected
    assert (await backend.stat(stored.source)).size == expected


# ---- cancellation ----------------------------------------------------------------------------------------------


async def test_a_cancelled_read_leaves_the_volume_usable(stored: StoredVolume, backend: Backend) -> None:
    content = random_bytes(SIZE)
    stored.write(content)

    async with await backend.open(stored.source, writable=False) as volume:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for offset in range(0, SIZE, MIB):
                    nursery.start_soon(volume.pread, offset, min(MIB, SIZE - offset))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert await volume.pread(OBJECT - 1, 2 * MIB) == content[OBJECT - 1 : OBJECT - 1 + 2 * MIB]
        assert await read_all(volume) == content
    assert stored.users() == []


async def test_a_cancelled_write_keeps_to_its_range(stored: StoredVolume, volume: BackendVolume) -> None:
    """It may be written or not; what is around it is not touched."""
    content = random_bytes(SIZE)
    await volume.pwrite(0, content)
    begin, end = MIB + 7, 6 * MIB + 9
    async with trio.open_nursery() as nursery:
        for offset in range(begin, end, MIB):
            nursery.start_soon(volume.pwrite, offset, b"\xaa" * min(MIB, end - offset))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await volume.flush()
    now = await read_all(volume)
    assert now[:begin] == content[:begin]
    assert now[end:] == content[end:]
    changed = {new for new, old in zip(now[begin:end:97], content[begin:end:97], strict=True) if new != old}
    assert changed <= {0xAA}


async def test_a_cancelled_open_leaves_nothing_behind(stored: StoredVolume, backend: Backend) -> None:
    await backend.stat(stored.source)  # connected
    for steps in range(8):
        with trio.CancelScope() as scope:

            async def cancel_after(steps: int = steps, scope: trio.CancelScope = scope) -> None:
                for _ in range(steps):
                    await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_after)
                volume = await backend.open(stored.source, writable=True)
                await volume.aclose()
    # What arrives late is closed when it does.
    await trio.to_thread.run_sync(wait_until, lambda: not stored.users(), "the storage knows no user of it")
