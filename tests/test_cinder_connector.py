"""os-brick connectors that volfs serves: made by os-brick's own factory, on real volumes, as Cinder calls them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from connectors import connector as os_bricks
from connectors import processutils, set_up_os_brick
from migrations import dd
from mounts import Mount, mounted, wait_until
from os_brick import exception, utils
from services import MIB, TOP
from volumes import Storage, StoredVolume, ceph_environment, cinder_data, random_bytes, sha256

from volfs import api
from volfs.cinder import connector

SIZE = 4 * MIB
DATA = random_bytes(SIZE)
CLASSES = {"rbd": connector.RbdConnector, "iscsi": connector.IscsiConnector}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    set_up_os_brick()
    with mounted(tmp_path_factory.mktemp("m"), ()) as mount:
        yield mount


@pytest.fixture(scope="module", params=["rbd", "iscsi"])
def stored(request: pytest.FixtureRequest, module_storage: Storage) -> StoredVolume:
    return module_storage.make(request.param, SIZE)


@pytest.fixture
def volume(stored: StoredVolume, daemon: Mount, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredVolume]:
    """One with DATA on it. At the end of a test nobody has it open, and nothing is attached."""
    stored.write(DATA)
    monkeypatch.setenv("VOLFS_SOCKET", str(daemon.socket))
    for name, value in stored.environment.items():
        monkeypatch.setenv(name, value)
    yield stored
    assert stored.users() == []
    status = api.status()
    assert (status.attached, status.open) == ([], [])


@pytest.fixture
def made(volume: StoredVolume, monkeypatch: pytest.MonkeyPatch) -> connector.VolfsConnector:
    """What os-brick's factory makes when told of our class, with all that Cinder passes to it."""
    ours = CLASSES[volume.driver]
    mapping = os_bricks._connector_mapping_linux
    monkeypatch.setitem(mapping, volume.driver.upper(), f"{ours.__module__}.{ours.__name__}")
    conn = os_bricks.InitiatorConnector.factory(
        volume.driver, "sudo", use_multipath=False, device_scan_attempts=3, do_local_attach=True
    )
    assert isinstance(conn, ours)
    return conn


def test_what_is_connected_is_a_path_that_dd_reads_and_writes(
    volume: StoredVolume, made: connector.VolfsConnector, tmp_path: Path
) -> None:
    """And after the disconnect the storage knows of nobody who has it open: Cinder removes a source at once."""
    data, copy = cinder_data(volume), tmp_path / "copy"
    device = made.connect_volume(data)
    path = device["path"]
    assert isinstance(path, str)
    assert made.check_valid_device(path)
    assert made.check_valid_device(path, run_as_root=False)
    dd(f"if={path}", f"of={copy}", "bs=1M", "iflag=direct")
    assert copy.read_bytes() == DATA
    copy.write_bytes(DATA[::-1])
    dd(f"if={copy}", f"of={path}", "bs=1M", "oflag=direct")
    made.disconnect_volume(data, device)
    assert volume.users() == []
    assert not os.path.exists(path)
    assert volume.sha256() == sha256(DATA[::-1])
    assert made.check_valid_device(path, run_as_root=False) is False


def test_a_blank_volume_stays_as_small_as_what_is_written(
    volume: StoredVolume, daemon: Mount, tmp_path: Path
) -> None:
    """Whatever its storage can tell: dd's holes are taken for written, where the caller says that they are zeros."""
    volume.write(bytes(SIZE))
    sparse = tmp_path / "sparse"
    sparse.write_bytes(bytes(SIZE - MIB) + DATA[:MIB])
    made = CLASSES[volume.driver]("sudo", blank=True)
    device = made.connect_volume(cinder_data(volume))
    volume.write(b"not zero", MIB)  # which breaks the promise, so as to show that nothing was written there
    dd(f"if={sparse}", f"of={device['path']}", "bs=1M", "oflag=direct", "conv=sparse")
    made.disconnect_volume(cinder_data(volume), device)
    assert volume.read() == bytes(MIB) + b"not zero" + bytes(SIZE - 2 * MIB - 8) + DATA[:MIB]


def test_each_connect_owes_a_disconnect(volume: StoredVolume, made: connector.VolfsConnector) -> None:
    data = cinder_data(volume)
    assert made.get_volume_paths(data) == []
    devices = [made.connect_volume(data) for _ in range(2)]
    (path,) = {device["path"] for device in devices}
    assert made.get_volume_paths(data) == [path]
    assert path in made.get_all_available_volumes()
    made.disconnect_volume(data, devices[0])
    assert Path(path).read_bytes() == DATA
    made.disconnect_volume(data, devices[1])
    assert made.get_volume_paths(data) == []


def test_a_disconnect_waits_for_a_program_that_still_writes(
    volume: StoredVolume, made: connector.VolfsConnector
) -> None:
    data = cinder_data(volume)
    device = made.connect_volume(data)
    with holder(device["path"]) as process, ThreadPoolExecutor() as threads:
        disconnect = threads.submit(made.disconnect_volume, data, device)
        assert api.status().open
        process.communicate(b"late bytes")
        disconnect.result(30)
    assert volume.read()[:10] == b"late bytes"


def test_what_stays_open_stays_connected(volume: StoredVolume, daemon: Mount) -> None:
    """The error names who has it open. With `force` the volume goes when that program does."""
    made, data = CLASSES[volume.driver]("sudo", detach_seconds=0.3), cinder_data(volume)
    device = made.connect_volume(data)
    with holder(device["path"]) as process:
        with pytest.raises(exception.BrickException, match=f"still open by process {process.pid}"):
            made.disconnect_volume(data, device)
        made.disconnect_volume(data, device, ignore_errors=True)
        assert made.get_volume_paths(data) == [device["path"]]
        with pytest.raises(exception.BrickException, match="still open"):
            made.disconnect_volume(data, device, force=True)
        assert made.get_volume_paths(data) == [device["path"]]
        process.communicate()
    wait_until(lambda: made.get_volume_paths(data) == [], "it is detached", 10)


def holder(path: str) -> subprocess.Popen[bytes]:
    """A program that has the volume open, and writes what comes from stdin at its end."""
    code = (
        "import os, sys; file = os.open(sys.argv[1], os.O_RDWR); print(flush=True)\n"
        "os.write(file, sys.stdin.buffer.read())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def test_a_volume_of_a_process_that_died_is_let_go(
    volume: StoredVolume, made: connector.VolfsConnector
) -> None:
    data = cinder_data(volume)
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import ast, signal, sys\n"
        "from volfs.cinder import connector\n"
        f"made = connector.{type(made).__name__}('sudo')\n"
        "print(made.connect_volume(ast.literal_eval(sys.argv[1]))['path'], flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, repr(data)], stdout=subprocess.PIPE, text=True, cwd=TOP
    ) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert made.get_volume_paths(data) == [path]
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: made.get_volume_paths(data) == [], "it is detached", 10)


def test_what_another_process_connected_is_disconnected_by_its_path(
    volume: StoredVolume, made: connector.VolfsConnector
) -> None:
    """As after a restart of whoever connected it, if it is still there; and once more, when it is not."""
    data = cinder_data(volume)
    attached, client = api.attach({"driver_volume_type": volume.driver, "data": data})
    client.close()
    for device in ({"type": "block", "path": attached.path}, {"type": "block", "path": attached.path}, None):
        made.disconnect_volume(data, device)
        assert made.get_volume_paths(data) == []


def test_an_encryptor_has_a_link_of_a_short_name(
    volume: StoredVolume, made: connector.VolfsConnector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However long the path is: with "crypt-" before it, it is to be one of the device mapper's."""
    monkeypatch.setattr(utils, "CUSTOM_LINK_PREFIX", f"{tmp_path}/os-brick")
    data = cinder_data(volume) | {"encrypted": True}
    device = made.connect_volume(data)
    link = Path(device["path"])
    assert len(link.name) < 60
    assert [str(link.readlink())] == made.get_volume_paths(data)
    link.unlink()
    link.symlink_to("/dev/mapper/crypt")  # the encryptor's work
    made.disconnect_volume(data | {"device_path": str(link)}, device)
    assert list(tmp_path.glob("os-brick*")) == []
    assert made.get_volume_paths(data) == []


def test_a_link_that_cannot_be_made_for_an_encryptor_leaves_nothing_connected(
    volume: StoredVolume, made: connector.VolfsConnector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(utils, "CUSTOM_LINK_PREFIX", f"{tmp_path}/nowhere/os-brick")
    data = cinder_data(volume) | {"encrypted": True}
    with pytest.raises((OSError, exception.BrickException, processutils.ProcessExecutionError)):
        made.connect_volume(data)
    assert made.get_volume_paths(data) == []


def test_a_new_size_is_told(volume: StoredVolume, made: connector.VolfsConnector) -> None:
    data = cinder_data(volume)
    device = made.connect_volume(data)
    try:
        assert made.extend_volume(data) == SIZE
        volume.resize(2 * SIZE)
        assert made.extend_volume(data) == 2 * SIZE
        assert os.stat(device["path"]).st_size == 2 * SIZE
    finally:
        made.disconnect_volume(data, device)
        volume.resize(SIZE)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"name": "volumes/gone"}, exception.BrickException, "volfs: rbd: connect: .*volumes/gone"),
        ({"name": 5}, exception.InvalidParameterValue, "volfs: rbd: connect: .*data.name: expected"),
    ],
    ids=["gone", "wrong"],
)
def test_errors_are_os_bricks_with_our_words(
    daemon: Mount,
    module_storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.setenv("VOLFS_SOCKET", str(daemon.socket))
    some = module_storage.make("rbd", MIB)
    for name, value in ceph_environment(module_storage.services).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words):
        connector.RbdConnector("sudo").connect_volume(cinder_data(some) | change)


def test_without_a_daemon_there_are_no_paths(tmp_path: Path) -> None:
    """And none is started to say so."""
    began = time.monotonic()
    made = connector.RbdConnector("sudo", socket_path=str(tmp_path / "none"))
    assert made.get_volume_paths({"name": "a/b"}) == []
    assert made.get_all_available_volumes() == []
    assert time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_it_is_loaded_by_a_program_that_runs_on_eventlet() -> None:
    """As cinder-volume does: it has its own sockets then, which trio would not be loaded with."""
    load = "import eventlet, sys; eventlet.monkey_patch(); import volfs.cinder.connector"
    program = f"{load}; print('trio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
