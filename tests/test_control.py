"""The control protocol over real sockets: who may talk to the daemon, what it answers, and what it survives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from fakes import SECONDS, fake_daemon
from hypothesis import example, given
from hypothesis import strategies as st

from volfs import control, control_server
from volfs.control import (
    MAX_MESSAGE,
    PROTOCOL,
    Attach,
    Attached,
    AttachedStatus,
    Client,
    Detach,
    Done,
    Failed,
    Hello,
    OpenStatus,
    Reply,
    Request,
    Status,
    StatusReply,
    Unmount,
    Welcome,
    decode_request,
    encode,
)
from volfs.control_server import ControlServer, control_socket
from volfs.errors import ControlError, SourceError, VolfsError, VolumeNotFound
from volfs.version import VERSION

NOBODY = 65534
in_thread = trio.to_thread.run_sync

WELCOME = Welcome(mountpoint="/m", pid=1)
STATUS = StatusReply(pid=1, version=VERSION, mountpoint="/m", backends={}, attached=[], open=[], clients=1)
REQUESTS: list[Request] = [
    Hello(),
    Hello(protocol=7, version="9.9"),
    Attach(source="rbd:a/b"),
    Attach(connection_info={"driver_volume_type": "rbd", "data": {"name": "a/b"}}, name="x", hold=False),
    Attach(source="file:/ü", environment={"CEPH_CONF": "/c"}),
    Detach(lease=3, wait=0.5),
    Detach(name="x"),
    Status(),
    Unmount(force=True),
]
REPLIES: list[Reply] = [
    WELCOME,
    Attached(name="x", path="/m/attached/x", source="rbd:a/x", driver="rbd", size=1 << 60, lease=1),
    StatusReply(
        pid=1,
        version="1",
        mountpoint="/m",
        backends={"ceph": "rbd"},
        attached=[AttachedStatus(name="x", source="rbd:a/x", size=5, leases=2, handles=1)],
        open=[OpenStatus(source="rbd:a/x", size=5, writable=True, handles=1)],
        clients=2,
    ),
    Done(),
    Failed(kind="VolumeNotFound", errno=errno.ENOENT, message="rbd:a/x: no such image"),
]


@dataclass
class Serving:
    """A server of the real class, whose requests a test answers."""

    path: str
    server: ControlServer
    seen: list[Request] = field(default_factory=list)
    gone: list[control_server.Client] = field(default_factory=list)

    async def raw(self) -> trio.SocketStream:
        return await trio.open_unix_socket(self.path)

    async def client(self) -> Client:
        return await in_thread(Client, self.path)

    async def until_gone(self, number: int = 1) -> None:
        """Wait for that many goodbyes, and that there are no more."""
        with trio.fail_after(SECONDS):
            while len(self.gone) < number or self.server.clients:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert len(self.gone) == number


Answer = Callable[[control_server.Client, Request], Awaitable[Reply]]


async def answer(client: control_server.Client, request: Request) -> Reply:
    """What a daemon with nothing attached would."""
    match request:
        case Hello():
            return WELCOME
        case Status():
            return STATUS
        case Attach():
            client.leases.add(len(client.leases) + 1)
            return Attached(name="x", path="/x", source=request.source or "", driver="file", size=0, lease=1)
    return Done()


@contextlib.asynccontextmanager
async def serving(directory: Path, handle: Answer = answer) -> AsyncIterator[Serving]:
    """Serve until the end of the block, and stop then."""

    async def record(client: control_server.Client, request: Request) -> Reply:
        here.seen.append(request)
        return await handle(client, request)

    async def goodbye(client: control_server.Client) -> None:
        here.gone.append(client)

    path = str(directory / "control")
    here = Serving(path, ControlServer(record, goodbye))
    with control_socket(path) as listener, trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.server.serve, listener)
            yield here
            here.server.stop()
            await here.server.stopped.wait()


async def replies(stream: trio.SocketStream) -> list[dict[str, Any]]:
    """All that the server says until it ends the connection."""
    data = b""
    with trio.fail_after(SECONDS), contextlib.suppress(trio.BrokenResourceError):
        async for chunk in stream:
            data += chunk
    return [json.loads(line) for line in data.splitlines()]


async def one_reply(stream: trio.SocketStream) -> dict[str, Any]:
    data = b""
    with trio.fail_after(SECONDS):
        while not data.endswith(b"\n"):
            data += await stream.receive_some()
    return dict(json.loads(data))


# Messages


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda it: type(it).__name__)
def test_request_round_trip(request_: Request) -> None:
    line = encode(request_)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_request(line) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda it: type(it).__name__)
def test_reply_round_trip(reply: Reply) -> None:
    assert msgspec.json.decode(encode(reply), type=Reply) == reply


def test_every_message_is_in_the_round_trips() -> None:
    assert {type(it) for it in REQUESTS} == set(Request.__args__)
    assert {type(it) for it in REPLIES} == set(Reply.__args__)


def test_a_newer_clients_fields_are_ignored() -> None:
    assert decode_request(b'{"type":"Status","new":[1]}') == Status()


def test_secrets_of_an_attach_are_not_shown() -> None:
    request = Attach(connection_info={"data": {"keyring": "s3cret"}}, environment={"CEPH_ARGS": "s3cret"})
    assert "s3cret" not in f"{request!r} {request}"


NOT_REQUESTS = {
    "nothing": b"",
    "no-json": b"hello",
    "no-utf8": b'{"type":"Detach","name":"\xff"}',
    "no-object": b"[]",
    "no-type": b"{}",
    "other-type": b'{"type":"Attached"}',
    "wrong-type": b'{"type":7}',
    "wrong-field": b'{"type":"Detach","lease":"x"}',
    "number-too-big": b'{"type":"Detach","lease":1e999}',
    "half": b'{"type":"Sta',
    "two": b'{"type":"Status"}{"type":"Status"}',
    "nested": b"[" * 100_000,
    "nested-info": b'{"type":"Attach","connection_info":{"a":' + b"[" * 100_000,
    "lone-surrogate": b'{"type":"Detach","name":"\\ud800"}',
}


@pytest.mark.parametrize("line", NOT_REQUESTS.values(), ids=NOT_REQUESTS.keys())
def test_what_is_no_request(line: bytes) -> None:
    with pytest.raises(ControlError) as caught:
        decode_request(line)
    assert caught.value.errno == errno.EPROTO
    assert str(caught.value).startswith("not a request: ")
    assert str(caught.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({name for message in REQUESTS for name in type(message).__struct_fields__})


@given(
    line=st.binary()
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.builds(
        lambda kind, fields: json.dumps({"type": kind, **fields}).encode(),
        st.sampled_from([cls.__name__ for cls in Request.__args__]),
        st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
    )
)
@example(b'{"type":"Attach","source":"\\ud800"}')
def test_any_line_is_a_request_or_a_control_error(line: bytes) -> None:
    try:
        request = decode_request(line)
    except ControlError:
        return
    assert decode_request(encode(request)) == request or "NaN" in repr(request)


# The socket


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_its_owner_may_use_the_socket(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "run" / "volfs" / "control"
    before = os.umask(umask)
    try:
        with control_socket(str(path)):
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert mode(path) == 0o600
            assert mode(f"{path}.lock") & 0o077 == 0
            assert mode(path.parent) & 0o077 == 0
    finally:
        os.umask(before)
    assert not path.exists()


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777, 0o1777, 0o720, 0o702])
def test_directory_that_others_may_write_in_is_refused(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)
    with pytest.raises(ControlError) as caught, control_socket(str(tmp_path / "control")):
        pass
    assert str(caught.value) == f"{tmp_path}: others may write there (mode {bits:04o})"
    assert caught.value.errno == errno.EPERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(ControlError) as caught, control_socket(str(tmp_path / "control")):
        pass
    assert (str(caught.value), caught.value.errno) == (
        f"{tmp_path}: expected a directory of user {os.geteuid()}",
        errno.EPERM,
    )


def test_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with (
        pytest.raises(ControlError, match="expected a directory of user"),
        control_socket(str(tmp_path / "link" / "control")),
    ):
        pass


def test_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ControlError) as caught, control_socket(str(tmp_path / "file" / "control")):
        pass
    assert str(caught.value) == f"{tmp_path}/file: expected a directory of user {os.geteuid()}"


def test_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 120))
    with pytest.raises(ControlError) as caught, control_socket(path):
        pass
    assert str(caught.value) == f"{path}: cannot make the control socket: AF_UNIX path too long"


def test_a_second_daemon_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with control_socket(path) as listener:
        with pytest.raises(ControlError) as caught, control_socket(path):
            pass
        assert caught.value.errno == errno.EADDRINUSE
        assert str(caught.value) == (
            f"another volfs daemon serves {path}; use it, or give this one a socket of its own (--socket)"
        )
        with socket.socket(socket.AF_UNIX) as client:  # and the first one's socket is as it was
            client.connect(path)
            listener.accept()[0].close()
    with control_socket(path):
        pass


def test_what_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    script = (
        "import os, signal, sys\n"
        "from volfs.control_server import control_socket\n"
        "with control_socket(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert killed.returncode == -9
    with pytest.raises(ControlError, match="no volfs daemon answers"):
        Client(path)
    with control_socket(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        listener.accept()[0].close()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A mistyped --socket must not cost anybody a file."""
    path = tmp_path / "precious"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("elsewhere")
    with pytest.raises(ControlError) as caught, control_socket(str(path)):
        pass
    assert (str(caught.value), caught.value.errno) == (
        f"{path}: expected the path of a control socket; something else is there",
        errno.EEXIST,
    )
    assert os.path.lexists(path)


def test_where_the_socket_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VOLFS_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert control.default_socket() == "/run/user/7/volfs/control"
    monkeypatch.setenv("VOLFS_SOCKET", "/x/y")
    assert control.default_socket() == "/x/y"
    monkeypatch.delenv("VOLFS_SOCKET")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert control.default_socket() == "/run/volfs/control"
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert control.default_socket() == "/tmp/volfs-7/control"


# Who may talk


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="volfs-test-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def as_nobody(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python program of another user; of the distribution's Python, which that user may run."""
    if os.geteuid() != 0:
        pytest.skip("root: only root can be another user")
    command = [sys._base_executable, "-I", "-c", script, *arguments]  # type: ignore[attr-defined]
    return subprocess.Popen(command, user=NOBODY, group=NOBODY, stdout=subprocess.PIPE, text=True, cwd="/")


async def test_another_users_client_is_refused(
    open_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = """if True:
        import socket, sys
        client = socket.socket(socket.AF_UNIX)
        client.connect(sys.argv[1])
        try:
            client.sendall(b'{"type":"Hello"}\\n')
            print(client.recv(100))
        except ConnectionError:
            print("refused")
    """
    async with serving(open_directory) as here:
        os.chmod(here.path, 0o666)
        with as_nobody(script, here.path) as process:
            output, _ = await in_thread(process.communicate)
        assert output.strip() in ("b''", "refused")
        assert (process.returncode, here.seen, here.gone) == (0, [], [])
        (await here.client()).close()  # ours is served
        await here.until_gone(1)
    assert f"control: refused user {NOBODY} (process {process.pid})" in caplog.text


def test_another_users_daemon_is_refused(open_directory: Path) -> None:
    """Somebody may have put a socket where we look, to learn our keys."""
    path = open_directory / "spool" / "control"
    path.parent.mkdir()
    os.chown(path.parent, NOBODY, NOBODY)
    script = """if True:
        import socket, sys
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(sys.argv[1])
        listener.listen()
        print("listening", flush=True)
        print(listener.accept()[0].recv(100))
    """
    with as_nobody(script, str(path)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ControlError) as caught:
            Client(str(path))
        assert process.stdout.read() == "b''\n"  # it was told nothing
    assert (str(caught.value), caught.value.errno) == (
        f"{path} belongs to user {NOBODY}, not to this one or root",
        errno.EPERM,
    )


# The server


async def test_hello_and_a_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        client = await here.client()
        assert client.welcome == WELCOME
        assert await in_thread(client.call, Status(), StatusReply) == STATUS
        client.close()
        client.close()
        await here.until_gone()
        assert here.seen == [Hello(), Status()]
        assert here.gone[0].pid == os.getpid()


@pytest.mark.parametrize("line", NOT_REQUESTS.values(), ids=NOT_REQUESTS.keys())
@pytest.mark.parametrize("greeted", [False, True], ids=["at-once", "after-hello"])
async def test_garbage_is_answered_and_ends_the_connection(
    tmp_path: Path, line: bytes, greeted: bool
) -> None:
    async with serving(tmp_path) as here, await here.raw() as stream:
        await stream.send_all((encode(Hello()) if greeted else b"") + line + b"\n" + encode(Status()))
        *_, last = await replies(stream)
        assert (last["type"], last["kind"], last["errno"]) == ("Failed", "ControlError", errno.EPROTO)
        await here.until_gone()
        assert here.seen == ([Hello()] if greeted else [])


@pytest.mark.parametrize("request_", [it for it in REQUESTS if not isinstance(it, Hello)], ids=repr)
async def test_a_request_before_hello_is_refused(tmp_path: Path, request_: Request) -> None:
    async with serving(tmp_path) as here, await here.raw() as stream:
        await stream.send_all(encode(request_))
        (reply,) = await replies(stream)
        assert (reply["message"], reply["errno"]) == ("expected Hello first", errno.EPROTO)
        assert here.seen == []


@pytest.mark.parametrize("request_", [encode(Status()), b'{"type":"Resize","size":1}\n'], ids=["old", "new"])
async def test_a_client_of_another_version_is_told_both(tmp_path: Path, request_: bytes) -> None:
    """It has our version from the Welcome; if it goes on all the same, it is not answered as one of ours."""
    async with serving(tmp_path) as here, await here.raw() as stream:
        await stream.send_all(encode(Hello(protocol=PROTOCOL + 1, version="9.9")) + request_)
        welcome, reply = await replies(stream)
        assert (welcome["protocol"], welcome["version"]) == (PROTOCOL, VERSION)
        assert (reply["type"], reply["errno"]) == ("Failed", errno.EPROTO)
        assert reply["message"] == (
            f"the client (volfs 9.9) speaks protocol {PROTOCOL + 1}, the daemon (volfs {VERSION}, "
            f"process {os.getpid()}) protocol {PROTOCOL}: use volfs {VERSION}, or mount again with the other"
        )
        assert [type(it) for it in here.seen] == [Hello]


@pytest.mark.parametrize("ended", [True, False], ids=["giant", "endless"])
async def test_a_line_without_measure_is_cut_off(tmp_path: Path, ended: bool) -> None:
    """The server reads little more than one message's length of it, however much comes."""
    sent = 0
    async with serving(tmp_path) as here, await here.raw() as stream:
        with trio.fail_after(SECONDS):
            try:
                while sent < 16 * MAX_MESSAGE:
                    await stream.send_all(b"x" * 65536)
                    sent += 65536
                await stream.send_all(b"\n" if ended else b"")
            except trio.BrokenResourceError:
                pass
        await here.until_gone()
        assert here.seen == []
    assert sent < 3 * MAX_MESSAGE  # one is the server's, some are in the socket's buffers


async def test_a_message_of_nearly_the_longest_length_is_served(tmp_path: Path) -> None:
    info = {"data": {"name": "x" * (MAX_MESSAGE - 4096)}}
    async with serving(tmp_path) as here:
        client = await here.client()
        assert await in_thread(client.call, Attach(connection_info=info), Attached)
        assert here.seen[-1] == Attach(connection_info=info)
        client.close()


async def test_a_line_may_come_in_pieces_and_many_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as here, await here.raw() as stream:
        for byte in encode(Hello()):
            await stream.send_all(bytes([byte]))
        assert (await one_reply(stream))["type"] == "Welcome"
        await stream.send_all(encode(Status()) + encode(Unmount()) + encode(Status())[:-1])
        await stream.send_eof()
        assert [it["type"] for it in await replies(stream)] == ["StatusReply", "Done"]  # in order
        assert here.seen == [Hello(), Status(), Unmount()]


async def test_an_error_of_the_handler_reaches_the_client_as_it_is(tmp_path: Path) -> None:
    async def fail(client: control_server.Client, request: Request) -> Reply:
        match request:
            case Attach():
                raise VolumeNotFound("rbd:a/b: no such image")
            case Detach():
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")
            case Unmount():
                raise VolfsError("still open", errno.EBUSY)
        return WELCOME

    async with serving(tmp_path, fail) as here:
        client = await here.client()
        for request, cls, number, text in (
            (Attach(source="rbd:a/b"), VolumeNotFound, errno.ENOENT, "rbd:a/b: no such image"),
            (Detach(name="x"), VolfsError, errno.ENOENT, "/x: No such file or directory"),
            (Unmount(), VolfsError, errno.EBUSY, "still open"),
        ):
            with pytest.raises(VolfsError) as caught:
                await in_thread(client.call, request, Done)
            assert (type(caught.value), caught.value.errno, str(caught.value)) == (cls, number, text)
        client.close()


async def test_a_bug_in_the_handler_is_eio_and_logged_and_the_server_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(client: control_server.Client, request: Request) -> Reply:
        if isinstance(request, Status):
            raise ZeroDivisionError("s3cret")
        return await answer(client, request)

    async with serving(tmp_path, fail) as here:
        client = await here.client()
        with pytest.raises(
            VolfsError, match=r"^unexpected error in the daemon: ZeroDivisionError$"
        ) as caught:
            await in_thread(client.call, Status(), StatusReply)
        assert caught.value.errno == errno.EIO
        assert await in_thread(client.call, Unmount(), Done) == Done()
        client.close()
    assert "a bug in volfs" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_goodbye_names_the_leases_of_a_client_that_vanished(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        client, other = await here.client(), await here.client()
        for _ in range(2):
            await in_thread(client.call, Attach(source="file:/x"), Attached)
        await in_thread(other.call, Status(), StatusReply)
        client.close()
        with trio.fail_after(SECONDS):
            while not here.gone:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert [it.leases for it in here.gone] == [{1, 2}]
        assert await in_thread(other.call, Status(), StatusReply) == STATUS
        other.close()
        await here.until_gone(2)
        assert [it.leases for it in here.gone] == [{1, 2}, set()]


async def test_goodbye_to_a_client_that_left_before_its_reply(tmp_path: Path) -> None:
    asked, go_on = trio.Event(), trio.Event()

    async def wait(client: control_server.Client, request: Request) -> Reply:
        if isinstance(request, Attach):
            asked.set()
            await go_on.wait()
        return await answer(client, request)

    async with serving(tmp_path, wait) as here:
        stream = await here.raw()
        await stream.send_all(encode(Hello()) + encode(Attach(source="file:/x")))
        await asked.wait()
        await stream.aclose()
        go_on.set()
        await here.until_gone()
        assert here.gone[0].leases == {1}  # which nobody else would give up


async def test_a_client_that_does_not_read_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_server, "SEND_SECONDS", 0.05)

    async def talk(client: control_server.Client, request: Request) -> Reply:
        return msgspec.structs.replace(STATUS, mountpoint="x" * (8 << 20))

    async with serving(tmp_path, talk) as here, await here.raw() as stream:
        await stream.send_all(encode(Hello()))
        await here.until_gone()
    assert f"process {os.getpid()} does not read its replies; dropped" in caplog.text


async def test_a_request_that_takes_long_holds_nobody_else(tmp_path: Path) -> None:
    go_on = trio.Event()

    async def wait(client: control_server.Client, request: Request) -> Reply:
        if isinstance(request, Detach):
            await go_on.wait()
        return await answer(client, request)

    async with serving(tmp_path, wait) as here:
        slow, quick = await here.client(), await here.client()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, slow.call, Detach(name="x"), Done)
            for _ in range(3):
                assert await in_thread(quick.call, Status(), StatusReply) == STATUS
            go_on.set()
        slow.close()
        quick.close()


async def test_many_clients_at_once(tmp_path: Path) -> None:
    async def work(number: int) -> None:
        def calls() -> None:
            client = Client(here.path)
            for turn in range(5):
                url = f"file:/{number}/{turn}"
                assert client.call(Attach(source=url), Attached).source == url
            client.close()

        await in_thread(calls, limiter=threads)

    threads = trio.CapacityLimiter(100)
    async with serving(tmp_path) as here:
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(work, number)
        await here.until_gone(100)
        assert len(here.seen) == 600
        assert all(it.leases == {1, 2, 3, 4, 5} for it in here.gone)


async def test_one_client_too_many_waits_for_another_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "MAX_CLIENTS", 2)
    async with serving(tmp_path) as here:
        first, second, third = [await here.raw() for _ in range(3)]
        for stream in (first, second, third):
            await stream.send_all(encode(Hello()))
        await one_reply(first)
        await one_reply(second)
        assert here.server.clients == 2
        await first.aclose()
        assert (await one_reply(third))["type"] == "Welcome"
        await second.aclose()
        await third.aclose()


async def test_stop_while_one_client_too_many_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "MAX_CLIENTS", 1)
    async with serving(tmp_path) as here:
        first, second = await here.raw(), await here.raw()
        await first.send_all(encode(Hello()))
        await one_reply(first)
        await trio.testing.wait_all_tasks_blocked()
    assert await replies(first) == await replies(second) == []  # ended, not left open
    await first.aclose()
    await second.aclose()


async def test_stop_lets_requests_under_way_be_answered_and_takes_no_more(tmp_path: Path) -> None:
    asked, go_on = trio.Event(), trio.Event()

    async def wait(client: control_server.Client, request: Request) -> Reply:
        if isinstance(request, Unmount):
            asked.set()
            await go_on.wait()
        return await answer(client, request)

    async with serving(tmp_path, wait) as here, await here.raw() as busy, await here.raw() as idle:
        await idle.send_all(encode(Hello()))
        await one_reply(idle)
        await busy.send_all(encode(Hello()))
        await one_reply(busy)
        await busy.send_all(encode(Unmount()))
        await asked.wait()
        here.server.stop()
        assert await replies(idle) == []
        assert not here.server.stopped.is_set()
        go_on.set()
        assert [it["type"] for it in await replies(busy)] == ["Done"]
        with trio.fail_after(SECONDS):
            await here.server.stopped.wait()
        assert len(here.gone) == 2


async def test_stop_before_anybody_came(tmp_path: Path) -> None:
    async with serving(tmp_path) as here:
        here.server.stop()
        with trio.fail_after(SECONDS):
            await here.server.stopped.wait()


# The client


def hello_fails(path: str) -> ControlError:
    with pytest.raises(ControlError) as caught:
        Client(path)
    return caught.value


NO_SOCKET = "{path}: expected the path of a control socket; something else is there"


@pytest.mark.parametrize(
    ("make", "message", "number"),
    [
        (
            lambda path: None,
            "no volfs daemon answers at {path}: No such file or directory",
            errno.ECONNREFUSED,
        ),
        (
            lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
            "no volfs daemon answers at {path}: Connection refused",
            errno.ECONNREFUSED,
        ),
        (
            lambda path: path.symlink_to(path),
            "no volfs daemon answers at {path}: Too many levels of symbolic links",
            errno.ELOOP,
        ),
        (lambda path: path.touch(), NO_SOCKET, errno.ENOTSOCK),
        (lambda path: path.mkdir(), NO_SOCKET, errno.ENOTSOCK),
        (lambda path: os.mkfifo(path), NO_SOCKET, errno.ENOTSOCK),
    ],
    ids=["missing", "stale", "loop", "file", "directory", "fifo"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_daemon(tmp_path: Path, make: Callable[[Path], None], message: str, number: int) -> None:
    """ECONNREFUSED where one may be started, and only there."""
    path = tmp_path / "control"
    make(path)
    exc = hello_fails(str(path))
    assert (str(exc), exc.errno) == (message.format(path=path), number)


def test_no_daemon_below_a_file_or_at_a_path_too_long(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    exc = hello_fails(str(tmp_path / "file" / "control"))
    assert (str(exc), exc.errno) == (
        f"no volfs daemon answers at {tmp_path}/file/control: Not a directory",
        errno.ENOTDIR,
    )
    long = str(tmp_path / ("x" * 120))
    exc = hello_fails(long)
    assert (str(exc), exc.errno) == (
        f"{long}: expected the path of a control socket, at most 107 bytes long",
        errno.ENAMETOOLONG,
    )


@pytest.mark.parametrize("more", [b"", b',"mountpoint":"/mnt","pid":1', b',"new":{}'])
@pytest.mark.parametrize(("protocol", "use"), [(PROTOCOL + 1, "use volfs 9.9, or "), (PROTOCOL - 1, "")])
def test_daemon_of_another_version(tmp_path: Path, protocol: int, use: str, more: bytes) -> None:
    """Whatever else its Welcome says, both are named, and what to do about it."""
    welcome = b'{"type":"Welcome","protocol":%d,"version":"9.9"%s}\n' % (protocol, more)
    with fake_daemon(tmp_path, welcome) as path:
        exc = hello_fails(path)
    assert exc.errno == errno.EPROTO
    assert str(exc) == (
        f"the daemon at {path} (volfs 9.9) speaks protocol {protocol}, this volfs {VERSION} protocol {PROTOCOL}: "
        f"{use}end that daemon by `kill {os.getpid()}`, which flushes and unmounts, and mount again"
    )


def test_client_of_another_version_gets_a_welcome_and_decides_itself(tmp_path: Path) -> None:
    assert decode_request(b'{"type":"Hello","protocol":2,"version":"9.9","more":1}') == Hello(2, "9.9")


@pytest.mark.parametrize(
    ("line", "text", "number"),
    [
        (b"", "the volfs daemon at {path} ended the connection", errno.ECONNRESET),
        (b'{"type":"Wel', "the volfs daemon at {path} ended the connection", errno.ECONNRESET),
        (b"hello\n", "the daemon at {path} sent no reply of ours: ", errno.EPROTO),
        (b"\xff\n", "the daemon at {path} sent no reply of ours: ", errno.EPROTO),
        (b'{"type":"Status"}\n', "the daemon at {path} sent no reply of ours: ", errno.EPROTO),
        (encode(Done()), "the daemon at {path} sent an unexpected Done", errno.EPROTO),
        (
            encode(Failed(kind="ControlError", errno=errno.EPROTO, message="not a request: x")),
            "not a request: x",
            errno.EPROTO,
        ),
    ],
)
def test_daemon_that_talks_nonsense(tmp_path: Path, line: bytes, text: str, number: int) -> None:
    with fake_daemon(tmp_path, line) as path:
        exc = hello_fails(path)
    assert str(exc).startswith(text.format(path=path))
    assert exc.errno == number


def test_daemon_that_dies_before_its_reply(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, encode(WELCOME)) as path:
        client = Client(path)
        with pytest.raises(ControlError, match=r"ended the connection|is gone") as caught:
            client.call(Status(), StatusReply)
        client.close()
    assert caught.value.errno in (errno.ECONNRESET, errno.ECONNREFUSED)


def test_daemon_that_does_not_answer(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, encode(WELCOME), wait=True) as path:
        client = Client(path)
        with pytest.raises(ControlError) as caught:
            client.call(Status(), StatusReply, timeout=0.05)
        client.close()
    assert (str(caught.value), caught.value.errno) == (
        f"the volfs daemon at {path} did not answer within 0.05 s",
        errno.ETIMEDOUT,
    )


def test_after_a_reply_that_did_not_come_the_next_ones_are_not_mistaken(tmp_path: Path) -> None:
    """The late reply would be taken for that to the next request."""
    with fake_daemon(tmp_path, encode(WELCOME), b"", encode(Done()) + encode(STATUS)) as path:
        client = Client(path)
        with pytest.raises(ControlError, match="did not answer"):
            client.call(Detach(name="x"), Done, timeout=0.05)
        with pytest.raises(ControlError) as caught:
            client.call(Unmount(), Done)
        client.close()
    assert "is gone" in str(caught.value)


def test_wait_closed(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, encode(WELCOME)) as path:
        client = Client(path)
        client.wait_closed(SECONDS)
        client.close()


def test_wait_closed_in_vain(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, encode(WELCOME), wait=True) as path:
        client = Client(path)
        with pytest.raises(ControlError, match="has not ended") as caught:
            client.wait_closed(0.05)
        client.close()
    assert caught.value.errno == errno.ETIMEDOUT


def test_an_error_of_a_known_class_is_raised_as_such(tmp_path: Path) -> None:
    failed = Failed(kind="SourceError", errno=errno.EINVAL, message="rbd:x: expected more")
    with fake_daemon(tmp_path, encode(WELCOME), encode(failed)) as path:
        client = Client(path)
        with pytest.raises(SourceError, match="rbd:x: expected more"):
            client.call(Attach(source="rbd:x"), Attached)
        client.close()
