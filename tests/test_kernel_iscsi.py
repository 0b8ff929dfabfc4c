"""iSCSI through the kernel's initiator: real targets, sessions and multipath maps, and nothing of them afterwards.

In the guest (marker vm), where a login takes seconds: few tests that each show much.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from kernel_targets import KernelTarget, MakeTarget, TgtdKind, sessions, succeed
from mounts import wait_until
from services import MIB
from volumes import random_bytes, write_file

from volfs import recovery
from volfs.backends import brick_library
from volfs.backends.base import BackendVolume
from volfs.backends.iscsi import IscsiBackend
from volfs.backends.iscsi_source import IscsiSettings, IscsiSource
from volfs.errors import BackendError, BackendTimeout, VolfsError
from volfs.source import parse_connection_info

pytestmark = pytest.mark.vm

SIZE = 4 * MIB
DEADLINE = 60.0  # for what happens in the background; all is slow in the guest


@pytest.fixture
def runtime(
    iscsid: object, kernel_target: MakeTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A runtime directory of the test's own; and at the test's end, with the targets still there, nothing is left."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(brick_library, "_setup", None)
    directory = tmp_path / "volfs"
    yield directory
    try:
        wait_until(lambda: left(directory) == {}, f"nothing is left, but {left(directory)}", DEADLINE)
    except AssertionError:
        for command in ("multipath -F", "iscsiadm -m node -u", "iscsiadm -m node -o delete"):
            subprocess.run(command.split(), check=False)  # it is no failure of the tests that come
        raise


def left(runtime: Path) -> dict[str, list[str]]:
    """What volumes that were attached may leave."""
    maps = subprocess.run(
        ["dmsetup", "ls", "--target", "multipath"], capture_output=True, text=True, check=False
    )
    found = {
        "sessions": sessions(),
        "disks": [path.name for path in Path("/sys/block").glob("sd*")],
        "nodes": [str(path) for path in Path("/etc/iscsi/nodes").glob("*/*")],
        "discovered": [str(path) for path in Path("/etc/iscsi/send_targets").glob("*")],
        "maps": [] if "No devices" in maps.stdout else maps.stdout.split(),
        "records": [path.read_text() for path in (runtime / "journal").glob("*")],
    }
    return {key: value for key, value in found.items() if value}


def source_of(target: KernelTarget, **data: Any) -> IscsiSource:
    info = target.connection_info
    source = parse_connection_info({**info, "data": info["data"] | data}, {})
    assert isinstance(source, IscsiSource)
    return source


@asynccontextmanager
async def opened(
    source: IscsiSource,
    *,
    timeout: float = 20.0,
    connect_timeout: float = 120.0,
    initiator: str | None = "kernel",
) -> AsyncIterator[BackendVolume]:
    """The volume by the kernel, and a backend for just this source."""
    made = IscsiBackend.settings_for(source)
    keys = ("portals", "chap_username", "chap_password")
    settings = IscsiSettings(
        **{key: getattr(made, key) for key in keys},
        initiator=initiator,  # type: ignore[arg-type]
        timeout=timeout,
        connect_timeout=connect_timeout,
        device_scan_attempts=1,
    )
    async with (
        IscsiBackend("san", settings) as backend,
        await backend.open(source, writable=True) as volume,
    ):
        yield volume


def disks() -> list[Path]:
    return sorted(Path("/sys/block").glob("sd*"))


@pytest.mark.parametrize(("kind", "chap"), [("lio", True), ("tgtd", False)])
async def test_a_volume_by_the_kernel_is_read_written_and_let_go(
    kernel_target: MakeTarget, runtime: Path, kind: str, chap: bool
) -> None:
    target = kernel_target(kind, SIZE, chap=chap)
    source = source_of(target)
    content = bytearray(random_bytes(SIZE))
    await trio.to_thread.run_sync(write_file, target.backing, bytes(content), 0)
    async with opened(source) as volume:
        assert len(sessions()) == 1
        assert volume.properties.size == SIZE
        assert await volume.pread(0, SIZE) == content
        for offset, length in ((1, 1), (511, 1026), (3 * MIB + 7, MIB // 2)):
            content[offset : offset + length] = data = random_bytes(length, offset)
            await volume.pwrite(offset, data)
        await volume.discard(MIB, MIB)
        content[MIB : 2 * MIB] = bytes(MIB)
        assert await volume.pread(0, SIZE) == content
        await volume.flush()
        (record,) = (runtime / "journal").iterdir()
        facts = json.loads(record.read_text())["facts"]
        assert facts["path"].startswith("/dev/sd")
        assert target.account is None or target.account.secret not in record.read_text()
    assert sessions() == []
    found = await trio.Path(target.backing).read_bytes()
    assert found == content


async def test_two_handles_are_one_session_and_a_resize_is_seen(
    kernel_target: MakeTarget, runtime: Path
) -> None:
    target = kernel_target("tgtd", SIZE)
    source = source_of(target)
    settings = IscsiSettings(portals=source.portals, initiator="kernel")
    async with IscsiBackend("san", settings) as backend:
        assert (await backend.stat(source)).size == SIZE
        assert sessions() == [], "looked at in user space"
        reader = await backend.open(source, writable=False)
        writer = await backend.open(source, writable=True)
        await reader.aclose()
        assert len(sessions()) == 1
        os.truncate(target.backing, 2 * SIZE)
        assert isinstance(target.kind, TgtdKind)
        unit = ("--mode", "logicalunit", "--op", "update", "--tid", target.kind.tid, "--lun", "1", "--params")
        for change in ("online=0", f"path={target.backing}", "online=1"):
            target.kind.tgtd.run(*unit, change)
        assert (await writer.refresh()).size == 2 * SIZE
        await writer.pwrite(2 * SIZE - 5, b"grown")
        await writer.aclose()
    tail = (await trio.Path(target.backing).read_bytes())[-5:]
    assert tail == b"grown"


async def test_an_attach_that_fails_leaves_nothing(kernel_target: MakeTarget, runtime: Path) -> None:
    target = kernel_target("tgtd", SIZE, chap=True)
    with pytest.raises(BackendError) as caught:
        async with opened(source_of(target, auth_password="wrong-wrong-wrong")):
            pass
    assert caught.value.errno == errno.EACCES, caught.value
    assert "authorization" in str(caught.value)
    assert "wrong-wrong" not in str(caught.value)


async def test_two_paths_are_one_disk_that_outlives_one_of_them(
    multipathd: object, kernel_target: MakeTarget, runtime: Path
) -> None:
    """A connection info that enforces multipath goes by the kernel without a setting."""
    target = kernel_target("lio", SIZE, portals=2)
    content, half = random_bytes(SIZE), SIZE // 2
    async with opened(source_of(target, enforce_multipath=True), initiator=None) as volume:
        assert len(sessions()) == 2
        (name,) = succeed("multipathd", "show", "maps", "raw", "format", "%n").split()
        await volume.pwrite(0, content[:half])
        failing = disks()[0] / "device" / "state"
        failing.write_text("offline\n")
        await volume.pwrite(half, content[half:])
        await volume.flush()
        assert await volume.pread(0, SIZE) == content
        table = succeed("dmsetup", "status", name)
        assert table.count(" F ") == 1, f"one path has failed: {table}"
        failing.write_text("running\n")
    assert await trio.Path(target.backing).read_bytes() == content


def test_what_a_killed_process_left_is_gone_after_the_next_start(
    kernel_target: MakeTarget, runtime: Path
) -> None:
    """What a daemon's start calls; test_brick.py has a daemon, which takes minutes to start here."""
    source = source_of(kernel_target("lio", SIZE, chap=True))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        trio.run(hold_open, source, writer)
    assert os.read(reader, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert set(left(runtime)) == {"sessions", "disks", "nodes", "records"}
    trio.run(recovery.clean_up)
    assert left(runtime) == {}


async def hold_open(source: IscsiSource, writer: int) -> None:
    """Open the volume, tell so, and wait to be killed."""
    async with opened(source):
        os.write(writer, b"x")
        await trio.sleep_forever()


async def within(seconds: float, call: Callable[[], Any]) -> VolfsError | None:
    """The error of a request, which has to end in this time; None when it succeeds."""
    with trio.fail_after(seconds):
        try:
            await call()
        except VolfsError as exc:
            return exc
    return None


async def test_a_lun_that_is_removed_is_an_error(kernel_target: MakeTarget, runtime: Path) -> None:
    target = kernel_target("lio", SIZE)
    with suppress(VolfsError):  # closing tells of it again
        async with opened(source_of(target), timeout=10) as volume:
            await volume.pwrite(0, b"x" * 4096)
            await volume.flush()
            target.kind.remove_lun()
            failed = await within(30, lambda: volume.pread(MIB, 4096))
            assert failed is not None
            assert failed.errno in (errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT)
            assert await within(30, lambda: volume.pwrite(MIB, b"y" * 4096)) is not None


async def test_a_target_that_restarts_or_hangs_ends_no_wait_late(
    kernel_target: MakeTarget, runtime: Path
) -> None:
    target = kernel_target("tgtd", SIZE)
    assert isinstance(target.kind, TgtdKind)
    tgtd = target.kind.tgtd
    async with opened(source_of(target), timeout=60) as volume:
        await volume.pwrite(0, b"before")
        await volume.flush()
        tgtd.kill()
        tgtd.start()
        assert await within(60, lambda: volume.pread(0, 6)) is None
        assert await volume.pread(0, 6) == b"before"
    async with opened(source_of(target), timeout=3) as volume:
        tgtd.pause()
        try:
            failed = await within(10, lambda: volume.pread(MIB, 4096))
            assert failed is not None
            assert failed.errno == errno.ETIMEDOUT
        finally:
            tgtd.pause(False)
        assert await within(30, lambda: volume.pread(MIB, 4096)) is None


async def test_an_initiator_that_hangs_delays_only_the_disconnect(
    iscsid: subprocess.Popen[bytes], kernel_target: MakeTarget, runtime: Path
) -> None:
    """iscsid logs in and out; the bytes are moved by the kernel. What was not undone in time is, in the background."""
    target = kernel_target("tgtd", SIZE)

    async def use() -> None:
        async with opened(source_of(target), connect_timeout=20) as volume:
            iscsid.send_signal(signal.SIGSTOP)
            await volume.pwrite(0, b"still")
            await volume.flush()

    try:
        failed = await within(60, use)
        assert isinstance(failed, BackendTimeout), failed
        assert "disconnect" in str(failed)
        assert len(sessions()) == 1
    finally:
        iscsid.send_signal(signal.SIGCONT)
