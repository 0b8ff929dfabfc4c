"""Holes of RBD images: extents against `rbd diff`, zeroing against the bytes, allocated space against `rbd du`."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from conftest import MakeVolume
from models import LONG_STEPS
from services import MIB, Image
from volumes import RbdVolume, StoredVolume, random_bytes

from volfs.backends import rbd_extents, rbd_zeroes
from volfs.backends.base import BackendVolume, Extent, VolumeInfo
from volfs.backends.rbd import RbdBackend
from volfs.backends.rbd_object_map import ObjectMap
from volfs.errors import BackendError
from volfs.source import parse_source

KIB = 1024
TIB = 1024**4
SMALL = ("--object-size", "1M")
MAPPED = ("layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten")
pytestmark = pytest.mark.slow  # nearly all of it is Ceph's own commands; test_holes.py is quick

KINDS = {
    "mapped": MAPPED,
    "map-without-fast-diff": MAPPED[:3],
    "unmapped": MAPPED[:2],
    "striped": (*MAPPED, "striping"),
    "striped-unmapped": ("layering", "striping"),
}


def features(*names: str) -> tuple[str, ...]:
    striping = ("--stripe-unit", "64K", "--stripe-count", "3") if "striping" in names else ()
    return (*SMALL, *(word for name in names for word in ("--image-feature", name)), *striping)


def make(
    make_volume: MakeVolume, size: int = 12 * MIB + 777, *, kind: str = "mapped", **how: Any
) -> RbdVolume:
    volume = make_volume("rbd", size, options=features(*KINDS[kind]), **how)
    assert isinstance(volume, RbdVolume)
    return volume


@asynccontextmanager
async def opened(
    stored: StoredVolume, *, writable: bool = False, snapshot: str = ""
) -> AsyncIterator[BackendVolume]:
    backend = stored.make_backend()
    try:
        volume = await backend.open(
            parse_source(stored.url + snapshot, stored.environment), writable=writable
        )
        try:
            yield volume
        finally:
            await volume.aclose()
    finally:
        await backend.aclose()


async def stat(stored: StoredVolume, snapshot: str = "") -> VolumeInfo:
    """As a listing tells it, which is what `stat` of the source tells."""
    backend = stored.make_backend()
    assert isinstance(backend, RbdBackend)
    try:
        source = parse_source(stored.url + snapshot, stored.environment)
        info = await backend.stat(source)
        listed = {entry.name: entry for entry in await backend.list(stored.place[:-1])}
        assert listed[stored.place[-1] + snapshot] == info
        return info
    finally:
        await backend.aclose()


async def all_extents(volume: BackendVolume, begin: int = 0, end: int | None = None) -> list[Extent]:
    """The whole answer, put together from its parts, each of which keeps the contract."""
    end = volume.properties.size if end is None else end
    found: list[Extent] = []
    while begin < end:
        part = await volume.extents(begin, end - begin)
        assert part, f"no extent at {begin}"
        for extent in part:
            assert (extent.offset, extent.length > 0) == (begin, True), f"{extent} does not begin at {begin}"
            begin = extent.end
        assert begin <= end, f"{part[-1]} ends beyond {end}"
        found += part
    return found


def merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, end) in order, touching ones as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(runs):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def data_of(extents: Sequence[Extent]) -> list[tuple[int, int]]:
    return merged((extent.offset, extent.end) for extent in extents if extent.data)


def diff(image: Image, snapshot: str = "") -> list[tuple[int, int]]:
    """The data, as the rbd tool tells it."""
    runs = image.services.json("rbd", "diff", "--format", "json", image.spec + snapshot)
    return merged(
        (int(run["offset"]), int(run["offset"]) + int(run["length"]))
        for run in runs
        if run["exists"] == "true"
    )


def used(image: Image) -> int:
    """Bytes, as the rbd tool tells them of an image without snapshots."""
    (found,) = image.services.json("rbd", "du", "--format", "json", "--exact", image.spec)["images"]
    return int(found["used_size"])


def assert_holes_are_zeros(extents: Sequence[Extent], content: bytes) -> None:
    wrong = [it for it in extents if not it.data and content[it.offset : it.end].strip(b"\0")]
    assert not wrong, f"called holes, with data in them: {wrong}"


def scatter(stored: RbdVolume, seed: int = 0, writes: int = 6) -> None:
    """Random bytes in some places, of which not all begin or end where an object does."""
    dice = random.Random(seed)
    for number in range(writes):
        offset = dice.randrange(stored.size)
        length = min(dice.choice((1, 512, 4096, 70_000, 1_500_000)), stored.size - offset)
        stored.write(random_bytes(length, number), offset)


def run(stored: RbdVolume, *command: str) -> None:
    stored.image.services.run("rbd", *command)


def clone(make_volume: MakeVolume, parent: RbdVolume, kind: str = "mapped") -> RbdVolume:
    """Of the parent as it is."""
    snapshot = parent.image.snapshot("base")
    child = make(make_volume, parent.size, kind=kind)
    run(child, "rm", "--no-progress", child.image.spec)
    command = ("clone", "--rbd-default-clone-format", "2", *features(*KINDS[kind]))
    run(child, *command, parent.image.spec + snapshot, child.image.spec)
    return child


@pytest.mark.parametrize("kind", list(KINDS))
async def test_extents_are_what_rbd_diff_tells(make_volume: MakeVolume, kind: str) -> None:
    stored = make(make_volume, kind=kind)
    async with opened(stored) as volume:
        assert data_of(await all_extents(volume)) == []
        scatter(stored)
        extents = await all_extents(volume)  # of another client's writes, too
    assert data_of(extents) == diff(stored.image)
    assert_holes_are_zeros(extents, stored.read())


@pytest.mark.parametrize("kind", ["striped", "mapped", "unmapped"])
async def test_extents_of_any_range_are_a_part_of_the_whole_answer(
    make_volume: MakeVolume, kind: str
) -> None:
    stored = make(make_volume, kind=kind)
    scatter(stored)
    dice = random.Random(1)
    async with opened(stored) as volume:
        whole = data_of(await all_extents(volume))
        for _ in range(20):
            begin, end = sorted(dice.sample(range(stored.size + 1), 2))
            part = data_of(await all_extents(volume, begin, end))
            clipped = [(max(a, begin), min(b, end)) for a, b in whole if a < end and b > begin]
            assert part == clipped, (begin, end)


async def test_an_invalid_object_map_is_not_believed(make_volume: MakeVolume) -> None:
    stored = make(make_volume, kind="unmapped")
    stored.write(random_bytes(MIB), 5 * MIB)
    stored.image.snapshot("before")
    run(stored, "feature", "enable", stored.image.spec, "object-map", "fast-diff")
    flags = stored.image.services.json("rbd", "info", "--format", "json", stored.image.spec)["flags"]
    assert "object map invalid" in flags
    for snapshot in ("", "@before"):
        async with opened(stored, snapshot=snapshot) as volume:
            assert data_of(await all_extents(volume)) == [(5 * MIB, 6 * MIB)]
        assert (await stat(stored, snapshot)).allocated is None
    run(stored, "object-map", "rebuild", "--no-progress", stored.image.spec)
    assert (await stat(stored)).allocated == MIB
    assert (await stat(stored, "@before")).allocated is None


@pytest.mark.parametrize("kind", ["mapped", "unmapped", "striped"])
async def test_a_snapshot_has_extents_of_its_own(make_volume: MakeVolume, kind: str) -> None:
    stored = make(make_volume, kind=kind)
    stored.write(random_bytes(2 * MIB), MIB)
    stored.image.snapshot("one")
    async with opened(stored, writable=True) as volume:
        await volume.discard(0, 3 * MIB)
        await volume.pwrite(8 * MIB + 5, b"later")
    stored.image.snapshot("two")
    stored.write(b"head", 11 * MIB)
    for snapshot in ("", "@one", "@two"):
        async with opened(stored, snapshot=snapshot) as volume:
            extents = await all_extents(volume)
        assert_holes_are_zeros(extents, stored.image.read(snapshot))
        assert data_of(extents) == diff(stored.image, snapshot), snapshot


@pytest.mark.parametrize(
    ("parents", "childs"), [("unmapped", "mapped"), ("mapped", "mapped"), ("mapped", "unmapped")]
)
async def test_data_of_a_parent_is_data_of_its_clone(
    make_volume: MakeVolume, parents: str, childs: str
) -> None:
    parent = make(make_volume, 8 * MIB, kind=parents)
    parent.write(random_bytes(MIB), 2 * MIB)
    child = clone(make_volume, parent, childs)
    child.resize(16 * MIB)
    child.write(b"own", 12 * MIB)
    async with opened(child) as volume:
        extents = await all_extents(volume)
    assert data_of(extents) == diff(child.image) == [(2 * MIB, 3 * MIB), (12 * MIB, 12 * MIB + 3)]
    assert_holes_are_zeros(extents, child.read())
    run(child, "flatten", "--no-progress", child.image.spec)
    async with opened(child) as volume:
        assert data_of(await all_extents(volume)) == [(2 * MIB, 3 * MIB), (12 * MIB, 12 * MIB + 3)]


async def test_what_is_punched_in_a_clone_shows_nothing_of_its_parent(make_volume: MakeVolume) -> None:
    parent = make(make_volume, 6 * MIB)
    content = random_bytes(6 * MIB)
    parent.write(content)
    child = clone(make_volume, parent)
    begin, end = MIB + 100, 4 * MIB + 7
    async with opened(child, writable=True) as volume:
        await volume.discard(begin, end - begin)
        assert await volume.pread(0, 6 * MIB) == content[:begin] + bytes(end - begin) + content[end:]
        assert_holes_are_zeros(await all_extents(volume), child.read())
    assert child.read() == content[:begin] + bytes(end - begin) + content[end:]
    assert parent.read() == content


async def test_a_write_that_is_not_confirmed_yet_is_data(make_volume: MakeVolume) -> None:
    stored = make(make_volume)
    async with opened(stored, writable=True) as volume:
        for number in range(8):
            await volume.pwrite(number * MIB, random_bytes(64 * KIB))
            assert data_of(await volume.extents(number * MIB, MIB)) == [
                (number * MIB, number * MIB + 64 * KIB)
            ]


@pytest.mark.parametrize("writable", [False, True])
async def test_what_was_shrunk_away_is_no_hole(make_volume: MakeVolume, writable: bool) -> None:
    """A copy would go on with zeros where a read tells that something is wrong."""
    stored = make(make_volume, 8 * MIB)
    async with opened(stored, writable=writable) as volume:
        stored.resize(3 * MIB)
        assert data_of(await all_extents(volume)) == [(3 * MIB, 8 * MIB)]
        assert data_of(await all_extents(volume, 5 * MIB, 6 * MIB)) == [(5 * MIB, 6 * MIB)]


async def test_a_volume_that_has_grown_is_told_of_to_its_new_end(make_volume: MakeVolume) -> None:
    stored = make(make_volume, 2 * MIB)
    async with opened(stored) as volume:
        stored.resize(20 * MIB)
        stored.write(b"end", 20 * MIB - 3)
        await volume.refresh()
        assert data_of(await all_extents(volume)) == diff(stored.image)


async def test_a_migrating_image_is_all_data(make_volume: MakeVolume) -> None:
    stored = make(make_volume, 4 * MIB)
    stored.write(b"data", MIB)
    run(stored, "migration", "prepare", stored.image.spec, stored.image.spec)
    try:
        async with opened(stored) as volume:
            assert data_of(await all_extents(volume)) == [(0, 4 * MIB)]
            assert await volume.pread(MIB, 4) == b"data"
        assert (await stat(stored)).allocated is None
    finally:
        run(stored, "migration", "abort", "--no-progress", stored.image.spec)


async def test_a_terabyte_with_little_in_it_is_one_answer(make_volume: MakeVolume) -> None:
    stored = make_volume("rbd", TIB)
    async with opened(stored, writable=True) as volume:
        for gibibyte in range(0, 1024, 8):
            await volume.pwrite(gibibyte << 30, b"data")
        await volume.flush()
        with trio.fail_after(5):
            extents = await volume.extents(0, TIB)
    assert data_of(extents) == [(at << 30, (at << 30) + 4) for at in range(0, 1024, 8)]
    assert extents[-1].end == TIB


async def test_without_an_object_map_an_answer_costs_no_more_than_its_limit(make_volume: MakeVolume) -> None:
    size = 3 * rbd_extents.ASKED * MIB
    stored = make(make_volume, size, kind="unmapped")
    stored.write(b"data", size - 9)
    async with opened(stored) as volume:
        assert await volume.extents(0, size) == [Extent(0, rbd_extents.ASKED * MIB, data=False)]
        assert data_of(await all_extents(volume)) == diff(stored.image)


@pytest.mark.parametrize(
    ("kind", "call"),
    [("striped", "discard"), ("mapped", "write_zeroes"), ("unmapped", "write_zeroes")],
)
async def test_zeroed_ranges_of_any_alignment_read_as_zeros_and_nothing_else_does(
    make_volume: MakeVolume, kind: str, call: str
) -> None:
    stored = make(make_volume, kind=kind)
    content = bytearray(random_bytes(stored.size))
    stored.write(bytes(content))
    dice = random.Random(2)
    lengths = (1, 511, 4096, 65_536 + 1, MIB, 3 * MIB + 5)
    async with opened(stored, writable=True) as volume:
        for number in range(12):
            length = lengths[number % len(lengths)]
            offset = dice.randrange(stored.size - length)
            await getattr(volume, call)(offset, length)
            content[offset : offset + length] = bytes(length)
        assert await volume.pread(0, stored.size) == content
        assert_holes_are_zeros(await all_extents(volume), content)
    assert stored.read() == content


async def test_zeroing_waits_for_the_writes_before_it(make_volume: MakeVolume) -> None:
    stored = make(make_volume, 4 * MIB)
    async with opened(stored, writable=True) as volume:
        for _ in range(20):
            await volume.pwrite(0, random_bytes(MIB))
            await volume.write_zeroes(0, 4 * MIB)
    assert not stored.read().strip(b"\0")


async def test_discarded_objects_are_given_back(make_volume: MakeVolume) -> None:
    stored = make(make_volume, 12 * MIB)
    stored.write(random_bytes(12 * MIB))
    async with opened(stored, writable=True) as volume:
        await volume.discard(MIB - 1, 8 * MIB)
    assert used(stored.image) == 5 * MIB - 1
    assert (await stat(stored)).allocated == 5 * MIB
    async with opened(stored, writable=True) as volume:
        await volume.discard(0, 12 * MIB)
        assert data_of(await all_extents(volume)) == []
    assert (await stat(stored)).allocated == used(stored.image) == 0


async def test_a_terabyte_of_nothing_is_zeroed_in_seconds(make_volume: MakeVolume) -> None:
    stored = make_volume("rbd", TIB)
    stored.write(b"data", TIB // 2 + 5)
    async with opened(stored, writable=True) as volume:
        with trio.fail_after(15):
            await volume.discard(0, TIB)
        assert await volume.pread(TIB // 2, 100) == bytes(100)


@pytest.mark.parametrize("kind", ["mapped", "striped", "map-without-fast-diff"])
async def test_allocated_is_the_space_of_the_objects_that_exist(make_volume: MakeVolume, kind: str) -> None:
    stored = make(make_volume, kind=kind)
    assert (await stat(stored)).allocated == 0
    scatter(stored)
    stored.image.snapshot("one")
    before = (await stat(stored)).allocated
    assert (await stat(stored, "@one")).allocated == before
    async with opened(stored, writable=True) as volume:
        await volume.discard(0, stored.size)
    after = (await stat(stored)).allocated
    assert after is not None
    assert before is not None
    assert after < before <= stored.size
    assert (await stat(stored, "@one")).allocated == before
    assert before >= sum(end - begin for begin, end in diff(stored.image, "@one"))


async def test_allocated_is_unknown_without_an_object_map(make_volume: MakeVolume) -> None:
    assert (await stat(make(make_volume, kind="unmapped"))).allocated is None


async def test_a_clone_is_never_said_to_be_empty(make_volume: MakeVolume) -> None:
    """tar takes a file of no blocks for one without data."""
    parent = make(make_volume, 4 * MIB)
    parent.write(b"data")
    child = clone(make_volume, parent)
    child.image.snapshot("one")
    assert (await stat(child)).allocated == (await stat(child, "@one")).allocated == 512
    child.write(b"own")
    assert (await stat(child)).allocated == MIB


async def test_allocated_of_many_images_and_snapshots_is_each_ones_own(make_volume: MakeVolume) -> None:
    stored = [make(make_volume, 8 * MIB) for _ in range(4)]
    for number, volume in enumerate(stored):
        volume.image.snapshot("empty")
        volume.write(random_bytes(number * MIB + 1))
    backend = stored[0].make_backend()
    try:
        listed = {entry.name: entry for entry in await backend.list(stored[0].place[:-1])}
    finally:
        await backend.aclose()
    found = [listed[volume.image.name + end] for volume in stored for end in ("", "@empty")]
    assert [getattr(entry, "allocated", None) for entry in found] == [
        size for number in range(4) for size in ((number + 1) * MIB, 0)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(max(1, LONG_STEPS // 2000)))
async def test_no_sequence_of_changes_makes_a_hole_of_data(
    make_volume: MakeVolume, kind: str, seed: int
) -> None:
    parent = make(make_volume, 6 * MIB, kind=kind)
    scatter(parent, seed)
    child = clone(make_volume, parent, kind)
    child.resize(7 * MIB + 3)
    dice = random.Random(seed)
    snapshots: list[str] = []
    for step in range(24):
        async with opened(child, writable=True) as volume:
            for _ in range(3):
                offset = dice.randrange(child.size)
                length = min(dice.choice((1, 4096, 65_536, MIB, 3 * MIB)), child.size - offset)
                match dice.choice(("write", "discard", "discard", "write_zeroes")):
                    case "write":
                        await volume.pwrite(offset, random_bytes(length, step))
                    case call:
                        await getattr(volume, call)(offset, length)
            assert_holes_are_zeros(await all_extents(volume), child.read())
        if step % 10 == 5:
            snapshots.append(child.image.snapshot(f"s{step}"))
        if step == 20:
            child.resize(dice.randrange(2 * MIB, 6 * MIB))
            child.resize(8 * MIB)
    for snapshot in ("", *snapshots):
        async with opened(child, snapshot=snapshot) as volume:
            assert_holes_are_zeros(await all_extents(volume), child.image.read(snapshot))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001])
def test_an_object_map_finds_the_objects_that_exist(count: int) -> None:
    dice = random.Random(count)
    states = [dice.choice((0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3)) for _ in range(count)]
    padded = states + [0] * (-count % 4)
    packed = bytes(
        a << 6 | b << 4 | c << 2 | d
        for a, b, c, d in zip(padded[::4], padded[1::4], padded[2::4], padded[3::4], strict=True)
    )
    objects = ObjectMap(packed, count)
    existing = [number for number, state in enumerate(states) if state]
    assert [number for number in range(count) if objects.exists(number)] == existing
    assert objects.existing() == len(existing)
    for number in range(count + 1):
        assert objects.next_existing(number) == min((it for it in existing if it >= number), default=count)


@pytest.mark.parametrize("period", [64 * KIB, 4 * MIB, 12 * MIB, 3 << 30])
def test_steps_of_zeroing_part_no_object(period: int) -> None:
    offset, length = 5 * MIB + 1, 40 << 30
    steps = list(rbd_zeroes.zero_steps(offset, length, period))
    assert steps[0][0] == offset
    assert [begin + size for begin, size in steps] == [*(begin for begin, _ in steps[1:]), offset + length]
    assert all(begin % period == 0 for begin, _ in steps[1:])
    assert max(size for _, size in steps) <= max(rbd_zeroes.STEP, period)


async def test_steps_under_way_end_before_the_error_of_one_is_raised() -> None:
    begun: list[int] = []
    ended: list[int] = []

    async def call(number: int, size: int) -> None:
        begun.append(number)
        await trio.lowlevel.checkpoint()
        if number == 1:
            raise BackendError("the second failed", errno.ENOSPC)
        await trio.lowlevel.checkpoint()
        ended.append(number)

    with pytest.raises(BackendError, match="the second failed"):
        await rbd_zeroes.in_parallel(((number, 1) for number in range(100)), call)
    assert len(begun) < 20, begun
    assert sorted(ended) == [number for number in begun if number != 1]
