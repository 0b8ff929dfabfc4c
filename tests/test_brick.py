"""Driver `brick`: what os-brick attaches, what it says when that fails, and that nothing is left of it.

With connectors of os-brick that need nothing of the kernel, and for faults with one of our own (connectors.py). What
needs the kernel's initiator is in test_kernel_iscsi.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from connectors import PROTOCOL, Steps, processutils
from connectors import steps as steps  # a fixture
from mounts import Mount, mounted, wait_until
from os_brick import exception
from os_brick.initiator import connector as os_brick_connector
from services import MIB, skip_or_fail
from volumes import BrickVolume, StoredVolume, raises, random_bytes

from volfs import journal, open_volume
from volfs.backends import DRIVERS, brick_library
from volfs.backends.brick import BrickBackend, BrickSettings, BrickSource
from volfs.backends.brick_connection import clean_up
from volfs.errors import BackendError, BackendTimeout, SourceError, VolumeNotFound
from volfs.source import parse_connection_info

SECRET = "hush-a-by-baby"
SIZE = MIB


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of this test's own. os-brick's set-up, which is one for a process, is made anew."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(brick_library, "_setup", None)
    return tmp_path / "volfs"


def records(runtime: Path) -> list[dict[str, Any]]:
    """The facts of the journal's records."""
    found = []
    for path in (runtime / "journal").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed just now
            found.append(json.loads(path.read_text())["facts"])
    return found


@pytest.fixture
def info(steps: Steps) -> dict[str, Any]:
    """A volume of SIZE bytes that the fake connector connects."""
    (steps.directory / "disk").write_bytes(bytes(SIZE))
    data = {"uuid": "disk", "volume_id": "volume-1", "auth_password": SECRET, "nested": {"keyring": SECRET}}
    return {"driver_volume_type": PROTOCOL, "data": data}


@pytest.fixture
def source(info: dict[str, Any]) -> BrickSource:
    return parsed(info)


def parsed(info: dict[str, Any]) -> BrickSource:
    source = parse_connection_info(info, {})
    assert isinstance(source, BrickSource)
    return source


@pytest.fixture
async def backend() -> AsyncIterator[BrickBackend]:
    backend = BrickBackend("brick", BrickSettings(connect_timeout=5))
    yield backend
    await backend.aclose()


@pytest.fixture
def nothing_left(steps: Steps, runtime: Path) -> Iterator[None]:
    """At the end of the test no volume is connected, no record there, and the secret in no file."""
    yield
    assert steps.connected() == []
    assert records(runtime) == []
    assert [
        path for path in runtime.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ] == []


# ---- sources ---------------------------------------------------------------------------------------------------


def test_every_protocol_of_os_brick_has_a_driver() -> None:
    known = {name.lower() for name in os_brick_connector.get_connector_mapping("x86_64")}
    assert {protocol for it in DRIVERS.values() for protocol in it.protocols} == known


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"volume_id": "b5c2"}, "b5c2"),
        ({"export": "server:/vols", "name": "volume-7"}, "volume-7"),
        ({"target_nqn": "nqn.2014:x"}, "nqn.2014:x-lun-"),
        ({"target_wwn": ["500a", "500b"], "target_lun": 3}, "500a-lun-3"),
        ({"target_iqns": ["iqn.a", "iqn.b"], "target_luns": [1, 2]}, "iqn.a-lun-1"),
        ({"device_path": "/dev/vg0/lv1"}, "lv1"),
        ({"volume_id": "a/b"}, "a%2Fb"),
        ({}, "nvmeof"),
    ],
)
def test_a_volume_is_called_what_tells_it_from_its_siblings(data: dict[str, Any], name: str) -> None:
    source = parsed({"driver_volume_type": "nvmeof", "data": data})
    assert source.name == name
    assert source.url == f"brick:nvmeof/{name}"


def test_a_long_or_odd_name_becomes_one_of_a_file() -> None:
    for volume_id in ("x" * 300, "..", "\u20ac" * 100):
        name = parsed({"driver_volume_type": "nvmeof", "data": {"volume_id": volume_id}}).name
        assert name.startswith("nvmeof-")
        assert len(name) < 40


def test_equal_connection_infos_are_one_source() -> None:
    one = parsed({"driver_volume_type": "nfs", "data": {"export": "a:/b", "name": "c"}})
    other = parsed({"driver_volume_type": "nfs", "data": {"name": "c", "export": "a:/b"}})
    assert one == other
    assert hash(one) == hash(other)
    assert one != parsed({"driver_volume_type": "nfs", "data": {"export": "a:/b", "name": "d"}})


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(SourceError, match=r"type nfs: data\.format: expected raw, not 'qcow2'"):
        parsed({"driver_volume_type": "nfs", "data": {"export": "a:/b", "name": "c", "format": "qcow2"}})


def test_a_url_is_refused_with_what_to_do_instead() -> None:
    for call in (BrickBackend.parse_url, BrickBackend.parse_prefix):
        with pytest.raises(SourceError, match="by its connection info"):
            call("nfs/volume-1", {})


def test_secrets_are_not_shown(source: BrickSource) -> None:
    for shown in (repr(source), source.url, source.name, str(BrickSettings())):
        assert SECRET not in shown


# ---- connecting ------------------------------------------------------------------------------------------------


async def test_a_volume_is_connected_while_it_is_open(
    backend: BrickBackend, source: BrickSource, steps: Steps, runtime: Path, nothing_left: None
) -> None:
    async with await backend.open(source, writable=True) as volume:
        assert steps.connected() == ["connected-disk"]
        (facts,) = records(runtime)
        assert facts["path"] == str(steps.directory / "connected-disk")
        assert SECRET not in json.dumps(facts)
        await volume.pwrite(5, b"hello")
        assert await volume.pread(5, 5) == b"hello"
    assert (steps.directory / "disk").read_bytes()[5:10] == b"hello"
    await volume.aclose()
    assert steps.calls == ["connect", "disconnect"]
    assert steps.data[0]["auth_password"] == SECRET, "os-brick itself needs it"


async def test_stat_connects_once_and_leaves_nothing(
    backend: BrickBackend, source: BrickSource, steps: Steps, nothing_left: None
) -> None:
    assert (await backend.stat(source)).size == SIZE
    assert steps.connected() == []
    os.truncate(steps.directory / "disk", 2 * SIZE)
    assert (await backend.stat(source)).size == SIZE
    assert steps.calls == ["connect", "disconnect"]
    async with await backend.open(source, writable=False):
        assert (await backend.stat(source)).size == 2 * SIZE
    assert (await backend.stat(source)).size == 2 * SIZE


async def test_readers_and_a_writer_share_a_connection(
    backend: BrickBackend, source: BrickSource, steps: Steps, nothing_left: None
) -> None:
    """As VolumeTable.open does: the writer's before the reader's is closed."""
    reader = await backend.open(source, writable=False)
    writer = await backend.open(source, writable=True)
    await reader.aclose()
    assert steps.connected() == ["connected-disk"]
    await writer.pwrite(0, b"x")
    await writer.aclose()
    assert steps.calls == ["connect", "disconnect"]


async def test_a_device_that_another_backend_uses_stays(
    backend: BrickBackend, source: BrickSource, info: dict[str, Any], steps: Steps, nothing_left: None
) -> None:
    """Another password, hence another source; os-brick would take the volume away from under the other."""
    info["data"]["auth_password"] = "other"
    mine, other = await backend.open(source, writable=False), BrickBackend("other", BrickSettings())
    async with await other.open(parsed(info), writable=True) as volume:
        await mine.aclose()
        assert await volume.pread(0, 1) == b"\0"
        assert steps.connected() == ["connected-disk"]
    assert steps.calls == ["connect", "connect", "disconnect"]


async def test_an_encrypted_volume_is_shown_as_it_is(
    backend: BrickBackend, info: dict[str, Any], steps: Steps, nothing_left: None
) -> None:
    """os-brick would put a link into /dev/disk/by-id for an encryptor."""
    info["data"]["encrypted"] = True
    async with await backend.open(parsed(info), writable=False):
        assert steps.data[0]["encrypted"] is False


async def test_a_read_only_volume_is_not_opened_for_writing(
    backend: BrickBackend, info: dict[str, Any], steps: Steps
) -> None:
    info["data"]["access_mode"] = "ro"
    with raises(errno.EROFS):
        await backend.open(parsed(info), writable=True)
    assert steps.calls == []
    assert (await backend.stat(parsed(info))).read_only


async def test_settings_reach_os_brick(source: BrickSource, steps: Steps, tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    settings = BrickSettings(
        use_multipath=True,
        enforce_multipath=True,
        device_scan_attempts=7,
        lock_path=str(locks),
        root_helper="doas",
    )
    made: list[dict[str, Any]] = []
    factory = os_brick_connector.InitiatorConnector.factory

    def note(protocol: str, root_helper: str, **how: Any) -> Any:
        made.append({"protocol": protocol, "root_helper": root_helper, **how})
        return factory(protocol, root_helper, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os_brick_connector.InitiatorConnector, "factory", staticmethod(note))
        await (await BrickBackend("b", settings).open(source, writable=False)).aclose()
    assert made[0]["protocol"] == PROTOCOL
    assert made[0]["root_helper"] == "doas"
    assert made[0]["use_multipath"] is True
    assert made[0]["device_scan_attempts"] == 7
    assert steps.data[0]["enforce_multipath"] is True
    assert list(locks.iterdir()), "its locks are not there"
    other = BrickBackend("other", BrickSettings())
    with raises(errno.EINVAL) as caught:  # os-brick has one for all
        await other.open(source, writable=False)
    assert "one lock_path for a process" in str(caught.value)


async def test_a_resize_is_told_to_the_kernel(
    backend: BrickBackend, info: dict[str, Any], steps: Steps, storage: Any, nothing_left: None
) -> None:
    stored = storage.make("block", SIZE)
    (steps.directory / "disk").unlink()
    (steps.directory / "disk").symlink_to(stored.device)
    async with await backend.open(parsed(info), writable=True) as volume:
        stored.resize(2 * SIZE)
        assert (await volume.refresh()).size == 2 * SIZE
        assert (await backend.stat(parsed(info))).size == 2 * SIZE
        steps.failing["extend"] = exception.BrickException("All paths need to be up to extend the device.")
        stored.resize(3 * SIZE)
        assert (await volume.refresh()).size == 3 * SIZE, "a path that is down is no reason not to open"
    assert steps.calls.count("extend") == 2


# ---- failures --------------------------------------------------------------------------------------------------

COMMAND = processutils.ProcessExecutionError(
    cmd=f"iscsiadm -m node -T iqn.x -n node.session.auth.password -v {SECRET}",
    exit_code=24,
    stdout="Logging in\n",
    stderr="iscsiadm: Could not login.\niscsiadm: initiator reported error (24 - authorization failure)\n",
)
MISSING = processutils.ProcessExecutionError(
    cmd="nvme connect", description="[Errno 2] No such file or directory: 'nvme'"
)
CHAINED = exception.ExceptionChainer()
CHAINED.add_exception(BackendError, exception.VolumePathNotRemoved(volume_path="/dev/sda"), None)


@pytest.mark.parametrize(
    ("raised", "kind", "number", "text"),
    [
        (
            COMMAND,
            BackendError,
            errno.EACCES,
            "iscsiadm: Could not login.; initiator reported error (24 - authorization failure)",
        ),
        (MISSING, BackendError, errno.EOPNOTSUPP, "nvme: [Errno 2] No such file or directory: 'nvme'"),
        (CHAINED, BackendError, errno.EIO, "Volume path /dev/sda was not removed in time."),
        (exception.VolumeDeviceNotFound(device="sda"), VolumeNotFound, errno.ENOENT, "not found at sda."),
        (
            exception.TargetPortalNotFound(target_portal="p"),
            BackendError,
            errno.EHOSTUNREACH,
            "target portal p.",
        ),
        (
            exception.BrickException(f"user x, password {SECRET}"),
            BackendError,
            errno.EIO,
            "user x, password ***",
        ),
        (
            exception.ExecutionTimeout(cmd="iscsiadm", stderr="Time out"),
            BackendTimeout,
            errno.ETIMEDOUT,
            "Time out",
        ),
        (KeyError("target_nqn"), BackendError, errno.EINVAL, "KeyError: 'target_nqn'"),
        (OSError(errno.ENODEV, "gone"), BackendError, errno.ENODEV, "gone"),
        (NotImplementedError(), BackendError, errno.EOPNOTSUPP, "not offered by os-brick"),
        (RuntimeError("two\nlines"), BackendError, errno.EIO, "two"),
    ],
)
async def test_what_os_brick_raises_is_one_line_with_an_errno_and_without_secrets(
    backend: BrickBackend,
    source: BrickSource,
    steps: Steps,
    nothing_left: None,
    raised: Exception,
    kind: type[BackendError],
    number: int,
    text: str,
) -> None:
    steps.failing["connect"] = raised
    with raises(number) as caught:
        await backend.open(source, writable=True)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"brick:{PROTOCOL}/volume-1: connect: ")
    assert message.endswith(text)
    assert SECRET not in message


async def test_a_connect_that_fails_when_all_is_done_is_undone(
    backend: BrickBackend, source: BrickSource, steps: Steps, nothing_left: None
) -> None:
    steps.failing_late["connect"] = exception.BrickException("not readable")
    with raises(errno.EIO):
        await backend.open(source, writable=True)
    assert steps.calls == ["connect", "disconnect"]


@pytest.mark.parametrize("path", [None, "", 7, object()])
async def test_a_connector_that_gives_no_path_is_refused(
    backend: BrickBackend, source: BrickSource, steps: Steps, nothing_left: None, path: object
) -> None:
    steps.answer["path"] = path
    with raises(errno.EOPNOTSUPP):
        await backend.open(source, writable=True)
    assert steps.calls == ["connect", "disconnect"]


@pytest.mark.parametrize("path", ["/dev/null", "/nowhere/at/all"])
async def test_what_cannot_be_opened_is_disconnected(
    backend: BrickBackend, source: BrickSource, steps: Steps, nothing_left: None, path: str
) -> None:
    steps.answer["path"] = path
    with raises(errno.ENOTBLK if path == "/dev/null" else errno.ENOENT):
        await backend.open(source, writable=True)
    with raises(errno.ENOTBLK if path == "/dev/null" else errno.ENOENT):
        await backend.stat(source)
    assert steps.calls == ["connect", "disconnect"] * 2


async def test_without_a_journal_nothing_is_connected(
    backend: BrickBackend, source: BrickSource, steps: Steps, runtime: Path
) -> None:
    os.mkdir(runtime, mode=0o700)
    (runtime / "journal").write_text("in the way")
    with pytest.raises(BackendError, match="journal"):
        await backend.open(source, writable=True)
    assert steps.calls == []


async def test_a_connection_that_comes_too_late_is_taken_down(
    source: BrickSource, steps: Steps, nothing_left: None
) -> None:
    backend = BrickBackend("brick", BrickSettings(connect_timeout=0.2))
    with steps.hold("connect"), pytest.raises(BackendTimeout, match=r"connect: no answer within 0\.2 s"):
        await backend.open(source, writable=True)
    await trio.to_thread.run_sync(
        lambda: wait_until(lambda: steps.calls == ["connect", "disconnect"], "it is disconnected")
    )
    await trio.to_thread.run_sync(lambda: wait_until(lambda: not steps.connected(), "it is gone"))
    await settled(steps.directory.parent / "volfs")


async def settled(runtime: Path) -> None:
    """Until the threads that were given up have done their last."""
    await trio.to_thread.run_sync(lambda: wait_until(lambda: not records(runtime), "the record is gone"))


async def test_a_cancelled_open_leaves_nothing(
    backend: BrickBackend, source: BrickSource, steps: Steps, nothing_left: None, runtime: Path
) -> None:
    with steps.hold("connect"):
        with trio.move_on_after(0.1) as scope:
            await backend.open(source, writable=True)
        assert scope.cancelled_caught
    await settled(runtime)
    async with await backend.open(source, writable=True) as volume:
        assert await volume.pread(0, 1) == b"\0"


async def test_a_disconnect_that_hangs_is_completed_in_the_background(
    source: BrickSource, steps: Steps, nothing_left: None, runtime: Path
) -> None:
    backend = BrickBackend("brick", BrickSettings(connect_timeout=0.2))
    volume = await backend.open(source, writable=True)
    with steps.hold("disconnect"):
        with pytest.raises(BackendTimeout, match=r"disconnect: no answer within 0\.2 s"):
            await volume.aclose()
        with pytest.raises(BackendTimeout):  # it is not connected from under the disconnect
            await backend.open(source, writable=True)
        assert steps.calls == ["connect", "disconnect"]
    await settled(runtime)


async def test_a_disconnect_that_fails_is_told_and_left_to_the_next_start(
    backend: BrickBackend, source: BrickSource, steps: Steps, runtime: Path, nothing_left: None
) -> None:
    volume = await backend.open(source, writable=True)
    steps.failing["disconnect"] = CHAINED
    with pytest.raises(BackendError, match=r"disconnect: Volume path /dev/sda was not removed in time\."):
        await volume.aclose()
    assert steps.connected() == ["connected-disk"]
    (left,) = journal.orphans()
    with pytest.raises(BackendError):
        await clean_up(left.facts)
    steps.failing.clear()
    await clean_up(left.facts)
    left.remove()


async def test_cleaning_up_leaves_what_somebody_uses(
    backend: BrickBackend, source: BrickSource, steps: Steps, runtime: Path, nothing_left: None
) -> None:
    """A daemon was killed, and another one has the volume open when a third starts."""
    async with await backend.open(source, writable=True) as volume:
        (facts,) = records(runtime)
        journal.record("brick", facts).release()
        (orphan,) = journal.orphans()
        await clean_up(orphan.facts)
        orphan.remove()
        assert steps.connected() == ["connected-disk"]
        assert await volume.pread(0, 1) == b"\0"


# ---- file systems ----------------------------------------------------------------------------------------------


@pytest.fixture
def share(tmp_path: Path, runtime: Path) -> Iterator[dict[str, Any]]:
    """A connection info of type nfs. What is mounted is a directory of this machine: mount(8) is told so."""
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can mount")
    export = tmp_path / "export"
    export.mkdir()
    for name in ("one", "two"):
        (export / name).write_bytes(random_bytes(SIZE))
    data = {
        "export": str(export),
        "name": "one",
        "options": "-o bind",
        "mount_point_base": "/var/lib/nova/mnt",
    }
    yield {"driver_volume_type": "nfs", "data": data}
    for path in mounts(runtime):  # of a test that failed
        subprocess.run(["umount", "-l", path], check=True)


def mounts(runtime: Path) -> list[str]:
    found = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [path for path in found if path.startswith(str(runtime))]


async def test_a_share_is_mounted_while_a_volume_of_it_is_open(
    backend: BrickBackend, share: dict[str, Any], runtime: Path
) -> None:
    async with await backend.open(parsed(share), writable=True) as one:
        share["data"]["name"] = "two"
        async with await backend.open(parsed(share), writable=False) as two:
            assert await two.pread(0, 100) == await one.pread(0, 100) == random_bytes(100)
            assert len(mounts(runtime)) == 1
        assert len(mounts(runtime)) == 1
        assert (await one.extents(0, SIZE))[0].length == SIZE
        await one.pwrite(3, b"new")
    assert mounts(runtime) == []
    assert records(runtime) == []
    assert list((runtime / "mounts").iterdir()) == []
    one = await trio.Path(share["data"]["export"], "one").read_bytes()
    assert one[3:6] == b"new"


async def test_a_file_that_the_share_has_not_is_not_found(
    backend: BrickBackend, share: dict[str, Any], runtime: Path
) -> None:
    share["data"]["name"] = "three"
    with pytest.raises(VolumeNotFound):
        await backend.stat(parsed(share))
    assert mounts(runtime) == []


async def test_a_share_that_cannot_be_mounted_leaves_nothing(
    backend: BrickBackend, share: dict[str, Any], runtime: Path
) -> None:
    share["data"]["export"] += "/nowhere"
    with pytest.raises(BackendError, match=r"connect: mount: .*nowhere"):
        await backend.stat(parsed(share))
    assert records(runtime) == []
    assert list((runtime / "mounts").iterdir()) == []


# ---- the daemon ------------------------------------------------------------------------------------------------


def test_a_killed_daemon_leaves_nothing_after_the_next_start(
    share: dict[str, Any], runtime: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    env = {"XDG_RUNTIME_DIR": str(runtime.parent)}
    info = runtime.parent / "info.json"
    info.write_text(json.dumps(share))
    for round in range(2):
        place = tmp_path_factory.mktemp("d")
        with mounted(place, [], ["--config", str(write_config(place))], env) as mount:
            assert mounts(runtime) == []
            assert records(runtime) == []
            assert ("cleaned up" in mount.log) == bool(round)
            done = mount.volfs("attach", "--connection-info", info)
            assert done.returncode == 0, done.stderr
            path = Path(done.stdout.strip())
            assert path.name == "one"
            assert mounts(runtime) == [], "attached, not open"
            facts = mount.volfs("info", path).stdout
            assert "brick:nfs/one" in facts
            with closed_at_last(path) as file:
                assert os.read(file, 100) == random_bytes(100)
                assert len(mounts(runtime)) == 1
                if not round:
                    mount.process.kill()
                    mount.process.wait()
            if round:
                wait_until(lambda: not mounts(runtime), "it is disconnected at the last close")


@contextmanager
def closed_at_last(path: Path) -> Iterator[int]:
    """A file of a daemon that may be gone when it is closed."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        with suppress(OSError):
            os.close(file)


def write_config(directory: Path) -> Path:
    path = directory / "volfs.toml"
    path.write_text("[backends.san]\ndriver = 'brick'\nprotocols = ['nfs']\n")
    return path


@pytest.mark.slow
def test_images_are_opened_after_os_brick_was_loaded(
    mount: Callable[..., Mount],
    make_volume: Callable[..., StoredVolume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """os-brick loads python-rbd, for which the rbd driver has to be prepared first."""
    connected, image, data = make_volume("brick", MIB), make_volume("rbd", MIB), random_bytes(MIB)
    assert isinstance(connected, BrickVolume)
    image.write(data)
    for name, value in image.environment.items():
        monkeypatch.setenv(name, value)
    socket = str(mount().socket)
    info = {"driver_volume_type": "gpfs", "data": {"device_path": str(connected.device), "volume_id": "disk"}}
    with open_volume(info, socket_path=socket) as file:
        assert file.read(1)
    with open_volume(image.url, socket_path=socket) as file:
        assert file.read() == data
