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
from mounts import Mount, mounted, wait_until
from services import MIB
from volumes import random_bytes, write_file

from volfs.backends.base import BackendVolume
from volfs.backends.iscsi import IscsiBackend
from volfs.backends.iscsi_source import IscsiSettings, IscsiSource
from volfs.copying import copy_volume_data
from volfs.errors import BackendError, VolfsError, VolumeNotFound
from volfs.source import parse_connection_info

pytestmark = pytest.mark.vm

SIZE = 16 * MIB
DEADLINE = 60.0  # for what happens in the background; all is slow in the guest


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own; and at the test's end nothing is left on the machine."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    from volfs.backends import brick_library

    monkeypatch.setattr(brick_library, "_setup", None)
    directory = tmp_path / "volfs"
    yield directory
    wait_until(lambda: left(directory) == {}, f"nothing is left, but {left(directory)}", DEADLINE)


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
    source: IscsiSource, *, writable: bool = True, timeout: float = 20.0, initiator: str | None = "kernel"
) -> AsyncIterator[BackendVolume]:
    """The volume by the kernel, and a backend for just this source."""
    made = IscsiBackend.settings_for(source)
    keys = ("portals", "chap_username", "chap_password")
    settings = IscsiSettings(
        **{key: getattr(made, key) for key in keys},
        initiator=initiator,  # type: ignore[arg-type]
        timeout=timeout,
        device_scan_attempts=1,
    )
    async with (
        IscsiBackend("san", settings) as backend,
        await backend.open(source, writable=writable) as volume,
    ):
        yield volume


def disks() -> list[Path]:
    return sorted(Path("/sys/block").glob("sd*"))


@pytest.mark.parametrize(("kind", "chap"), [("lio", True), ("tgtd", False)])
async def test_a_volume_by_the_kernel_is_read_written_and_let_go(
    iscsid: object, kernel_target: MakeTarget, runtime: Path, kind: str, chap: bool
) -> None:
    target = kernel_target(kind, SIZE, chap=chap)
    source = source_of(target)
    content = bytearray(random_bytes(SIZE))
    await trio.to_thread.run_sync(write_file, target.backing, bytes(content), 0)
    async with opened(source) as volume:
        assert len(sessions()) == 1
        assert volume.properties.size == SIZE
        assert await volume.pread(0, SIZE) == content
        for offset, length in ((1, 1), (511, 1026), (5 * MIB + 7, MIB)):
            content[offset : offset + length] = data = random_bytes(length, offset)
            await volume.pwrite(offset, data)
        await volume.discard(2 * MIB, 3 * MIB)
        content[2 * MIB : 5 * MIB] = bytes(3 * MIB)
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
    iscsid: object, kernel_target: MakeTarget
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


async def test_an_attach_that_fails_leaves_nothing(iscsid: object, kernel_target: MakeTarget) -> None:
    """At the login, and after it. The fixture looks at what is left."""
    target = kernel_target("tgtd", SIZE, chap=True)
    with pytest.raises(BackendError) as caught:
        async with opened(source_of(target, auth_password="wrong-wrong-wrong")):
            pass
    assert caught.value.errno == errno.EACCES, caught.value
    assert "authorization" in str(caught.value)
    assert "wrong-wrong" not in str(caught.value)
    with pytest.raises(VolumeNotFound):
        async with opened(source_of(target, target_lun=9)):
            pass


async def test_two_paths_are_one_disk_that_outlives_one_of_them(
    iscsid: object, multipathd: object, kernel_target: MakeTarget, tmp_path: Path
) -> None:
    """A connection info that enforces multipath goes by the kernel without a setting. A path fails during a copy."""
    target = kernel_target("lio", SIZE, portals=2)
    content = random_bytes(SIZE)
    copied = tmp_path / "content"
    copied.write_bytes(content)
    info = target.connection_info
    info["data"]["enforce_multipath"] = True
    told = tmp_path / "info.json"
    told.write_text(json.dumps(info))

    def copy() -> None:
        with mounted(tmp_path / "m", []) as mount:
            path = attach(mount, told)
            with copied.open("rb", 0) as one, path.open("wb", 0) as other:
                assert len(sessions()) == 2
                (name,) = succeed("multipathd", "show", "maps", "raw", "format", "%n").split()

                def fail_a_path(done: int) -> None:
                    if done > SIZE // 4:
                        (disks()[0] / "device" / "state").write_text("offline")

                copy_volume_data(one, other, SIZE, progress=fail_a_path)
                os.fsync(other.fileno())
                paths = succeed("multipathd", "show", "paths", "raw", "format", "%m %T")
                assert paths.count("active") < 2, f"{name}: {paths}"
                (disks()[0] / "device" / "state").write_text("running")
            wait_until(lambda: not sessions(), "it is disconnected at the last close", DEADLINE)

    await trio.to_thread.run_sync(copy)
    assert await trio.Path(target.backing).read_bytes() == content


def attach(mount: Mount, told: Path) -> Path:
    done = mount.volfs("attach", "--connection-info", told)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_what_a_killed_daemon_left_is_gone_after_the_next_start(
    iscsid: object, kernel_target: MakeTarget, runtime: Path, tmp_path: Path
) -> None:
    target = kernel_target("lio", SIZE, chap=True)
    told, config = tmp_path / "info.json", tmp_path / "volfs.toml"
    told.write_text(json.dumps(target.connection_info))
    config.write_text(
        "[backends.san]\ndriver = 'iscsi'\ninitiator = 'kernel'\n" + f"portals = ['{target.portals[0]}']\n"
    )
    with mounted(tmp_path / "a", [], ["--config", str(config)]) as mount:
        path = attach(mount, told)
        file = os.open(path, os.O_RDONLY)
        assert os.read(file, 512) == bytes(512)
        mount.process.send_signal(signal.SIGKILL)
        mount.process.wait()
        with suppress(OSError):
            os.close(file)
    assert set(left(runtime)) == {"sessions", "disks", "nodes", "records"}
    with mounted(tmp_path / "b", [], ["--config", str(config)]) as mount:
        assert left(runtime) == {}, mount.log
        assert "cleaned up" in mount.log


async def within(seconds: float, call: Callable[[], Any]) -> VolfsError | None:
    """The error of a request, which has to end in this time; None when it succeeds."""
    with trio.fail_after(seconds):
        try:
            await call()
        except VolfsError as exc:
            return exc
    return None


async def test_a_lun_that_is_removed_is_an_error(iscsid: object, kernel_target: MakeTarget) -> None:
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
    iscsid: object, kernel_target: MakeTarget
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
