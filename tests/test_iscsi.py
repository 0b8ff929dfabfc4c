"""The iscsi driver on a real target: logins, faults of the network and of the target, blocks and limits.

What every driver must do is tested elsewhere, for all of them.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import random
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mounts import Mount
from targets import IQN, Target, Tgtd, free_port, proxy, running_tgtd

from volfs.backends import iscsi_volume
from volfs.backends.base import Directory, VolumeInfo
from volfs.backends.iscsi import IscsiBackend
from volfs.backends.iscsi_source import IscsiSettings
from volfs.backends.iscsi_volume import IscsiVolume
from volfs.errors import BackendError, BackendTimeout, VolumeNotFound

MIB = 1024**2
TURNS = 4
SHORT = 0.5  # seconds, where a deadline is to be seen passing


@pytest.fixture(scope="module")
def shared_tgtd() -> Iterator[Tgtd]:
    with running_tgtd() as tgtd:
        yield tgtd


@pytest.fixture(scope="module")
def target(shared_tgtd: Tgtd) -> Target:
    """LUN 1: 16 MiB. LUN 2: the same in blocks of 4096 bytes. LUN 3: write-protected."""
    target = shared_tgtd.target()
    shared_tgtd.run(
        *("--mode", "target", "--op", "update", "--tid", target.tid),
        *("--name", "HeaderDigest", "--value", "CRC32C,None"),
    )
    target.lun(16 * MIB)
    target.lun(16 * MIB, sector_size=4096)
    target.lun(MIB, readonly="1")
    return target


@pytest.fixture
def own_tgtd() -> Iterator[Tgtd]:
    """One to be killed."""
    with running_tgtd() as tgtd:
        yield tgtd


def backend(*portals: str, **more: Any) -> IscsiBackend:
    return IscsiBackend("san", IscsiSettings(portals=portals, **{"timeout": 10.0, **more}))


@asynccontextmanager
async def opened(
    target: Target, lun: int = 1, *, portal: str = "", writable: bool = True, **more: Any
) -> AsyncIterator[IscsiVolume]:
    source = IscsiBackend.parse_url(target.url(lun, portal), {})
    volume = await backend(*source.portals, **more).open(source, writable=writable)
    try:
        yield volume
    finally:
        await volume.aclose()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - of another process, which sets no Event
            await trio.sleep(0.01)


# --- listing --------------------------------------------------------------------------------------------------------


async def test_lists_targets_and_their_disks_and_leaves_no_session(target: Target) -> None:
    san = backend(target.tgtd.portal)
    assert Directory(IQN) in await san.list(())
    infos = [info for info in await san.list((IQN,)) if isinstance(info, VolumeInfo)]
    infos.sort(key=lambda info: info.name)
    assert [(info.name, info.size, info.read_only) for info in infos] == [
        ("1", 16 * MIB, False),
        ("2", 16 * MIB, False),
        ("3", MIB, True),
    ]  # and not tgtd's controller, LUN 0
    assert infos[1].details["sector_size"] == "4096"
    assert infos[0].details.keys() == set(IscsiBackend.describes)
    assert await san.lookup((IQN,)) == Directory(IQN)
    assert await san.lookup((IQN, "2")) == await san.stat(infos[1].source) == infos[1]
    await until(lambda: target.sessions() == 0)


async def test_a_listing_is_one_login_for_all_its_files(target: Target) -> None:
    async with proxy(target.tgtd.port) as between:
        assert len(await backend(between.portal).list((IQN,))) == 3
        assert between.connections == 1


async def test_looking_files_up_asks_for_the_targets_once(target: Target) -> None:
    async with proxy(target.tgtd.port) as between:
        san = backend(between.portal)
        for _ in range(5):
            assert await san.lookup((IQN,)) == Directory(IQN)
        assert between.connections == 1


async def test_ls_of_a_target_logs_in_once(target: Target, mount: Callable[..., Mount]) -> None:
    """The kernel gets the attributes with the names, so `ls -l` does not ask for each file."""
    async with proxy(target.tgtd.port) as between:
        mounted = await trio.to_thread.run_sync(mount, f"iscsi://{between.portal}")
        directory = mounted.path / "iscsi" / IQN
        await trio.run_process(["stat", directory], capture_stdout=True)
        before = between.connections
        done = await trio.run_process(["ls", "-l", directory], capture_stdout=True)
        assert len(done.stdout.splitlines()) == 4, done.stdout
        assert between.connections - before == 1


@pytest.mark.parametrize(
    "path", [("iqn.2026-01.org.volfs:none",), ("lost+found",), (IQN, "9"), (IQN, "x"), (IQN, "01")]
)
async def test_what_is_not_there_is_not_found(target: Target, path: tuple[str, ...]) -> None:
    with pytest.raises(VolumeNotFound):
        await backend(target.tgtd.portal).lookup(path)
    assert target.sessions() == 0


async def test_listing_an_unknown_target_is_not_found(target: Target) -> None:
    with pytest.raises(VolumeNotFound, match="no such target"):
        await backend(target.tgtd.portal).list(("iqn.2026-01.org.volfs:none",))


async def test_shows_only_the_chosen_targets(target: Target) -> None:
    other = "iqn.2026-01.org.volfs:other"
    san = backend(target.tgtd.portal, targets=(other,))
    assert await san.list(()) == [Directory(other)]
    with pytest.raises(VolumeNotFound):
        await san.list((IQN,))


# --- login ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(shared_tgtd: Tgtd) -> Target:
    target = shared_tgtd.target(IQN + "-chap")
    target.lun(MIB)
    target.account("alice", "alices-secret")
    return target


@pytest.fixture(scope="module")
def mutual(shared_tgtd: Tgtd) -> Target:
    target = shared_tgtd.target(IQN + "-mutual")
    target.lun(MIB)
    target.account("bob", "bobs-secret-12")
    target.account("array", "arrays-secret", outgoing=True)
    return target


async def test_chap(guarded: Target, tmp_path: Path) -> None:
    account = {"chap_username": "alice", "chap_password": "alices-secret"}
    async with opened(guarded, **account) as volume:
        assert await volume.pread(0, 512) == bytes(512)
    # A file in place of the secret.
    file = tmp_path / "secret"
    file.write_text("alices-secret\n")
    async with opened(guarded, chap_username="alice", chap_password_file=str(file)):
        pass
    # The source's account, in a backend that has none.
    source = IscsiBackend.parse_url(guarded.url().replace("//", "//alice%alices-secret@"), {})
    volume = await backend(guarded.tgtd.portal).open(source, writable=True)
    await volume.aclose()


@pytest.mark.parametrize(
    "account",
    [
        {},
        {"chap_username": "alice", "chap_password": "wrong"},
        {"chap_username": "eve", "chap_password": "wrong"},
    ],
)
async def test_wrong_chap_is_eacces_and_tells_no_secret(guarded: Target, account: dict[str, str]) -> None:
    with pytest.raises(BackendError) as caught:
        async with opened(guarded, **account):
            pass
    assert caught.value.errno == errno.EACCES
    assert guarded.iqn in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "wrong" not in str(caught.value)
    assert guarded.sessions() == 0


async def test_mutual_chap(mutual: Target) -> None:
    account = {"chap_username": "bob", "chap_password": "bobs-secret-12", "mutual_chap_username": "array"}
    async with opened(mutual, **account, mutual_chap_password="arrays-secret"):
        pass
    san = backend(mutual.tgtd.portal, **account, mutual_chap_password="arrays-secret")
    assert Directory(mutual.iqn) in await san.list(())
    assert [info.name for info in await san.list((mutual.iqn,))] == ["1"]
    with pytest.raises(BackendError, match="did not prove itself") as caught:
        async with opened(mutual, **account, mutual_chap_password="arrays-other"):
            pass
    assert caught.value.errno == errno.EACCES
    assert "arrays-" not in str(caught.value)


async def test_a_target_that_proves_nothing_is_refused(guarded: Target) -> None:
    with pytest.raises(BackendError) as caught:
        async with opened(
            guarded,
            chap_username="alice",
            chap_password="alices-secret",
            mutual_chap_username="array",
            mutual_chap_password="arrays-secret",
        ):
            pass
    assert caught.value.errno == errno.EACCES


async def test_an_unreadable_secret_file_is_named(guarded: Target, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=str(tmp_path / "gone")) as caught:
        async with opened(guarded, chap_username="alice", chap_password_file=str(tmp_path / "gone")):
            pass
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize(
    ("digest", "answer"), [("none", b"None"), ("prefer", b"CRC32C"), ("crc32c", b"CRC32C")]
)
async def test_header_digest(target: Target, digest: str, answer: bytes) -> None:
    data = random.Random(digest).randbytes(MIB + 512)
    async with proxy(target.tgtd.port) as between:
        async with opened(target, portal=between.portal, header_digest=digest) as volume:
            await volume.pwrite(MIB, data)
            assert await volume.pread(MIB, len(data)) == data
        assert b"HeaderDigest=" + answer + b"\0" in between.answers


async def test_a_refused_connection_names_the_portal() -> None:
    portal = f"127.0.0.1:{free_port()}"
    with pytest.raises(BackendError, match=portal) as caught:
        await backend(portal).list(())
    assert caught.value.errno == errno.ECONNREFUSED


async def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(BackendError, match=r"nowhere\.invalid"):
        await backend("nowhere.invalid").list(())


async def test_a_silent_portal_is_a_timeout_and_the_next_one_is_tried(target: Target) -> None:
    async with proxy(target.tgtd.port) as between:
        between.silence()
        begun = trio.current_time()
        with pytest.raises(BackendTimeout, match=between.portal):
            async with opened(target, portal=between.portal, timeout=SHORT):
                pass
        assert SHORT <= trio.current_time() - begun < SHORT + 2
        dead = f"127.0.0.1:{free_port()}"
        san = backend(dead, between.portal, target.tgtd.portal, timeout=3 * SHORT)
        assert len(await san.list((IQN,))) == 3


async def test_cancelled_while_connecting(target: Target) -> None:
    async with proxy(target.tgtd.port) as between:
        between.silence()
        with trio.move_on_after(SHORT) as scope:
            async with opened(target, portal=between.portal):
                pass
        assert scope.cancelled_caught


async def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import volfs.native

    monkeypatch.setitem(sys.modules, "volfs.native.libiscsi", None)
    monkeypatch.delattr(volfs.native, "libiscsi")
    with pytest.raises(BackendError, match="the iscsi driver needs libiscsi") as caught:
        await backend("127.0.0.1").list(())
    assert caught.value.errno == errno.ENOTSUP


# --- blocks ---------------------------------------------------------------------------------------------------------


async def test_a_write_protected_lun(target: Target) -> None:
    with pytest.raises(BackendError, match="write-protected") as caught:
        async with opened(target, 3):
            pass
    assert caught.value.errno == errno.EROFS
    async with opened(target, 3, writable=False) as volume:
        assert await volume.pread(MIB - 1, 1) == b"\0"
        assert not volume.properties.writable


async def test_write_protection_that_comes_later(own_tgtd: Tgtd) -> None:
    target = own_tgtd.target()
    target.lun(MIB)
    async with opened(target) as volume:
        target.update(1, readonly="1")
        with pytest.raises(BackendError) as caught:
            await volume.pwrite(0, bytes(512))
        assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("lun", [1, 2])
@pytest.mark.parametrize("command_bytes", [4096, 256 * 1024])
async def test_requests_are_split_at_the_limit(
    target: Target, monkeypatch: pytest.MonkeyPatch, lun: int, command_bytes: int
) -> None:
    monkeypatch.setattr(iscsi_volume, "COMMAND_BYTES", command_bytes)
    data = random.Random(lun).randbytes(2 * MIB + 700)
    async with opened(target, lun, queue_depth=5) as volume:
        for offset in (0, 1, 4096, 16 * MIB - len(data)):
            await volume.pwrite(offset, data)
            assert await volume.pread(offset, len(data)) == data


@pytest.mark.parametrize("lun", [1, 2])
@pytest.mark.parametrize("seed", range(3))
async def test_neighbours_in_one_block_do_not_lose_each_others_bytes(
    target: Target, lun: int, seed: int
) -> None:
    """Many writers, each with ranges of its own, whose ends share blocks."""
    rng = random.Random(seed)
    length = 256 * 1024
    cuts = sorted(
        {0, length, *rng.sample(range(length), 150), *(4096 * rng.randrange(64) for _ in range(20))}
    )
    ranges = list(itertools.pairwise(cuts))
    model = bytearray(rng.randbytes(length))

    async def write(volume: IscsiVolume, start: int, end: int, seeds: list[int]) -> None:
        for number in seeds:
            data = random.Random(number).randbytes(end - start)
            model[start:end] = data
            await volume.pwrite(start, data)
            assert await volume.pread(start, end - start) == data

    async with opened(target, lun) as volume:
        await volume.pwrite(0, bytes(model))
        async with trio.open_nursery() as nursery:
            for start, end in ranges:
                nursery.start_soon(write, volume, start, end, [rng.getrandbits(32) for _ in range(3)])
        assert await volume.pread(0, length) == model


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 20000), st.binary(min_size=1, max_size=9000)), min_size=1, max_size=6
    )
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_offset_and_length(target: Target, writes: list[tuple[int, bytes]]) -> None:
    async def run() -> None:
        model = bytearray(32768)
        async with opened(target, 2) as volume:
            await volume.pwrite(0, bytes(model))
            for offset, data in writes:
                await volume.pwrite(offset, memoryview(data))
                model[offset : offset + len(data)] = data
            assert await volume.pread(0, len(model)) == model
            for offset, data in writes:
                assert await volume.pread(offset, len(data)) == model[offset : offset + len(data)]

    trio.run(run)


async def test_a_resize_is_seen_by_refresh(own_tgtd: Tgtd) -> None:
    target = own_tgtd.target()
    backing = target.lun(MIB, removable="1")  # tgtd looks again at the size of these only

    async with opened(target) as volume:
        with backing.open("r+b") as file:
            file.truncate(3 * MIB)
        for parameter in ({"online": "0"}, {"path": str(backing)}, {"online": "1"}):
            target.update(1, **parameter)
        assert (await volume.refresh()).size == volume.properties.size == 3 * MIB
        await volume.pwrite(3 * MIB - 512, b"x" * 512)


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unflushed", [MIB, iscsi_volume.UNFLUSHED_BYTES])
async def test_data_survives_broken_connections(
    target: Target, monkeypatch: pytest.MonkeyPatch, unflushed: int
) -> None:
    """Writers and readers go on while the connection breaks again and again, in the middle of things."""
    monkeypatch.setattr(iscsi_volume, "UNFLUSHED_BYTES", unflushed)
    rng = random.Random(7)
    part = 512 * 1024 + 512
    done = 0

    async def work(volume: IscsiVolume, number: int) -> None:
        nonlocal done
        for turn in range(TURNS):
            data = random.Random(number * 100 + turn).randbytes(part)
            await volume.pwrite(number * part, data)
            assert await volume.pread(number * part, part) == data
        done += 1

    async with proxy(target.tgtd.port) as between:
        async with opened(target, 1, portal=between.portal) as volume:
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(work, volume, number)
                while done < 8:
                    before = between.connections
                    between.drop_after = rng.randrange(6 * MIB)
                    await until(lambda before=before: done == 8 or between.connections > before)
            await volume.flush()
            digest = hashlib.sha256(await volume.pread(0, 8 * part)).digest()
        assert between.connections > 3
    async with opened(target, 1, writable=False) as volume:
        assert hashlib.sha256(await volume.pread(0, 8 * part)).digest() == digest
    expected = b"".join(random.Random(number * 100 + TURNS - 1).randbytes(part) for number in range(8))
    assert hashlib.sha256(expected).digest() == digest


async def test_a_target_that_restarts_and_has_forgotten_what_was_not_flushed(own_tgtd: Tgtd) -> None:
    target = own_tgtd.target()
    backing = target.lun(4 * MIB, sector_size=4096)
    rng = random.Random(1)
    async with opened(target) as volume:
        await volume.pwrite(0, stable := rng.randbytes(MIB))
        await volume.flush()
        shutil.copy(backing, own_tgtd.directory / "stable")
        writes = [(rng.randrange(3 * MIB), rng.randbytes(rng.randrange(1, 90000))) for _ in range(20)]
        for offset, data in writes:
            await volume.pwrite(offset, data)
        own_tgtd.kill()
        shutil.copy(own_tgtd.directory / "stable", backing)  # what a cache does when the power fails
        own_tgtd.start()
        await volume.flush()
        model = bytearray(stable.ljust(4 * MIB, b"\0"))
        for offset, data in writes:
            model[offset : offset + len(data)] = data
        assert backing.read_bytes() == model
        assert await volume.pread(0, 4 * MIB) == model


async def test_what_is_kept_for_that_is_bounded(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iscsi_volume, "UNFLUSHED_BYTES", MIB)
    async with opened(target) as volume, trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(volume.pwrite, number * MIB // 2, bytes(MIB // 2))
        await trio.testing.wait_all_tasks_blocked()
        while nursery.child_tasks:
            assert volume._unflushed_bytes <= 2 * MIB + 16 * MIB // 2
            await trio.sleep(0.001)
        assert volume._unflushed_bytes < MIB


async def test_no_answer_is_a_timeout_and_the_volume_recovers(target: Target) -> None:
    async with (
        proxy(target.tgtd.port) as between,
        opened(target, portal=between.portal, timeout=SHORT) as volume,
    ):
        await volume.pwrite(0, b"a" * 512)
        between.silence()
        begun = trio.current_time()
        with pytest.raises(BackendTimeout, match="read of 512 bytes at 0"):
            await volume.pread(0, 512)
        assert SHORT <= trio.current_time() - begun < SHORT + 2
        between.speak()
        assert await volume.pread(0, 512) == b"a" * 512
        await volume.flush()


async def test_a_stopped_target_is_a_timeout(own_tgtd: Tgtd) -> None:
    target = own_tgtd.target()
    target.lun(MIB)
    async with opened(target, timeout=SHORT) as volume:
        own_tgtd.pause()
        with pytest.raises(BackendTimeout):
            await volume.pwrite(0, bytes(512))
        own_tgtd.pause(False)
        await volume.pwrite(0, b"b" * 512)
        assert await volume.pread(0, 512) == b"b" * 512


async def test_a_target_that_is_gone_and_comes_back(own_tgtd: Tgtd) -> None:
    target = own_tgtd.target()
    target.lun(MIB)
    async with opened(target, reconnect_timeout=SHORT) as volume:
        own_tgtd.kill()
        begun = trio.current_time()
        with pytest.raises(BackendError) as caught:
            await volume.pread(0, 512)
        assert caught.value.errno == errno.ECONNREFUSED
        assert trio.current_time() - begun < SHORT + 2
        # Nobody waits that long again for what is known to be gone.
        begun = trio.current_time()
        with pytest.raises(BackendError):
            await volume.pread(0, 512)
        assert trio.current_time() - begun < SHORT
        own_tgtd.start()
        assert await volume.pread(0, 512) == bytes(512)


async def test_another_disk_in_its_place_is_not_written(own_tgtd: Tgtd) -> None:
    target = own_tgtd.target()
    backing = target.lun(MIB)
    async with opened(target, reconnect_timeout=SHORT) as volume:
        own_tgtd.kill()
        own_tgtd.commands.append(
            (
                "--mode",
                "logicalunit",
                "--tid",
                "1",
                "--lun",
                "1",
                "--op",
                "update",
                "--params",
                "scsi_sn=another",
            )
        )
        own_tgtd.start()
        with pytest.raises(BackendError, match="another disk") as caught:
            await volume.pwrite(0, b"x" * 512)
        assert caught.value.errno == errno.ESTALE
        volume._writes = 0  # nothing is owed to it
    assert backing.read_bytes() == bytes(MIB)


async def test_a_cancelled_write_gives_its_buffer_back(target: Target) -> None:
    async with proxy(target.tgtd.port) as between, opened(target, 2, portal=between.portal) as volume:
        await volume.pwrite(0, b"o" * 8192)
        between.silence()
        buffer = bytearray(b"n" * MIB)
        with memoryview(buffer) as view:  # BufferError at the end, if somebody still looked at it
            with trio.move_on_after(0.05) as scope:
                await volume.pwrite(0, view)
            assert scope.cancelled_caught
        buffer[:] = b"x" * MIB
        between.speak()
        assert (await volume.pread(MIB, 4096)) == await volume.pread(MIB, 4096)
        found = await volume.pread(0, MIB)
        assert set(found) <= set(b"on\0")


async def test_a_cancelled_part_of_a_block_harms_no_neighbour(target: Target) -> None:
    """The cancelled write may still land, with the block's other bytes as they were when it read them."""
    async with proxy(target.tgtd.port) as between, opened(target, 2, portal=between.portal) as volume:
        for turn in range(20):
            await volume.pwrite(0, bytes(4096))
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def cancelled(scope: trio.CancelScope = scope) -> None:
                    with scope:
                        await volume.pwrite(0, b"c" * 100)

                nursery.start_soon(cancelled)
                for _ in range(turn):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
                await volume.pwrite(2000, b"n" * 100)
            block = await volume.pread(0, 4096)
            assert block[2000:2100] == b"n" * 100
            assert block[:100] in (bytes(100), b"c" * 100)


async def test_closing_a_volume_that_nobody_answers_for(target: Target) -> None:
    async with proxy(target.tgtd.port) as between:
        for dirty in (False, True):
            between.speak()
            source = IscsiBackend.parse_url(target.url(1, between.portal), {})
            volume = await backend(between.portal, timeout=SHORT).open(source, writable=True)
            if dirty:
                await volume.pwrite(0, bytes(512))
            between.silence()
            begun = trio.current_time()
            if dirty:
                with pytest.raises(BackendTimeout):
                    await volume.aclose()
            else:
                await volume.aclose()
            assert trio.current_time() - begun < SHORT + 2
            await volume.aclose()
    await until(lambda: target.sessions() == 0)


async def test_closing_flushes_and_logs_out(target: Target) -> None:
    async with opened(target) as volume:
        await volume.pwrite(0, bytes(512))
        assert target.sessions() == 1
    assert volume._writes == 0
    await until(lambda: target.sessions() == 0)


async def test_an_idle_session_does_nothing(target: Target) -> None:
    async with opened(target) as volume:
        await volume.pread(0, 512)
        # Returns once no task at all has run for that long.
        with trio.fail_after(5):
            await trio.testing.wait_all_tasks_blocked(cushion=0.5)
