"""open_volume and close_volume: what they return, what they leave behind, and who may come in between."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
from fakes import fake_daemon
from mounts import Mount, is_mounted, mounted, require_fuse, wait_until
from services import MIB, Services
from test_architecture import HEAVY
from volumes import Storage, StoredVolume, ceph_environment, cinder_data, random_bytes

import volfs
from volfs import api, control
from volfs.control import Attached, Done, StatusReply, Welcome, encode
from volfs.errors import BackendError, ControlError, MountError, SourceError, VolfsError, VolumeNotFound

SIZE = MIB
# Text, so that it can be read as such.
DATA = base64.encodebytes(random_bytes(SIZE))[:SIZE]

Opener = Callable[..., IO[Any]]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One for all tests here. It serves no backend, so that all comes by attaching."""
    with mounted(tmp_path_factory.mktemp("api"), ()) as mount:
        yield mount


@pytest.fixture
def served(daemon: Mount, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    """The daemon is this process's own, and has nothing attached or open at the end of the test."""
    monkeypatch.setenv("VOLFS_SOCKET", str(daemon.socket))
    yield daemon
    wait_until(lambda: is_idle(daemon), f"nothing attached or open: {status(daemon)}")


@pytest.fixture(scope="module", params=["file", "rbd"])
def stored(request: pytest.FixtureRequest, module_storage: Storage) -> StoredVolume:
    """One of each driver: to make and remove them takes longer than most tests here."""
    return module_storage.make(request.param, SIZE)


@pytest.fixture
def volume(stored: StoredVolume, served: Mount, monkeypatch: pytest.MonkeyPatch) -> StoredVolume:
    """A volume with DATA on it."""
    stored.write(DATA)
    for key, value in stored.environment.items():
        monkeypatch.setenv(key, value)
    return stored


@pytest.fixture
def raw(served: Mount, volumes: Path) -> str:
    """The URL of a volume with DATA on it, for what does not depend on the driver."""
    (volumes / "raw").write_bytes(DATA)
    return f"file:{volumes}/raw"


def status(daemon: Mount) -> StatusReply:
    return api.status(socket_path=str(daemon.socket))


def is_idle(daemon: Mount) -> bool:
    reply = status(daemon)
    return not reply.attached and not reply.open


def path_of(file: IO[Any]) -> Path:
    return Path(file.name)


# What it returns

MODES = [
    ("rb", -1),
    ("rb", 0),
    ("rb", 4096),
    ("r+b", -1),
    ("rb+", 0),
    ("wb", -1),
    ("wb", 0),
    ("w+b", 512),
    ("ab", -1),
    ("ab", 0),
    ("a+b", -1),
    ("r", -1),
    ("rt", -1),
    ("r+", -1),
    ("w", 1),
    ("a", -1),
    ("r", 100),
]


def layers(file: IO[Any]) -> list[IO[Any]]:
    """The file object and those below it."""
    found = [file]
    for name in ("buffer", "raw"):
        below = getattr(found[-1], name, None)
        found += [below] if below is not None else []
    return found


@pytest.mark.parametrize(("mode", "buffering"), MODES)
def test_is_what_open_returns(raw: str, mode: str, buffering: int) -> None:
    with volfs.open_volume(raw, mode, buffering) as file, open(file.name, mode, buffering) as plain:
        for ours, builtin in zip(layers(file), layers(plain), strict=True):
            assert isinstance(ours, type(builtin))
            assert type(ours) is type(builtin) or isinstance(builtin, io.FileIO)
            for key in ("name", "mode", "closed", "encoding", "errors", "newlines", "line_buffering"):
                assert getattr(ours, key, None) == getattr(builtin, key, None), key
            for ability in ("readable", "writable", "seekable", "isatty", "tell"):
                assert getattr(ours, ability)() == getattr(builtin, ability)(), ability
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
        assert not os.get_inheritable(file.fileno())


@pytest.mark.parametrize("how", [{"mode": "rb"}, {"mode": "rb", "buffering": 0}, {}])
def test_reads(volume: StoredVolume, how: dict[str, Any]) -> None:
    with volfs.open_volume(volume.url, **how) as file:
        assert file.read() == DATA
        assert file.read(1) == b""
        assert file.seek(1000) == 1000
        assert file.read(500) == DATA[1000:1500]
        assert file.seek(0, os.SEEK_END) == SIZE
    assert file.closed


def test_reads_text_as_open_does(raw: str) -> None:
    with volfs.open_volume(raw, "r") as file:
        assert file.readline() == DATA.decode().partition("\n")[0] + "\n"
        assert [*file] == DATA.decode().splitlines(keepends=True)[1:]


@pytest.mark.parametrize("mode", ["r+b", "wb", "w+b"])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_what_was_written_is_on_the_storage_when_close_volume_returns(
    volume: StoredVolume, served: Mount, mode: str, buffering: int
) -> None:
    """Also by `wb`: the size is the volume's, nothing is cut off, and what the program skips is zeros."""
    file = volfs.open_volume(volume.url, mode, buffering)
    file.seek(1000)
    file.write(b"volfs was here")
    assert volume.users()
    volfs.close_volume(file)
    assert volume.users() == []
    assert is_idle(served)
    before = bytes(1000) if "w" in mode else DATA[:1000]
    assert volume.read() == before + b"volfs was here" + DATA[1014:]


def test_text_is_written_too(raw: str) -> None:
    with volfs.open_volume(raw, "r+") as file:
        file.write("grüße")
    with volfs.open_volume(raw, "r") as file:
        assert file.read(5) == "grüße"


@pytest.mark.parametrize("buffering", [-1, 0])
def test_appending_to_a_volume_finds_no_room(raw: str, buffering: int) -> None:
    file = volfs.open_volume(raw, "ab", buffering)

    def write_all() -> None:
        file.write(b"more")
        file.close()

    with pytest.raises(OSError, match="No space left") as caught:
        write_all()
    assert caught.value.errno == errno.ENOSPC
    file.close()


@pytest.mark.parametrize(
    ("mode", "buffering"),
    [
        ("", -1),
        ("b", -1),
        ("rw", -1),
        ("rbb", -1),
        ("rbt", -1),
        ("r++", -1),
        ("z", -1),
        ("Ub", -1),
        ("r", 0),
    ],
)
def test_a_mode_that_open_refuses_is_refused_by_the_same_error(
    raw: str, served: Mount, mode: str, buffering: int
) -> None:
    messages = []
    for opener, name in ((open, raw.removeprefix("file:")), (volfs.open_volume, raw)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared
            opener(name, mode, buffering)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert is_idle(served)


def test_a_volume_is_not_made(raw: str, served: Mount) -> None:
    with pytest.raises(FileExistsError):
        volfs.open_volume(raw, "xb")
    assert is_idle(served)


# Closing


@pytest.mark.parametrize(("mode", "buffering"), [("rb", -1), ("rb", 0), ("r+b", -1), ("r", -1)])
def test_closing_again_is_harmless(raw: str, mode: str, buffering: int) -> None:
    file = volfs.open_volume(raw, mode, buffering)
    volfs.close_volume(file)
    volfs.close_volume(file)
    file.close()
    with volfs.open_volume(raw, mode, buffering) as file:
        file.close()


def test_closing_somebody_elses_file_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as plain, io.BytesIO() as memory:
        for file in (plain, memory, plain.raw, None):
            with pytest.raises(ValueError, match=r"was not opened by open_volume$"):
                volfs.close_volume(file)  # type: ignore[arg-type]
        assert not plain.closed
        assert not memory.closed


def test_an_exception_in_the_block_closes_and_detaches(volume: StoredVolume, served: Mount) -> None:
    with pytest.raises(ZeroDivisionError), volfs.open_volume(volume.url, "r+b"):
        raise ZeroDivisionError
    assert volume.users() == []
    assert is_idle(served)


def test_a_file_that_is_only_dropped_is_closed_and_detached(raw: str, served: Mount) -> None:
    with pytest.warns(ResourceWarning, match="unclosed file"):
        volfs.open_volume(raw)
    assert is_idle(served)


def test_threads_that_close_at_once(raw: str, served: Mount) -> None:
    for _ in range(5):
        file = volfs.open_volume(raw, "rb", 0)
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(volfs.close_volume, file) for _ in range(8)]:
                done.result()
        assert is_idle(served)


def test_a_program_that_ends_without_closing_loses_nothing(volume: StoredVolume, served: Mount) -> None:
    script = "import sys, volfs; file = volfs.open_volume(sys.argv[1], 'r+b'); file.write(b'last words')"
    done = subprocess.run([sys.executable, "-c", script, volume.url], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    wait_until(lambda: is_idle(served), f"detached: {status(served)}")
    assert volume.users() == []
    assert volume.read() == b"last words" + DATA[10:]


# Who else has it


def test_the_same_volume_twice_is_one_attachment(volume: StoredVolume, served: Mount) -> None:
    with volfs.open_volume(volume.url) as first:
        with volfs.open_volume(volume.url, "r+b") as second:
            assert first.name == second.name
            (attached,) = status(served).attached
            assert (attached.source, attached.size) == (volume.url, SIZE)
            assert (attached.leases, attached.handles) == (2, 2)
            assert len(status(served).open) == 1
            second.write(b"x")
            second.flush()
            assert first.read(1) == b"x"
        assert first.read(9) == DATA[1:10]
        assert status(served).attached[0].leases == 1


def test_its_name_is_the_volumes_own_unless_given(raw: str, served: Mount) -> None:
    with volfs.open_volume(raw) as own, volfs.open_volume(raw, name="other name") as other:
        assert path_of(own) == served.path / "attached" / "raw"
        assert path_of(other) == served.path / "attached" / "other name"
        assert own.read() == other.read()
        assert len(status(served).attached) == 2
        assert len(status(served).open) == 1  # the storage sees one user


@pytest.mark.timeout(30)  # less than api.CLOSE_SECONDS
def test_closing_does_not_wait_for_a_plain_open_of_the_same_program(raw: str, served: Mount) -> None:
    """Only for the handle that it closes; the volume stays as long as the other one."""
    file = volfs.open_volume(raw)
    with open(file.name, "rb") as plain:
        assert plain.read(10) == DATA[:10]
        volfs.close_volume(file)
        assert [it.handles for it in status(served).attached] == [1]
        assert plain.read() == DATA[10:]


def test_a_name_of_another_volume_is_refused(raw: str, volumes: Path, served: Mount) -> None:
    (volumes / "second").write_bytes(b"second")
    with volfs.open_volume(raw, name="taken") as file:
        before = status(served).attached
        with pytest.raises(VolfsError) as caught:
            volfs.open_volume(f"file:{volumes}/second", name="taken")
        assert (caught.value.errno, str(caught.value)) == (
            errno.EEXIST,
            f"attached/taken is {raw} already",
        )
        assert status(served).attached == before
        assert file.read() == DATA


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\0b", "x" * 256])
def test_a_name_that_no_file_can_have_is_refused(raw: str, name: str) -> None:
    with pytest.raises(SourceError, match="expected a file name"):
        volfs.open_volume(raw, name=name)


def test_from_many_threads(make_volume: Callable[..., StoredVolume], served: Mount) -> None:
    made = [make_volume("file", 65536, bytes([number]) * 65536) for number in range(4)]

    def work(number: int) -> None:
        for turn in range(5):
            which = (number + turn) % len(made)
            with volfs.open_volume(made[which].url, "r+b") as file:
                assert file.read() == bytes([which]) * 65536
                file.seek(number * 100)
                file.write(bytes([which]) * 100)

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, number) for number in range(16)]:
            done.result()
    assert is_idle(served)
    assert [volume.read() for volume in made] == [bytes([number]) * 65536 for number in range(4)]


CALLER = """if True:
    import sys, volfs
    file = volfs.open_volume(sys.argv[1], sys.argv[2])
    file.read(1)
    print("open", flush=True)
    sys.stdin.read()
"""


def start_caller(url: str, mode: str) -> subprocess.Popen[str]:
    """Another process that has the volume open until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, url, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rb", "r+b"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_caller_leaves_nothing_attached(
    volume: StoredVolume, served: Mount, mode: str, number: signal.Signals
) -> None:
    with start_caller(volume.url, mode) as process:
        assert len(status(served).attached) == 1
        process.send_signal(number)
        process.wait()
        wait_until(lambda: is_idle(served), f"detached: {status(served)}")
    assert volume.users() == []


def test_a_killed_caller_leaves_others_their_volume(raw: str, served: Mount) -> None:
    with volfs.open_volume(raw) as file, start_caller(raw, "r+b") as process:
        assert status(served).attached[0].leases == 2
        process.kill()
        process.wait()
        wait_until(lambda: status(served).attached[0].handles == 1, "the other's handle is released")
        assert status(served).attached[0].leases == 1
        assert file.read() == DATA


FORKING = """if True:
    import os, sys, volfs
    from volfs import api
    with volfs.open_volume(sys.argv[1], "r+b") as file:
        child = os.fork()
        if not child:
            if sys.argv[2] == "closes":
                volfs.close_volume(file)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        (attached,) = api.status().attached
        assert (attached.leases, attached.handles) == (1, 1), attached
        file.write(b"parent")
        file.flush()
        file.seek(0)
        print(file.read(9))
"""


@pytest.mark.parametrize("how", ["closes", "exits"])
def test_a_forked_child_does_not_detach_its_parents_volume(raw: str, served: Mount, how: str) -> None:
    command = [sys.executable, "-c", FORKING, raw, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{b'parent' + DATA[6:9]!r}\n", "")
    assert is_idle(served)


def test_a_caller_loads_no_event_loop_and_no_storage_library(volume: StoredVolume) -> None:
    script = "import sys, volfs; volfs.open_volume(sys.argv[1]).close(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, volume.url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {name.partition(".")[0] for name in done.stdout.split()} & HEAVY == set()


# What is wrong


@pytest.mark.parametrize(
    ("source", "cls", "message"),
    [
        ("", SourceError, "not a volume's URL"),
        ("nbd:x", SourceError, "not a volume's URL"),
        ("/dev/null", SourceError, "not a volume's URL"),
        ("rbd:x", SourceError, "rbd:x: expected rbd:POOL"),
        ("file:x", SourceError, "expected file:/PATH"),
        ("file:/nowhere/at/all", VolumeNotFound, "/nowhere/at/all: no such file"),
        ("file:/dev/null", VolumeNotFound, "/dev/null: not a regular file"),
        ("file:/etc", VolumeNotFound, "/etc: not a regular file"),
        ("block:/etc/passwd", VolumeNotFound, "/etc/passwd: not a block device"),
        ("block:/dev/null", VolumeNotFound, "/dev/null: not a block device"),
        ("file:/tmp/\udcff", SourceError, "expected"),
        ("file:/\0", SourceError, r"file:/\\x00: expected file:/PATH"),
        ({}, SourceError, "driver_volume_type: expected"),
        ({"driver_volume_type": "smbfs", "data": {}}, SourceError, "no driver for 'smbfs'"),
        ({"driver_volume_type": "local", "data": {}}, SourceError, "data.device_path: expected"),
        ({"driver_volume_type": "local", "data": {"device_path": object()}}, SourceError, "expected"),
        ({"driver_volume_type": "local", "data": {"device_path": "/\udcff"}}, SourceError, "expected"),
        ({"driver_volume_type": "local", 5: {}}, SourceError, "expected"),
        (None, SourceError, "expected a URL or a connection info, not NoneType"),
        (5, SourceError, "expected a URL or a connection info, not int"),
        (["file:/x"], SourceError, "expected a URL or a connection info, not list"),
        (b"file:/x", SourceError, "expected a URL or a connection info, not bytes"),
    ],
    ids=repr,
)
def test_what_is_no_source(served: Mount, source: Any, cls: type[VolfsError], message: str) -> None:
    with pytest.raises(cls, match=message):
        volfs.open_volume(source)
    assert is_idle(served)


def test_a_source_beyond_the_longest_message(served: Mount) -> None:
    with pytest.raises(SourceError, match=rf"expected a source of at most {control.MAX_MESSAGE} bytes, not "):
        volfs.open_volume("file:/" + "x" * control.MAX_MESSAGE)


@pytest.mark.parametrize("url", ["rbd:nosuch/x", "rbd:volumes/nosuch", "rbd:volumes/nosuch/x"])
def test_an_image_that_is_not_there(
    served: Mount, services: Services, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    for key, value in ceph_environment(services).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(VolumeNotFound, match=r"no such (pool|image|namespace)"):
        volfs.open_volume(url)
    assert is_idle(served)


def test_a_snapshot_is_read_only(
    make_volume: Callable[..., StoredVolume], served: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_volume("rbd", SIZE, DATA)
    for key, value in made.environment.items():
        monkeypatch.setenv(key, value)
    url = made.protect()
    made.write(bytes(100))
    with volfs.open_volume(url) as file:
        assert file.read() == DATA
    with pytest.raises(OSError, match="Read-only") as caught:
        volfs.open_volume(url, "r+b")
    assert caught.value.errno == errno.EROFS
    assert is_idle(served)


def test_a_user_that_ceph_refuses(
    served: Mount,
    services: Services,
    make_volume: Callable[..., StoredVolume],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    made = make_volume("rbd", SIZE)
    keyring = tmp_path / "keyring"
    keyring.write_text("[client.volfs]\nkey = AQBzMJFnAAAAABAAqpPBPTGLwBrPHqXxLBEIhA==\n")
    monkeypatch.setenv("CEPH_CONF", str(services.ceph_conf))
    monkeypatch.setenv("CEPH_ARGS", f"--id volfs --keyring {keyring}")
    with pytest.raises(BackendError) as caught:
        volfs.open_volume(made.url)
    assert caught.value.errno == errno.EACCES
    assert str(services.ceph_conf) in str(caught.value)
    assert "client.volfs" in str(caught.value)


def test_no_daemon_and_no_way_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"x: expected the path of a control socket, at most 107 bytes"):
        volfs.open_volume("file:/etc/passwd", socket_path=str(tmp_path / ("x" * 120)))
    with pytest.raises(
        ControlError, match=r"^cannot start a volfs daemon: /proc/volfs: No such file or"
    ) as caught:
        volfs.open_volume("file:/etc/passwd", socket_path="/proc/volfs/control")
    assert caught.value.errno == errno.ENOENT
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_on_no_volfs_mount_is_not_handed_out(tmp_path: Path) -> None:
    """A mount may be gone, or hidden: a writer would fill the local disk."""
    ordinary = tmp_path / "disk"
    ordinary.write_bytes(b"ordinary")
    attached = Attached(name="disk", path=str(ordinary), source="rbd:a/disk", driver="rbd", size=8, lease=7)
    welcome, heard = Welcome(mountpoint=str(tmp_path), pid=1), []
    with (
        fake_daemon(tmp_path, encode(welcome), encode(attached), encode(Done()), heard=heard) as path,
        pytest.raises(MountError) as caught,
    ):
        volfs.open_volume("rbd:a/disk", "wb", socket_path=path)
    assert (str(caught.value), caught.value.errno) == (f"{ordinary}: not on a volfs mount", errno.EINVAL)
    assert ordinary.read_bytes() == b"ordinary"
    detach = {"type": "Detach", "lease": 7, "name": None, "wait": api.CLOSE_SECONDS, "all_handles": False}
    assert json.loads(heard[2]) == detach


# Connection infos


@pytest.mark.slow
def test_connection_info_of_rbd(
    served: Mount,
    services: Services,
    make_volume: Callable[..., StoredVolume],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Cinder 29 makes it: no keyring in it, no path of a configuration. Those are the caller's."""
    made = make_volume("rbd", SIZE, DATA)
    info = {"driver_volume_type": "rbd", "data": cinder_data(made)}
    monkeypatch.setenv("CEPH_CONF", str(services.ceph_conf))
    monkeypatch.setenv("CEPH_ARGS", f"--keyring {services.keyring}")
    with volfs.open_volume(info, "r+b") as file:
        assert file.read() == DATA
        file.seek(0)
        file.write(b"by connection info")
    assert made.users() == []
    assert made.read() == b"by connection info" + DATA[18:]

    # By its monitors alone, the key given along, as older releases did.
    key = services.run("ceph", "auth", "print-key", f"client.{services.user}").decode()
    info["data"]["keyring"] = f"[client.{services.user}]\n\tkey = {key}\n"
    monkeypatch.delenv("CEPH_CONF")
    monkeypatch.delenv("CEPH_ARGS")
    with volfs.open_volume(info) as file:
        assert file.read(18) == b"by connection info"
    shown = served.log + repr(status(served))
    assert key not in shown


@pytest.mark.parametrize("access_mode", ["rw", "ro"])
def test_connection_info_of_a_local_device(
    served: Mount, loop_device: Callable[..., Path], access_mode: str
) -> None:
    device = loop_device(SIZE)
    info = {"driver_volume_type": "local", "data": {"device_path": str(device), "access_mode": access_mode}}
    with volfs.open_volume(info) as file:
        assert file.read() == bytes(SIZE)
    if access_mode == "ro":
        with pytest.raises(OSError, match="Read-only") as caught:
            volfs.open_volume(info, "r+b")
        assert caught.value.errno == errno.EROFS
        return
    with volfs.open_volume(info, "r+b") as file:
        volfs.copy_volume_data(io.BytesIO(DATA), file, SIZE, verify=True)
    assert device.read_bytes() == DATA


def test_connection_info_that_is_no_dict_but_a_mapping(
    served: Mount, loop_device: Callable[..., Path]
) -> None:
    from types import MappingProxyType

    info = {"driver_volume_type": "local", "data": {"device_path": str(loop_device(SIZE))}}
    with volfs.open_volume(MappingProxyType(info)) as file:
        assert len(file.read()) == SIZE


# On demand


@pytest.fixture
def on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The control socket of this user's own daemon, which does not run yet. It is ended after the test."""
    require_fuse()
    monkeypatch.delenv("VOLFS_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    path = tmp_path / "run" / "volfs" / "control"
    assert control.default_socket() == str(path)
    yield path
    mountpoint = Path(f"{path}.mnt")
    if is_mounted(mountpoint):
        api.unmount(str(mountpoint), force=True)
    assert not is_mounted(mountpoint)
    log = Path(f"{path}.log")
    assert not log.exists() or "Traceback" not in log.read_text(), log.read_text()


@contextlib.contextmanager
def ending(pid: int) -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds for the process to end, and tells whether it did."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        yield lambda seconds: True
        return
    try:
        yield lambda seconds: bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)


def kill(pid: int) -> None:
    with ending(pid) as ended:
        os.kill(pid, signal.SIGKILL)
        assert ended(10.0)


def test_a_daemon_is_started_when_there_is_none(on_demand: Path, volumes: Path) -> None:
    (volumes / "raw").write_bytes(DATA)
    with volfs.open_volume(f"file:{volumes}/raw") as file:
        assert file.read() == DATA
        assert path_of(file) == Path(f"{on_demand}.mnt/attached/raw")
    first = api.status()
    assert (first.mountpoint, first.attached, first.open) == (f"{on_demand}.mnt", [], [])
    for path in (on_demand, Path(f"{on_demand}.log"), Path(f"{on_demand}.lock"), on_demand.parent):
        assert path.stat().st_mode & 0o077 == 0, path
    with volfs.open_volume(f"file:{volumes}/raw"):
        assert api.status().pid == first.pid


@pytest.mark.slow
def test_ten_processes_that_race_start_one_daemon(on_demand: Path, volumes: Path) -> None:
    (volumes / "raw").write_bytes(DATA)
    script = """if True:
        import sys, volfs
        from volfs import api
        with volfs.open_volume(sys.argv[1]) as file:
            print(api.status().pid, len(file.read()))
    """
    command = [sys.executable, "-c", script, f"file:{volumes}/raw"]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    said = [process.communicate(timeout=60)[0] for process in racing]
    assert [process.returncode for process in racing] == [0] * 10
    assert set(said) == {f"{api.status().pid} {SIZE}\n"}
    wait_until(lambda: not api.status().attached, "all detached")
    daemons = [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"{on_demand}.mnt" in read_quietly(path)
    ]
    assert daemons == [str(api.status().pid)]


def read_quietly(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process ended meanwhile
        return ""


@pytest.mark.slow
def test_after_a_killed_daemon_a_new_one_is_started_in_its_place(on_demand: Path, volumes: Path) -> None:
    (volumes / "raw").write_bytes(DATA)
    url = f"file:{volumes}/raw"
    volfs.open_volume(url).close()
    first = api.status().pid
    kill(first)
    assert is_mounted(Path(f"{on_demand}.mnt"))  # left behind
    with volfs.open_volume(url) as file:
        assert file.read() == DATA
    assert api.status().pid != first


def test_a_file_of_a_killed_daemon_says_so_and_can_be_closed(on_demand: Path, volumes: Path) -> None:
    (volumes / "raw").write_bytes(DATA)
    file = volfs.open_volume(f"file:{volumes}/raw", "rb", 0)
    kill(api.status().pid)
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        file.readall()
    with pytest.raises(ControlError, match=r"is gone|ended the connection"):
        volfs.close_volume(file)
    assert file.closed
    subprocess.run(["fusermount3", "-uz", f"{on_demand}.mnt"], check=True)


@pytest.mark.slow
def test_a_daemon_that_nobody_needs_ends(
    on_demand: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "IDLE_SECONDS", 0.3)
    (volumes / "raw").write_bytes(DATA)
    with volfs.open_volume(f"file:{volumes}/raw") as file:
        pid = api.status().pid
        with ending(pid) as ended:
            assert not ended(1.0)  # while it is in use
        assert file.read() == DATA
    with ending(pid) as ended:
        assert ended(10.0)
    assert not is_mounted(Path(f"{on_demand}.mnt"))
    assert not on_demand.exists()
    volfs.open_volume(f"file:{volumes}/raw").close()
    assert api.status().pid != pid


@pytest.mark.slow
def test_a_daemon_that_cannot_start_says_why(on_demand: Path, volumes: Path) -> None:
    hidden = Path(f"{on_demand}.mnt/precious")
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    with pytest.raises(ControlError) as caught:
        volfs.open_volume(f"file:{volumes}/raw")
    assert str(caught.value) == (
        f"cannot start a volfs daemon: {hidden.parent}: expected an empty directory; its files would be hidden"
    )
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_directory_that_others_may_write_in_is_not_used(on_demand: Path, volumes: Path) -> None:
    """Anybody could put a socket, or a mountpoint, there."""
    on_demand.parent.mkdir()
    on_demand.parent.chmod(0o777)
    with pytest.raises(ControlError, match=r"others may write there \(mode 0777\)"):
        volfs.open_volume(f"file:{volumes}/raw")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("file:/\udcff", None, "expected a source of UTF-8 text"),
        (None, None, "expected a URL or a connection info, not NoneType"),
        ({"data": object()}, None, "expected a source of UTF-8 text, or of what JSON has"),
        ("nbd:x", None, "'nbd:x': not a volume's URL; expected one that begins with rbd:"),
        ("file:/x", "\udcff", r"'\\udcff': expected a file name of UTF-8 text"),
    ],
)
def test_what_is_no_source_starts_nothing(
    on_demand: Path, source: Any, name: str | None, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        volfs.open_volume(source, name=name)
    assert not on_demand.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("rbd:x", None, r"^rbd:x: expected rbd:POOL/\[NAMESPACE/\]IMAGE\[@SNAPSHOT\]$"),
        ("file:/x", "a/b", "^'a/b': expected a file name, without '/'$"),
        ({"driver_volume_type": "smbfs", "data": {}}, None, "^connection info: no driver for 'smbfs'"),
    ],
    ids=repr,
)
def test_a_source_of_wrong_syntax_starts_no_daemon_to_learn_that(
    on_demand: Path, source: Any, name: str | None, message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        volfs.open_volume(source, name=name)
    assert caught.value.errno == errno.EINVAL
    assert [path.name for path in on_demand.parent.iterdir()] == [
        "control.start"
    ]  # the lock of those who start


@pytest.mark.slow
def test_a_socket_named_by_a_relative_path(
    on_demand: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volumes / "raw").write_bytes(DATA)
    on_demand.parent.mkdir(mode=0o700)
    monkeypatch.chdir(on_demand.parent)
    with volfs.open_volume(f"file:{volumes}/raw", socket_path="control") as file:
        assert path_of(file) == Path(f"{on_demand}.mnt/attached/raw")


@pytest.mark.slow
def test_threads_that_race_start_one_daemon(on_demand: Path, volumes: Path) -> None:
    (volumes / "raw").write_bytes(DATA)
    together = threading.Barrier(4)

    def work(_: int) -> int:
        together.wait()
        with volfs.open_volume(f"file:{volumes}/raw"):
            return api.status().pid

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1
