"""Holes, discard and zeroing by the iscsi driver: on tgtd, and on a target that offers and does what tgtd does not.

What a volume holds is read back at the target: tgtd's backing file, whose blocks tell what was given back, or the
scripted disk's memory.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_target import (
    INVALID_FIELD,
    INVALID_OPCODE,
    JUNK,
    Call,
    ScriptedDisk,
    descriptor,
    serving,
)
from targets import Target, Tgtd, proxy, running_tgtd

from volfs.backends import iscsi_provisioning, iscsi_volume, scsi
from volfs.backends.base import Extent
from volfs.backends.iscsi import IscsiBackend
from volfs.backends.iscsi_provisioning import Pace
from volfs.backends.iscsi_source import IscsiSettings
from volfs.backends.iscsi_volume import IscsiVolume
from volfs.errors import BackendError, BackendTimeout

KIB, MIB, GIB = 1024, 1024**2, 1024**3
BLOCK = 512  # of the scripted disk


@pytest.fixture(scope="module")
def shared_tgtd() -> Iterator[Tgtd]:
    with running_tgtd() as tgtd:
        yield tgtd


@pytest.fixture(scope="module")
def target(shared_tgtd: Tgtd) -> Target:
    return shared_tgtd.target()


def thin_lun(target: Target, size: int, **more: Any) -> tuple[int, Path]:
    backing = target.lun(size, thin_provisioning="1", **more)
    return target.luns, backing


@pytest.fixture(scope="module")
def thin(target: Target) -> tuple[int, Path]:
    return thin_lun(target, 4 * MIB)


@asynccontextmanager
async def opened(url: str, **more: Any) -> AsyncIterator[IscsiVolume]:
    source = IscsiBackend.parse_url(url, {})
    san = IscsiBackend("san", IscsiSettings(portals=source.portals, **{"timeout": 10.0, **more}))
    async with await san.open(source, writable=True) as volume:
        yield volume


@asynccontextmanager
async def scripted(disk: ScriptedDisk, **more: Any) -> AsyncIterator[IscsiVolume]:
    async with serving(disk) as target, opened(target.url, **more) as volume:
        disk.calls.clear()
        yield volume


def noise(length: int, seed: int = 0) -> bytes:
    """Without zeros, so that no block of it looks like a hole."""
    return random.Random(seed).randbytes(length).replace(b"\0", b"\1")


def space(backing: Path) -> int:
    return backing.stat().st_blocks * 512


async def all_extents(volume: IscsiVolume, offset: int = 0, length: int = 0) -> list[Extent]:
    """Of the whole range, neighbours of a kind joined. Fails when the answers leave gaps or go beyond it."""
    end = offset + (length or volume.properties.size - offset)
    found: list[Extent] = []
    while offset < end:
        extents = await volume.extents(offset, end - offset)
        assert extents, f"nothing is told at {offset}"
        for extent in extents:
            assert extent.offset == offset, extents
            assert extent.length > 0, extents
            assert extent.end <= end, extents
            offset = extent.end
            if found and found[-1].data == extent.data:
                extent = Extent(found[-1].offset, extent.end - found.pop().offset, extent.data)
            found.append(extent)
    return found


async def assert_no_data_hidden(volume: IscsiVolume, model: bytes | bytearray) -> None:
    for extent in await all_extents(volume):
        assert extent.data or not any(model[extent.offset : extent.end]), f"{extent} hides data"


# --- on tgtd --------------------------------------------------------------------------------------------------------


async def test_what_was_never_written_is_a_hole(target: Target, thin: tuple[int, Path]) -> None:
    lun, backing = thin
    async with opened(target.url(lun)) as volume:
        await volume.discard(0, 4 * MIB)
        await volume.pwrite(2 * MIB, noise(MIB))
        assert await all_extents(volume) == [
            Extent(0, 2 * MIB, data=False),
            Extent(2 * MIB, MIB, data=True),
            Extent(3 * MIB, MIB, data=False),
        ]
        assert await all_extents(volume, 3 * MIB - 1, 2) == [
            Extent(3 * MIB - 1, 1, data=True),
            Extent(3 * MIB, 1, data=False),
        ]
    assert space(backing) == MIB


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 2 * MIB),
        (1, 2 * MIB - 2),
        (MIB + 100, 300 * KIB),
        (700, 5000),
        (4095, 2),
        (2 * MIB - 1, 1),
    ],
)
async def test_what_is_discarded_reads_as_zeros_and_its_space_is_given_back(
    target: Target, sector_size: int, offset: int, length: int
) -> None:
    lun, backing = thin_lun(target, 2 * MIB, sector_size=str(sector_size))
    model = bytearray(noise(2 * MIB))
    async with opened(target.url(lun)) as volume:
        await volume.pwrite(0, bytes(model))
        await volume.discard(offset, length)
        model[offset : offset + length] = bytes(length)
        assert await volume.pread(0, 2 * MIB) == model
        await assert_no_data_hidden(volume, model)
    assert backing.read_bytes() == model
    pages = max(0, (offset + length) // 4096 - -(-offset // 4096))  # of the file system below
    assert space(backing) == 2 * MIB - 4096 * pages


async def test_zeroes_are_quick_where_the_target_may_unmap(target: Target, thin: tuple[int, Path]) -> None:
    lun, backing = thin
    async with opened(target.url(lun)) as volume:
        await volume.pwrite(0, noise(4 * MIB))
        await volume.write_zeroes(100, 4 * MIB - 200)
        assert await volume.pread(100, 4 * MIB - 200) == bytes(4 * MIB - 200)
    assert space(backing) == 2 * 4096


async def test_a_thick_disk_is_all_data_and_its_zeros_are_written(target: Target) -> None:
    backing = target.lun(4 * MIB)
    lun = target.luns
    async with opened(target.url(lun)) as volume:
        assert await all_extents(volume) == [Extent(0, 4 * MIB, data=True)]
        await volume.pwrite(0, noise(4 * MIB))
        await volume.discard(10, 2 * MIB)
        await volume.write_zeroes(3 * MIB - 10, 20)
    model = bytearray(noise(4 * MIB))
    model[10 : 2 * MIB + 10] = bytes(2 * MIB)
    model[3 * MIB - 10 : 3 * MIB + 10] = bytes(20)
    assert backing.read_bytes() == model


async def test_a_terabyte_is_discarded_whole_and_at_once(target: Target) -> None:
    """tgtd zeroes a part of what it is asked for when that is more than 4 GiB in one command."""
    lun, backing = thin_lun(target, 1024 * GIB)
    places = [*range(0, 24 * GIB, GIB // 2 + 4096), 1024 * GIB - 4096]
    async with opened(target.url(lun)) as volume:
        for place in places:
            await volume.pwrite(place, noise(4096))
        begun = trio.current_time()
        await volume.discard(0, 1024 * GIB)
        took = trio.current_time() - begun
        assert await all_extents(volume) == [Extent(0, 1024 * GIB, data=False)]
        for place in places:
            assert await volume.pread(place, 4096) == bytes(4096), place
    assert space(backing) == 0
    assert took < 10, f"{took:.1f} s"


STEPS = st.tuples(
    st.sampled_from(["write", "discard", "zero", "flush"]),
    st.integers(0, 64 * KIB - 1),
    st.integers(1, 20000) | st.just(64 * KIB),
)


@given(steps=st.lists(STEPS, min_size=1, max_size=12))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_leaves_what_a_bytearray_holds(
    target: Target, thin: tuple[int, Path], steps: list[tuple[str, int, int]]
) -> None:
    lun, backing = thin
    size = 64 * KIB

    async def run() -> None:
        model = bytearray(size)
        async with opened(target.url(lun)) as volume:
            await volume.discard(0, size)
            for number, (step, offset, length) in enumerate(steps):
                length = min(length, size - offset)
                data = noise(length, number) if step == "write" else bytes(length)
                match step:
                    case "write":
                        await volume.pwrite(offset, data)
                    case "discard":
                        await volume.discard(offset, length)
                    case "zero":
                        await volume.write_zeroes(offset, length)
                    case "flush":
                        await volume.flush()
                        continue
                model[offset : offset + length] = data
                assert await volume.pread(0, size) == model, f"after step {number}"
            extents = await all_extents(volume, 0, size)
            for extent in extents:
                assert extent.data or not any(model[extent.offset : extent.end]), extents
        with backing.open("rb") as file:
            assert file.read(size) == model

    trio.run(run)


async def test_a_target_that_restarts_and_has_forgotten_zeros_gets_them_again() -> None:
    rng = random.Random(3)
    with running_tgtd() as tgtd:
        target = tgtd.target()
        _, backing = thin_lun(target, 4 * MIB, sector_size="4096")
        async with opened(target.url()) as volume:
            await volume.pwrite(0, stable := noise(4 * MIB))
            await volume.flush()
            shutil.copy(backing, tgtd.directory / "stable")
            model = bytearray(stable)
            for number in range(30):
                offset, length = rng.randrange(3 * MIB), rng.randrange(1, 200_000)
                call = rng.choice([volume.discard, volume.write_zeroes, None])
                data = bytes(length) if call else noise(length, number)
                await (call(offset, length) if call else volume.pwrite(offset, data))
                model[offset : offset + length] = data
            tgtd.kill()
            shutil.copy(tgtd.directory / "stable", backing)  # what a cache does when the power fails
            tgtd.start()
            await volume.flush()
            assert backing.read_bytes() == model
            assert await volume.pread(0, 4 * MIB) == model


async def test_no_answer_to_a_discard_is_a_timeout_and_the_volume_recovers(
    target: Target, thin: tuple[int, Path]
) -> None:
    lun, _ = thin
    async with (
        proxy(target.tgtd.port) as between,
        opened(target.url(lun, between.portal), timeout=0.5) as volume,
    ):
        await volume.pwrite(0, noise(MIB))
        between.silence()
        with pytest.raises(BackendTimeout, match=f"WRITE SAME with UNMAP of {MIB} bytes at 0"):
            await volume.discard(0, MIB)
        between.speak()
        await volume.discard(0, MIB)
        assert await all_extents(volume, 0, MIB) == [Extent(0, MIB, data=False)]
        assert await volume.pread(0, MIB) == bytes(MIB)


async def test_discards_and_writes_at_once_keep_their_neighbours_bytes(
    target: Target, thin: tuple[int, Path]
) -> None:
    """Ranges whose ends share blocks; each is written and zeroed again and again by a task of its own."""
    lun, _ = thin
    rng = random.Random(5)
    length = 256 * KIB
    cuts = sorted({0, length, *rng.sample(range(length), 100)})
    model = bytearray(noise(length))

    async def work(volume: IscsiVolume, start: int, end: int, seed: int) -> None:
        for turn in range(4):
            zeros = (seed + turn) % 2
            data = bytes(end - start) if zeros else noise(end - start, seed + turn)
            model[start:end] = data
            if zeros:
                await volume.discard(start, end - start)
            else:
                await volume.pwrite(start, data)
            assert await volume.pread(start, end - start) == data

    async with opened(target.url(lun)) as volume:
        await volume.pwrite(0, bytes(model))
        async with trio.open_nursery() as nursery:
            for seed, (start, end) in enumerate(itertools.pairwise(cuts)):
                nursery.start_soon(work, volume, start, end, seed)
        assert await volume.pread(0, length) == model


# --- holes on a scripted target -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offers",
    [{"lbprz": False}, {"lbpme": False}, {"lbpme": False, "lbprz": False}],
    ids=["no zeros promised", "no provisioning", "neither"],
)
async def test_without_a_promise_of_zeros_all_is_data(offers: dict[str, bool]) -> None:
    disk = ScriptedDisk(**offers)
    async with scripted(disk) as volume:
        assert await all_extents(volume) == [Extent(0, disk.blocks * BLOCK, data=True)]
        assert not disk.called("GET LBA STATUS")


@pytest.mark.parametrize("sense", [INVALID_OPCODE, INVALID_FIELD])
async def test_a_target_without_get_lba_status_is_asked_once_and_is_all_data(sense: tuple[int, int]) -> None:
    disk = ScriptedDisk(refuses={"GET LBA STATUS": sense})
    async with scripted(disk) as volume:
        for _ in range(3):
            assert await volume.extents(700, 9000) == [Extent(700, 9000, data=True)]
        assert len(disk.called("GET LBA STATUS")) == 1


async def test_an_error_is_not_taken_for_an_answer() -> None:
    disk = ScriptedDisk(refuses={"GET LBA STATUS": (0x3, 0x1100)})
    async with scripted(disk) as volume:
        with pytest.raises(BackendError, match="GET LBA STATUS"):
            await volume.extents(0, BLOCK)
        disk.refuses.clear()
        assert await volume.extents(0, BLOCK) == [Extent(0, BLOCK, data=False)]


@pytest.mark.parametrize(
    ("descriptors", "expected"),
    [
        ([(0, 4096, 1)], [(0, 4096, False)]),
        ([(0, 8, 1), (8, 8, 0), (16, 8, 1)], [(0, 8, False), (8, 8, True), (16, 8, False)]),
        ([(0, 8, 1), (8, 8, 2), (16, 8, 1)], [(0, 8, False), (8, 8, True), (16, 8, False)]),  # anchored
        (
            [(0, 8, 3), (8, 8, 0x11)],
            [(0, 8, True), (8, 8, False)],
        ),  # unknown; bits of SBC-4 beside the status
        ([(0, 8, 1), (9, 8, 1)], [(0, 8, False)]),  # a gap
        ([(0, 8, 1), (8, 0, 1), (8, 8, 1)], [(0, 8, False)]),  # nothing
        ([(0, 8, 1), (0, 8, 1)], [(0, 8, False)]),  # backwards
        ([(0, 1 << 31, 1)], [(0, 4096, False)]),  # beyond the end
        ([(1, 8, 1)], [(0, 4096, True)]),  # not from where it was asked
        ([], [(0, 4096, True)]),
    ],
)
async def test_status_descriptors(
    descriptors: list[tuple[int, int, int]], expected: list[tuple[int, int, bool]]
) -> None:
    disk = ScriptedDisk(status=lambda _: b"".join(descriptor(*one) for one in descriptors))
    async with scripted(disk) as volume:
        assert await volume.extents(0, 4096 * BLOCK) == [
            Extent(first * BLOCK, blocks * BLOCK, data) for first, blocks, data in expected
        ]


async def test_a_status_that_begins_before_what_was_asked() -> None:
    """As targets that answer in units of their own do."""
    disk = ScriptedDisk(status=lambda block: descriptor(block // 100 * 100, 100, block // 100 % 2))
    async with scripted(disk) as volume:
        assert await all_extents(volume, 150 * BLOCK, 200 * BLOCK) == [
            Extent(150 * BLOCK, 50 * BLOCK, data=False),
            Extent(200 * BLOCK, 100 * BLOCK, data=True),
            Extent(300 * BLOCK, 50 * BLOCK, data=False),
        ]


def test_a_status_that_is_cut_short() -> None:
    whole = (4 + 32).to_bytes(4, "big") + bytes(4) + descriptor(0, 8, 1) + descriptor(8, 8, 0)
    assert list(scsi.parse_lba_status(whole)) == [(0, 8, True), (8, 8, False)]
    assert list(scsi.parse_lba_status(whole[:-1])) == [(0, 8, True)]
    assert list(scsi.parse_lba_status(whole[:9])) == []
    assert list(scsi.parse_lba_status(b"")) == []
    shorter = (4 + 16).to_bytes(4, "big") + whole[4:]  # what follows is none of it
    assert list(scsi.parse_lba_status(shorter)) == [(0, 8, True)]


async def test_many_extents_come_in_several_answers() -> None:
    disk = ScriptedDisk()
    disk.mapped[::2] = b"\1" * (disk.blocks // 2)
    async with scripted(disk) as volume:
        found = await all_extents(volume)
        assert [extent.data for extent in found] == [True, False] * (disk.blocks // 2)
        assert len(disk.called("GET LBA STATUS")) == -(-disk.blocks // 255)


# --- zeros on a scripted target -------------------------------------------------------------------------------------


def blocks_of(calls: list[Call]) -> int:
    return sum(call.blocks for call in calls)


OFFERS: dict[str, dict[str, Any]] = {
    "all": {},
    "WRITE SAME(10) may unmap": {"lbpws": False},
    "UNMAP": {"lbpws": False, "lbpws10": False},
    "UNMAP ignored": {"lbpws": False, "lbpws10": False, "ignores_unmap": True},
    "UNMAP of little": {"lbpws": False, "lbpws10": False, "max_unmap": 100},
    "UNMAP, no status": {"lbpws": False, "lbpws10": False, "refuses": {"GET LBA STATUS": INVALID_OPCODE}},
    "UNMAP, no WRITE SAME": {"lbpws": False, "lbpws10": False, "refuses": {"WRITE SAME": INVALID_OPCODE}},
    "UNMAP refused": {"lbpws": False, "lbpws10": False, "refuses": {"UNMAP": INVALID_OPCODE}},
    "no unmapping": {"lbpu": False, "lbpws": False, "lbpws10": False},
    "zeros not promised": {"lbprz": False},
    "no provisioning": {"lbpme": False},
    "WRITE SAME of little": {"max_write_same": 100},
    "WRITE SAME of little, untold": {"unreported_max": 600},
    "units": {"granularity": 64, "alignment": 3},
    "units, UNMAP": {"granularity": 64, "alignment": 3, "lbpws": False, "lbpws10": False},
    "no WRITE SAME": {"refuses": {"WRITE SAME": INVALID_OPCODE}},
    "WRITE SAME refused by its fields": {"refuses": {"WRITE SAME": INVALID_FIELD}},
}


@pytest.mark.parametrize("offers", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("name", ["discard", pytest.param("write_zeroes", marks=pytest.mark.slow)])
async def test_zeros_are_zeros_whatever_is_offered(
    offers: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iscsi_provisioning, "FIRST_STEP_BYTES", 256 * KIB)
    disk = ScriptedDisk(**{**offers, "refuses": dict(offers.get("refuses", {}))})
    size = disk.blocks * BLOCK
    model = bytearray(noise(size))
    disk.fill(bytes(model))
    async with scripted(disk) as volume:
        for offset, length in ((1300, 20), (1000, 70_001), (80_000, size - 90_000), (80_001, size - 90_000)):
            await getattr(volume, name)(offset, length)
            model[offset : offset + length] = bytes(length)
            assert disk.content == model, f"{name} of {length} bytes at {offset}"
            await assert_no_data_hidden(volume, model)


@pytest.mark.parametrize(
    ("offers", "unmapped"),
    [
        ("all", True),
        ("WRITE SAME(10) may unmap", True),
        ("UNMAP", True),
        ("UNMAP of little", True),
        ("UNMAP, no status", True),
        ("UNMAP, no WRITE SAME", True),
        ("WRITE SAME of little", True),
        ("WRITE SAME of little, untold", True),
        ("UNMAP ignored", False),
        ("UNMAP refused", False),
        ("no unmapping", False),
        ("zeros not promised", False),
        ("no provisioning", False),
    ],
)
async def test_space_is_given_back_where_that_is_offered(offers: str, unmapped: bool) -> None:
    disk = ScriptedDisk(**{**OFFERS[offers], "refuses": dict(OFFERS[offers].get("refuses", {}))})
    disk.fill(noise(disk.blocks * BLOCK))
    async with scripted(disk) as volume:
        await volume.discard(100, disk.blocks * BLOCK - 200)
        assert sum(disk.mapped) == (2 if unmapped else disk.blocks)


async def test_unmapped_blocks_that_may_read_as_anything_are_never_asked_for() -> None:
    disk = ScriptedDisk(lbprz=False)
    disk.fill(noise(disk.blocks * BLOCK))
    async with scripted(disk) as volume:
        await volume.discard(0, disk.blocks * BLOCK)
        assert not disk.called("UNMAP")
        assert not any(call.unmap for call in disk.called("WRITE SAME"))
        assert JUNK not in disk.content


async def test_a_command_that_is_refused_is_not_tried_again() -> None:
    disk = ScriptedDisk(refuses=dict.fromkeys(("WRITE SAME", "UNMAP"), INVALID_OPCODE))
    async with scripted(disk) as volume:
        for _ in range(3):
            await volume.discard(0, 64 * KIB)
            await volume.write_zeroes(0, 64 * KIB)
        assert len(disk.called("WRITE SAME")) == 2  # one with UNMAP, one without
        assert len(disk.called("UNMAP")) == 1


async def test_holes_are_not_filled_before_they_are_unmapped() -> None:
    """A thin disk that is full could not take the zeros."""
    disk = ScriptedDisk(lbpws=False, lbpws10=False)
    disk.mapped[1000:1100] = b"\1" * 100
    async with scripted(disk) as volume:
        await volume.discard(0, disk.blocks * BLOCK)
        assert [(call.block, call.end) for call in disk.called("WRITE SAME")] == [(1000, 1100)]
        assert not disk.called("WRITE")
        assert not any(disk.mapped)


async def test_the_longest_write_same_is_kept_to() -> None:
    disk = ScriptedDisk(max_write_same=100)
    async with scripted(disk) as volume:
        await volume.discard(0, 1000 * BLOCK)
        calls = disk.called("WRITE SAME")
        assert max(call.blocks for call in calls) == 100
        assert blocks_of(calls) == 1000


async def test_a_limit_that_no_page_tells_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iscsi_provisioning, "FIRST_STEP_BYTES", 500 * BLOCK)
    disk = ScriptedDisk(unreported_max=600)
    disk.fill(noise(disk.blocks * BLOCK))
    async with scripted(disk) as volume:
        await volume.discard(0, disk.blocks * BLOCK)
        assert not disk.called("WRITE")
        refused = [call for call in disk.called("WRITE SAME") if call.blocks > 600]
        assert len(refused) == 1
        assert not any(disk.mapped)


async def test_steps_end_where_the_units_of_provisioning_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iscsi_provisioning, "FIRST_STEP_BYTES", MIB)
    monkeypatch.setattr(iscsi_provisioning, "ALIGNED_BYTES", 64 * KIB)
    disk = ScriptedDisk(blocks=32768, granularity=60, alignment=7)
    disk.fill(noise(disk.blocks * BLOCK))
    async with scripted(disk) as volume:
        await volume.discard(0, disk.blocks * BLOCK)
        *inner, _ = disk.called("WRITE SAME")
        assert inner
        assert all((call.end - 7) % 60 == 0 for call in inner), inner
        assert sum(disk.mapped) == 7 + (disk.blocks - 7) % 60


async def test_a_promise_that_a_new_connection_does_not_give_is_not_relied_on() -> None:
    disk = ScriptedDisk()
    disk.fill(noise(BLOCK))
    async with scripted(disk) as volume:
        assert (await volume.extents(0, 2 * BLOCK))[1] == Extent(BLOCK, BLOCK, data=False)
        disk.lbprz = False
        disk.before = lambda call: call.name != "GET LBA STATUS" or len(disk.called(call.name)) != 2
        await volume.extents(0, 2 * BLOCK)  # on its second sending it is answered
        assert await volume.extents(0, 2 * BLOCK) == [Extent(0, 2 * BLOCK, data=True)]
        await volume.discard(0, 64 * BLOCK)
        assert not any(call.unmap for call in disk.called("WRITE SAME"))


def test_the_pace_follows_what_commands_take() -> None:
    pace = Pace(512, 0, seconds=0.4)
    assert pace.blocks == 8192  # 4 MiB
    pace.took(8192, 0.05)
    assert pace.blocks == 16384
    pace.took(100, 0.01)  # tells nothing of more
    pace.took(16384, 0.3)
    assert pace.blocks == 16384
    pace.took(16384, 0.5)
    assert pace.blocks == 8192
    for _ in range(20):
        pace.took(pace.blocks, 9)
    assert pace.blocks == 512  # 256 KiB
    for _ in range(20):
        pace.took(pace.blocks, 0)
    assert pace.blocks == GIB // 512
    pace.failed()
    assert pace.blocks == 8192
    assert Pace(4096, 10, seconds=1).blocks == 10


def test_the_pace_is_kept_below_what_was_refused() -> None:
    pace = Pace(512, 0, seconds=0.4)
    assert pace.refused(8192)
    assert pace.blocks == 512
    assert not pace.refused(512)  # so it is not for the length
    pace = Pace(512, 0, seconds=0.4)
    pace.took(8192, 0)
    assert pace.refused(16384)
    pace.took(8192, 0)
    assert pace.blocks == 8192


async def test_a_write_inside_a_block_does_not_bring_back_what_is_discarded_around_it() -> None:
    """The discard begins when the write has read the block's old bytes, and has yet to write them back."""
    disk = ScriptedDisk()
    disk.fill(noise(4 * BLOCK))
    has_read = trio.Event()

    def note(call: Call) -> bool:
        if call.name == "READ":
            has_read.set()
        return True

    async with scripted(disk) as volume:
        disk.after = note
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.pwrite, BLOCK + 100, b"n" * 20)
            await has_read.wait()
            await volume.discard(0, 4 * BLOCK)
        around = disk.content[: BLOCK + 100] + disk.content[BLOCK + 120 : 4 * BLOCK]
        assert not any(around)
        assert disk.content[BLOCK + 100 : BLOCK + 120] in (b"n" * 20, bytes(20))


# --- durability -----------------------------------------------------------------------------------------------------


async def play(volume: IscsiVolume, model: bytearray) -> None:
    """Unflushed writes below, between and above zeros, with ends inside of blocks."""
    size = len(model)
    for number, (what, offset, length) in enumerate(
        [
            ("write", 0, size),
            ("discard", 1000, 300_000),
            ("write", 50_000, 3000),
            ("write_zeroes", 51_000, 1500),
            ("discard", 0, 512),
            ("write", 100, 20),
            ("discard", size - 100_000, 100_000),
        ]
    ):
        data = noise(length, number) if what == "write" else bytes(length)
        if what == "write":
            await volume.pwrite(offset, data)
        else:
            await getattr(volume, what)(offset, length)
        model[offset : offset + length] = data


@pytest.mark.parametrize(
    "offers",
    [
        "all",
        *(
            pytest.param(offers, marks=pytest.mark.slow)
            for offers in ("UNMAP", "UNMAP, no WRITE SAME", "no unmapping", "no WRITE SAME")
        ),
    ],
)
@pytest.mark.parametrize("carried_out", [False, True])
async def test_zeros_survive_a_target_that_forgets_at_any_command(
    offers: str, carried_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is played again for each command, at which the connection breaks and the cache is lost."""
    monkeypatch.setattr(iscsi_provisioning, "FIRST_STEP_BYTES", 128 * KIB)
    monkeypatch.setattr(iscsi_provisioning, "LARGEST_STEP_BYTES", 128 * KIB)
    monkeypatch.setattr(iscsi_provisioning, "ALIGNED_BYTES", 4096)
    at, broken = 0, True
    while broken:
        disk = ScriptedDisk(
            blocks=1024, **{**OFFERS[offers], "refuses": dict(OFFERS[offers].get("refuses", {}))}
        )
        disk.fill(noise(1024 * BLOCK, 99))
        model = bytearray(disk.content)
        left, broken = at, False

        def break_off(_: Call, disk: ScriptedDisk = disk) -> bool:
            nonlocal left, broken
            left -= 1
            if left == -1:
                broken = True
                disk.forget()
            return left != -1

        async with scripted(disk) as volume:
            setattr(disk, "after" if carried_out else "before", break_off)
            await play(volume, model)
            await volume.flush()
            assert disk.content == model, f"broken off at command {at}, {disk.calls[at]}"
            disk.forget()  # what is not stable
            assert disk.content == model, f"not stable, broken off at command {at}"
            await assert_no_data_hidden(volume, model)
        at += 1
    assert at > 10  # commands, each of which was broken off at


async def test_zeros_are_kept_for_that_as_a_range_and_no_more_than_is_repeated_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(iscsi_provisioning, "FIRST_STEP_BYTES", 64 * KIB)
    monkeypatch.setattr(iscsi_provisioning, "LARGEST_STEP_BYTES", 64 * KIB)
    monkeypatch.setattr(iscsi_volume, "UNFLUSHED_BYTES", MIB)
    disk = ScriptedDisk()
    async with scripted(disk) as volume:
        await volume.discard(0, 512 * KIB)
        assert len(volume._unflushed) == 8
        assert all(change.data is None for change in volume._unflushed)
        assert not disk.called("SYNCHRONIZE CACHE")
        await volume.discard(0, 512 * KIB)
        assert len(disk.called("SYNCHRONIZE CACHE")) == 1
        assert not volume._unflushed
        assert volume._unflushed_bytes == 0


async def test_nothing_is_kept_for_a_disk_that_forgets_nothing() -> None:
    disk = ScriptedDisk(volatile_cache=False)
    async with scripted(disk) as volume:
        await volume.discard(0, MIB)
        assert not volume._unflushed


async def test_a_cancelled_discard_harms_no_neighbour() -> None:
    """It may still land. A neighbour in its last block waits for that."""
    disk = ScriptedDisk(block_size=4096, blocks=64)
    for turn in range(12):
        disk.fill(noise(64 * 4096))
        async with scripted(disk) as volume, trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def cancelled(volume: IscsiVolume = volume, scope: trio.CancelScope = scope) -> None:
                with scope:
                    await volume.discard(0, 10 * 4096 + 100)

            nursery.start_soon(cancelled)
            for _ in range(turn):
                await trio.lowlevel.checkpoint()
            scope.cancel()
            await volume.pwrite(10 * 4096 + 200, b"n" * 100)
            found = await volume.pread(0, 64 * 4096)
            assert found[10 * 4096 + 200 : 10 * 4096 + 300] == b"n" * 100
            assert found[10 * 4096 + 300 :] == noise(64 * 4096)[10 * 4096 + 300 :]
            assert found[: 10 * 4096] in (bytes(10 * 4096), noise(10 * 4096))
