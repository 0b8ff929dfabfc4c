"""The control socket of a real daemon under everything that a client may do to it, by malice or by a bug.

Others are refused. Whoever may talk to it gets no further than an error: the daemon lives, its memory stays within a
bound, and all the while it answers a client that behaves, and reads of the mount, within a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Mount, mounted, wait_until
from services import MIB, SLOWER, skip_or_fail
from test_control import NOBODY, as_nobody

from volfs import api, control_server
from volfs.control import MAX_MESSAGE, Attach, Attached, Client, Hello, Status, StatusReply, encode

# On a machine whose processors have nothing else to do.
ANSWER_SECONDS = 1.0 * SLOWER * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
MEMORY = 64 * MIB  # that the daemon may take in addition, whatever is sent to it
SECONDS = 30.0 * SLOWER
HELLO = encode(Hello())
STATUS = encode(Status())

pytestmark = pytest.mark.slow


class Watch:
    """A client that behaves, asking again and again beside whatever a test does; and the daemon's memory."""

    def __init__(self, mount: Mount, file: Path) -> None:
        self.mount = mount
        self.slowest = 0.0
        self.answers = 0
        self.failure: BaseException | None = None
        self._file = file
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Watch:
        Path(f"/proc/{self.mount.process.pid}/clear_refs").write_text(
            "5"
        )  # the high-water mark of its memory
        self._before = self._memory("VmRSS")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(AssertionError):
            self.until(5)
        self._end.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        if exc_info[0] is not None:
            return
        taken = self._memory("VmHWM") - self._before
        print(
            f"{self.answers} answers, the slowest after {self.slowest:.3f} s; {taken / MIB:.1f} MiB at most"
        )
        assert self.answers > 3
        assert self.slowest < ANSWER_SECONDS
        assert taken < MEMORY
        assert self.mount.process.poll() is None
        assert "Traceback" not in self.mount.log

    def until(self, answers: int) -> None:
        """Return when it has got so many more."""
        wanted = self.answers + answers
        wait_until(lambda: self.answers >= wanted or self.failure, f"{answers} more answers", SECONDS)

    def _ask(self) -> None:
        try:
            while not self._end.is_set():
                begun = time.monotonic()
                client = Client(str(self.mount.socket))
                assert client.call(Status(), StatusReply).pid == self.mount.process.pid
                client.close()
                with self._file.open("rb", 0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    assert len(file.read(4096)) == 4096
                self.slowest = max(self.slowest, time.monotonic() - begun)
                self.answers += 1
                self._end.wait(0.02)
        except BaseException as exc:
            self.failure = exc

    def _memory(self, what: str) -> int:
        status = Path(f"/proc/{self.mount.process.pid}/status").read_text()
        match = re.search(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)
        assert match is not None
        return int(match[1]) << 10


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    files = tmp_path_factory.mktemp("files")
    files.joinpath("disk").write_bytes(os.urandom(MIB))
    with mounted(tmp_path_factory.mktemp("d"), [f"file:{files}"]) as made:
        yield made


@pytest.fixture
def watch(mount: Mount) -> Iterator[Watch]:
    with Watch(mount, mount.path / "file" / "disk") as made:
        yield made


@pytest.fixture
def connect(mount: Mount) -> Iterator[Callable[[], socket.socket]]:
    """Make a connection that says nothing by itself; all are closed after the test, before its watch ends."""
    with contextlib.ExitStack() as stack:

        def make() -> socket.socket:
            made = stack.enter_context(socket.socket(socket.AF_UNIX))
            made.connect(str(mount.socket))  # waits where the backlog is full
            made.settimeout(SECONDS)
            return made

        yield make


def send(connection: socket.socket, data: bytes) -> bool:
    """Send all of it; False when the daemon ended the connection before."""
    try:
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def rest(connection: socket.socket) -> bytes:
    """What the daemon says until it ends the connection."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            said += chunk
    return said


def assert_refused(said: bytes) -> None:
    """Ended, with nothing or with an error of the protocol as the last line."""
    if said:
        assert json.loads(said.splitlines()[-1])["type"] == "Failed", said[-200:]


def in_threads(number: int, work: Callable[[int], None]) -> None:
    """Run it so many times at once; the first failure is raised."""
    failures: list[BaseException] = []

    def one(each: int) -> None:
        try:
            work(each)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=one, args=(each,)) for each in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# Who may talk to it


def test_another_user_gets_nothing_by_permission_and_nothing_by_credentials(mount: Mount) -> None:
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can be another user")
    script = """if True:
        import socket, sys
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(sys.argv[1])
            client.sendall(b'{"type":"Hello"}\\n{"type":"Unmount","force":true}\\n')
            print(client.recv(100))
        except OSError as exc:
            print(type(exc).__name__)
    """

    def ask() -> str:
        with as_nobody(script, str(mount.socket)) as process:
            output, _ = process.communicate(timeout=SECONDS)
        return output.strip()

    assert mount.socket.stat().st_mode & 0o077 == 0
    assert ask() == "PermissionError"
    ways = [mount.socket, *mount.socket.parents]
    modes = {way: stat.S_IMODE(way.stat().st_mode) for way in ways}
    try:
        for way in ways:
            way.chmod(modes[way] | 0o011 if way.is_dir() else 0o666)
        assert ask() in ("b''", "BrokenPipeError", "ConnectionResetError")
    finally:
        for way in ways:
            way.chmod(modes[way])
    assert f"control: refused user {NOBODY}" in mount.log
    assert mount.volfs("status").returncode == 0  # it was not unmounted


# What they may send


@pytest.mark.parametrize("greeted", [False, True])
def test_random_bytes(watch: Watch, connect: Callable[[], socket.socket], greeted: bool) -> None:
    chance = random.Random(greeted)
    requests = [HELLO, STATUS, encode(Attach(source="file:/none"))]
    for _ in range(300):
        connection = connect()
        data = chance.randbytes(chance.randrange(1, 5000))
        if chance.random() < 0.5:  # a good request with one byte changed, which may still be good
            good = bytearray(chance.choice(requests))
            good[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
            data = bytes(good) + data
        send(connection, (HELLO if greeted else b"") + data + b"\n")
        connection.shutdown(socket.SHUT_WR)
        assert_refused(rest(connection))


def test_giant_messages(watch: Watch, connect: Callable[[], socket.socket]) -> None:
    """As long as is taken, of what takes the most memory when decoded, from many at once."""
    lists = b"[[]" + b",[]" * (MAX_MESSAGE // 3 - 100) + b"]"
    message = (
        b'{"type":"Attach","connection_info":{"driver_volume_type":"rbd","data":{"a":' + lists + b"}}}\n"
    )
    assert MAX_MESSAGE - 500 < len(message) < MAX_MESSAGE

    def work(each: int) -> None:
        connection = connect()
        send(connection, HELLO + (message if each % 2 else message.replace(b'"rbd"', b'"x"')))
        connection.shutdown(socket.SHUT_WR)
        welcome, answer = rest(connection).splitlines()
        assert (json.loads(welcome)["type"], json.loads(answer)["type"]) == ("Welcome", "Failed")

    in_threads(32, work)


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["endless", "ended"])
def test_messages_beyond_the_limit(watch: Watch, connect: Callable[[], socket.socket], end: bytes) -> None:
    def work(_: int) -> None:
        connection = connect()
        send(connection, HELLO)
        sent = 0
        while send(connection, b"x" * 65536):
            sent += 65536
            assert sent < 3 * MAX_MESSAGE  # one is the daemon's, some are in the socket's buffers
        send(connection, end)
        assert_refused(rest(connection))

    in_threads(64, work)


def test_half_messages_of_many_clients(watch: Watch, connect: Callable[[], socket.socket]) -> None:
    """Each as long as the daemon takes it at all, and never ended."""
    connections = [connect() for _ in range(400)]
    for connection in connections:
        connection.setblocking(False)
    for _ in range(20):
        for connection in connections:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                connection.send(b"x" * 65536)
    watch.until(20)


@pytest.mark.parametrize("greeting", [b"", HELLO, HELLO + b'{"type":"Sta'], ids=["silent", "greeted", "half"])
def test_a_thousand_idle_connections(
    watch: Watch, connect: Callable[[], socket.socket], mount: Mount, greeting: bytes
) -> None:
    """They lose their places to who has something to ask; one that holds a volume keeps it."""
    holder = Client(str(mount.socket))
    attached = holder.call(Attach(source=f"file:{_disk(mount)}", name="held"), Attached)
    for _ in range(1000):
        send(connect(), greeting)
    watch.until(20)
    time.sleep(control_server.IDLE_SECONDS)  # so that all of them are idle, and not only the first
    watch.until(20)
    assert holder.call(Status(), StatusReply).attached[0].name == "held"
    assert Path(attached.path).stat().st_size == MIB
    holder.close()
    wait_until(lambda: not api.status(socket_path=str(mount.socket)).attached, "it is let go of")


def _disk(mount: Mount) -> str:
    return os.getxattr(mount.path / "file" / "disk", "user.volfs.source").decode().removeprefix("file:")


def test_pipelined_requests_whose_replies_nobody_reads(
    watch: Watch, connect: Callable[[], socket.socket]
) -> None:
    """Until nothing can be sent any more."""
    for _ in range(50):
        connection = connect()
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            connection.send(HELLO + STATUS * 3000)
    watch.until(50)


def test_more_slow_readers_of_long_replies_than_there_are_places(
    mount: Mount, watch: Watch, connect: Callable[[], socket.socket]
) -> None:
    with contextlib.closing(Client(str(mount.socket))) as holder:
        for number in range(200):
            holder.call(Attach(source=f"file:{_disk(mount)}", name=f"{number}-{'x' * 200}"), Attached)
        for _ in range(control_server.MAX_CLIENTS + 100):
            send(connect(), HELLO + STATUS * 10)
        watch.until(20)
    wait_until(lambda: not api.status(socket_path=str(mount.socket)).attached, "it is let go of", SECONDS)


def test_garbage_behind_good_requests(watch: Watch, connect: Callable[[], socket.socket]) -> None:
    """What was right is answered, the first line that is wrong ends it, and nothing behind that is looked at."""
    for garbage in (b"\x00\n", b"{}\n", b"\xff\xfe\n", b"\n", b"[" * 3000 + b"\n"):
        connection = connect()
        send(connection, HELLO + STATUS * 20 + garbage * 200 + encode(Attach(source="file:/none")))
        replies = [json.loads(line)["type"] for line in rest(connection).splitlines()]
        assert replies == ["Welcome", *["StatusReply"] * 20, "Failed"]


def test_clients_that_leave_in_the_middle(
    watch: Watch, connect: Callable[[], socket.socket], mount: Mount
) -> None:
    message = HELLO + encode(Attach(source=f"file:{_disk(mount)}", name="left")) + STATUS
    chance = random.Random(0)
    for _ in range(300):
        connection = connect()
        send(connection, message[: chance.randrange(len(message) + 1)])
        connection.close()
    wait_until(
        lambda: not api.status(socket_path=str(mount.socket)).attached, "nothing stays attached", SECONDS
    )


def test_after_all_that_it_ends_as_ever(tmp_path: Path) -> None:
    """With idle connections, and ones in the middle of a request and of a reply."""
    with mounted(tmp_path, []) as mount, contextlib.ExitStack() as stack:
        for data in (b"", HELLO, HELLO + b"{", HELLO + STATUS * 3000):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(mount.socket))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.send(data)
        begun = time.monotonic()
        assert mount.stop() == 0
        assert time.monotonic() - begun < 5 * SLOWER
