"""iSCSI through the kernel's initiator: real targets, sessions and multipath maps, and nothing of them afterwards.

In the guest (marker vm), where a login takes seconds: few tests that each show much.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from guest_volumes import configuration
from kernel_targets import Daemon, KernelTarget, MakeTarget, TgtdKind, sessions, succeed
from mounts import VOLFS, Mount, mounted, wait_until
from services import MIB
from volumes import random_bytes, write_file

from volfs import journal, recovery
from volfs.backends import brick_library
from volfs.backends.base import BackendVolume
from volfs.backends.iscsi import IscsiBackend
from volfs.backends.iscsi_source import IscsiSettings, IscsiSource
from volfs.errors import BackendError, BackendTimeout, VolfsError
from volfs.source import parse_connection_info

pytestmark = pytest.mark.vm(seconds=7)

SIZE = 4 * MIB
COPIED = 32 * MIB  # long enough for something to fail meanwhile
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


def mounted_target(directory: Path, target: KernelTarget) -> AbstractContextManager[Mount]:
    """A daemon with a backend that has the target, by the kernel."""
    account = target.account
    settings = {"portals": list(target.portals), "initiator": "kernel"}
    if account:
        settings |= {"chap_username": account.user, "chap_password": account.secret}
    directory.mkdir(exist_ok=True)
    config = configuration(directory / "volfs.toml", {"san": {"driver": "iscsi"} | settings})
    config.chmod(0o600)
    return mounted(directory, [], ["--config", str(config)])


def path_in(mount: Mount, target: KernelTarget) -> Path:
    return mount.path / "san" / target.iqn / str(target.lun)


def test_what_a_killed_daemon_left_is_gone_after_the_next_start(
    kernel_target: MakeTarget, runtime: Path, tmp_path: Path
) -> None:
    target = kernel_target("lio", SIZE, chap=True)
    with mounted_target(tmp_path / "m", target) as mount:
        file = os.open(path_in(mount, target), os.O_RDWR)
        os.pwrite(file, b"stable", 5)
        os.fsync(file)
        mount.process.kill()
        mount.process.wait()
        with pytest.raises(OSError, match="not connected"):
            os.close(file)
        succeed("umount", "-l", mount.path)
    assert set(left(runtime)) == {"sessions", "disks", "nodes", "records"}
    with mounted_target(tmp_path / "m", target) as mount:
        assert left(runtime) == {}
        assert path_in(mount, target).read_bytes()[5:11] == b"stable"


def test_a_copy_outlives_one_of_two_paths(
    multipathd: object, kernel_target: MakeTarget, runtime: Path, tmp_path: Path
) -> None:
    target, size = kernel_target("lio", COPIED, portals=2), COPIED
    source = tmp_path / "source"
    source.write_bytes(random_bytes(MIB) * (size // MIB))
    info = target.connection_info
    info["data"]["enforce_multipath"] = True
    info_path = tmp_path / "connection.json"
    info_path.write_text(json.dumps(info))
    with mounted(tmp_path / "m", []) as mount:
        attached = mount.volfs("attach", "--connection-info", info_path)
        assert attached.returncode == 0, attached.stderr
        path = attached.stdout.strip()
        command = [*VOLFS, "copy", "--quiet", source, path]
        with open(path, "rb"):  # so that it stays connected after the copy, for a look
            copy = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            wait_until(
                lambda: written(target) > MIB or copy.poll() is not None, "the copy has begun", DEADLINE
            )
            failing = disks()[0] / "device" / "state"
            failing.write_text("offline\n")
            begun = written(target)
            output, _ = copy.communicate(timeout=120)
            assert copy.returncode == 0, output
            (name,) = succeed("multipathd", "show", "maps", "raw", "format", "%n").split()
            table = succeed("dmsetup", "status", name)
            assert table.count(" F ") == 1, f"one path has failed: {table}"
            assert begun < size, "the path failed before the copy was done"
            failing.write_text("running\n")
        detached = mount.volfs("detach", "--wait", "60", path)
        assert detached.returncode == 0, detached.stderr
    assert target.backing.read_bytes() == source.read_bytes()


def written(target: KernelTarget) -> int:
    return target.backing.stat().st_blocks * 512


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


async def use_without(stop: Callable[[], None], target: KernelTarget) -> None:
    """Stop the initiator while the volume is open, and write to it."""
    async with opened(source_of(target), connect_timeout=5) as volume:
        stop()
        await volume.pwrite(0, b"still")
        await volume.flush()


async def test_an_initiator_that_hangs_delays_only_the_disconnect(
    iscsid: Daemon, kernel_target: MakeTarget, runtime: Path
) -> None:
    """iscsid logs in and out; the bytes are moved by the kernel. What was not undone in time is, in the background."""
    target = kernel_target("tgtd", SIZE)
    try:
        failed = await within(60, lambda: use_without(iscsid.pause, target))
        assert isinstance(failed, BackendTimeout), failed
        assert "disconnect" in str(failed)
        assert len(sessions()) == 1
    finally:
        iscsid.pause(False)


async def test_an_initiator_that_is_killed_ends_no_input_or_output_and_nothing_is_left(
    iscsid: Daemon, kernel_target: MakeTarget, runtime: Path
) -> None:
    """Nobody can log out then. The record of it is kept, and the next start of a daemon does it."""
    target = kernel_target("tgtd", SIZE)
    try:
        failed = await within(60, lambda: use_without(iscsid.kill, target))
        assert isinstance(failed, BackendError), failed
        assert len(sessions()) == 1
        assert target.backing.read_bytes()[:5] == b"still"
        await trio.to_thread.run_sync(wait_until, given_up, "the disconnect is given up", DEADLINE)
    finally:
        iscsid.start()
    await recovery.clean_up()
    assert left(runtime) == {}


def given_up() -> bool:
    """Whether a record is left to the next start of a daemon."""
    records = list(journal.orphans())
    for record in records:
        record.release()
    return bool(records)
