"""The daemon's end of the control protocol: the socket, who may use it, and the lines of each client."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

import trio

from volfs.control import (
    MAX_MESSAGE,
    PROTOCOL,
    Hello,
    Reply,
    Request,
    decode_request,
    encode,
    failure,
    peer_credentials,
)
from volfs.errors import ControlError
from volfs.runtime import private_directory
from volfs.version import VERSION

log = logging.getLogger(__name__)

# Connected at once. When a further one comes, one has to go that holds no lease and has been waited for (to ask, or to
# read its reply) for IDLE_SECONDS: nobody keeps others out by doing nothing.
MAX_CLIENTS = 512
IDLE_SECONDS = 0.25
BACKLOG = 64  # further ones wait to be accepted
# Bytes of a request that every client may send at once, and of replies that the kernel keeps for it.
SHORT = 1 << 14
MAX_LONG = 4  # clients whose requests may be longer, up to MAX_MESSAGE, at once; the others wait for them
REQUEST_SECONDS = 30.0  # from the first byte of a request to its last, or the client is dropped
RETRY_SECONDS = 1.0  # to accept, when the process or the system is short of something
SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
SEND_SECONDS = 10.0  # a client that does not read its reply that long is dropped
LAST_SEND_SECONDS = 1.0  # and when the daemon ends


@dataclass(eq=False)
class Client:
    """One client's connection, as the request handler sees it."""

    pid: int
    leases: set[int] = field(default_factory=set)
    idle_since: float = math.inf  # of trio's clock: waited for since then


Handler = Callable[[Client, Request], Awaitable[Reply]]
Goodbye = Callable[[Client], Awaitable[None]]


@contextmanager
def control_socket(path: str) -> Iterator[socket.socket]:
    """Bind the control socket, for its owner only, and remove it at the end.

    ControlError (EADDRINUSE) when another daemon serves there. What a killed daemon left behind is replaced: the
    lock on `<path>.lock`, which the kernel releases with the process, tells the two cases apart.
    """
    private_directory(os.path.dirname(path))
    _refuse_others(path)  # before a lock is made beside what may be anybody's file
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ControlError(
                f"another volfs daemon serves {path}; use it, or give this one a socket of its own (--socket)",
                errno.EADDRINUSE,
            ) from exc
        _refuse_others(path)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(path)
            except OSError as exc:
                raise ControlError(
                    f"{path}: cannot make the control socket: {exc.strerror or exc}", exc.errno
                ) from exc
            try:
                # The directory is ours alone, so nobody can connect before this.
                os.chmod(path, 0o600)
                listener.listen(BACKLOG)
                yield listener
            finally:
                try:
                    os.unlink(path)
                except FileNotFoundError:  # somebody who tidies up was faster
                    pass
    finally:
        os.close(lock)


def _refuse_others(path: str) -> None:
    """ControlError (EEXIST) when something else than a socket is at the path."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as exc:
        raise ControlError(f"{path}: cannot make the control socket: {exc.strerror}", exc.errno) from exc
    if not stat.S_ISSOCK(mode):
        raise ControlError(
            f"{path}: expected the path of a control socket; something else is there", errno.EEXIST
        )


def _check_protocol(hello: Hello) -> None:
    """ControlError (EPROTO) for a client of another version."""
    if hello.protocol != PROTOCOL:
        raise ControlError(
            f"the client (volfs {hello.version}) speaks protocol {hello.protocol}, the daemon (volfs {VERSION}, "
            f"process {os.getpid()}) protocol {PROTOCOL}: use volfs {VERSION}, or mount again with the other",
            errno.EPROTO,
        )


class ControlServer:
    """Answers clients. Requests of one client come one after the other, those of different clients side by side.

    `handle` answers one request: its OSErrors become replies. `goodbye` is called when a client is gone. A client
    that sends garbage is told so and dropped.
    """

    def __init__(self, handle: Handler, goodbye: Goodbye) -> None:
        self._handle = handle
        self._goodbye = goodbye
        self._waiting: set[trio.CancelScope] = set()  # for what `stop` need not wait for
        self._idle: dict[Client, trio.CancelScope] = {}  # waits for clients, the longest first
        self._slots = trio.Semaphore(MAX_CLIENTS)
        self._long = trio.Semaphore(MAX_LONG)
        self._decoding = trio.Lock()
        self._stopping = False
        self.stopped = trio.Event()
        self.clients = 0

    async def serve(self, listener: socket.socket) -> None:
        """Serve until `stop`; then return when the requests under way are answered."""

        async def serve_one(stream: trio.SocketStream) -> None:
            self.clients += 1
            try:
                await self._serve_client(stream)
            except trio.BrokenResourceError:
                pass  # it left without waiting for its reply
            except Exception:
                log.exception("control: unexpected error; a bug in volfs")
            finally:
                self.clients -= 1
                self._slots.release()
                await trio.aclose_forcefully(stream)

        with listener.dup() as acceptor:
            acceptor.setblocking(False)
            async with trio.open_nursery() as nursery:
                with self._until_stop():
                    while not self._stopping:
                        await trio.lowlevel.wait_readable(acceptor)
                        try:
                            # All that wait: the last of them, one in a turn, would wait for what the others ask.
                            for _ in range(BACKLOG):
                                connection, _ = acceptor.accept()
                                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SHORT)
                                stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
                                await self._take_slot(stream)
                                nursery.start_soon(serve_one, stream)
                        except BlockingIOError:
                            continue
                        except OSError as exc:
                            if exc.errno not in SCARCE:
                                raise
                            log.error("control: cannot accept a client: %s", exc.strerror)
                            await trio.sleep(RETRY_SECONDS)
        self.stopped.set()

    def stop(self) -> None:
        """Take no more requests."""
        self._stopping = True
        for scope in self._waiting:
            scope.cancel()
        for scope in self._idle.values():
            scope.deadline = min(scope.deadline, trio.current_time() + LAST_SEND_SECONDS)

    async def _take_slot(self, stream: trio.SocketStream) -> None:
        """Wait for a slot, if there is none, and have an idle client make room. The stream is closed when cancelled."""
        try:
            while self._slots.value == 0:
                self._drop_idle()
                with trio.move_on_after(IDLE_SECONDS / 4):
                    await self._slots.acquire()
                    return
            self._slots.acquire_nowait()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    def _drop_idle(self) -> None:
        for client, scope in self._idle.items():
            if not client.leases and trio.current_time() - client.idle_since > IDLE_SECONDS:
                log.debug("control: process %d is idle; dropped for another", client.pid)
                scope.cancel()
                return

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        pid, uid = peer_credentials(stream.socket)
        if uid not in (0, os.geteuid()):
            log.warning("control: refused user %d (process %d)", uid, pid)
            return
        client = Client(pid)
        hello: Hello | None = None
        try:
            async with aclosing(self._lines(client, stream)) as lines:
                async for line in lines:
                    last = False
                    try:
                        if hello is not None:
                            _check_protocol(hello)  # it has our Welcome, and should have left
                        request = await self._decode(line)
                        if isinstance(request, Hello):
                            hello = request
                        elif hello is None:
                            raise ControlError("expected Hello first", errno.EPROTO)
                    except ControlError as exc:
                        reply: Reply = failure(exc)
                        last = True
                    else:
                        reply = await self._answer(client, request)
                    with self._wait_for(client, SEND_SECONDS) as scope:
                        await stream.send_all(encode(reply))
                    if scope.cancelled_caught:
                        log.warning("control: process %d does not read its replies; dropped", pid)
                    if last or scope.cancelled_caught:
                        return
        finally:
            with trio.CancelScope(shield=True):
                await self._goodbye(client)

    async def _decode(self, line: bytes) -> Request:
        if len(line) < SHORT:
            return decode_request(line)
        async with self._decoding:  # it may take 0.1 s: others have their turn between one and the next
            await trio.lowlevel.checkpoint()
            return decode_request(line)

    async def _answer(self, client: Client, request: Request) -> Reply:
        try:
            return await self._handle(client, request)
        except OSError as exc:
            return failure(exc)
        except Exception as exc:
            log.exception("control: unexpected error; a bug in volfs")
            return failure(OSError(errno.EIO, f"unexpected error in the daemon: {type(exc).__name__}"))

    async def _lines(self, client: Client, stream: trio.SocketStream) -> AsyncGenerator[bytes, None]:
        """The client's lines, without their ends. An endless one ends the connection, as garbage does.

        The place of a long one is kept until the next line is asked for: what is made of it takes memory as well.
        """
        buffer = bytearray()
        seen = 0  # of these no end of a line
        deadline = math.inf
        is_long = False
        try:
            while True:
                end = buffer.find(b"\n", seen)
                if end >= 0:
                    line = bytes(buffer[:end])
                    del buffer[: end + 1]
                    seen, deadline = 0, math.inf
                    yield line
                    if is_long:
                        self._long.release()
                        is_long = False
                    continue
                if len(buffer) > MAX_MESSAGE:
                    yield b""  # no request, and answered so
                    return
                seen = len(buffer)
                if buffer:
                    deadline = min(deadline, trio.current_time() + REQUEST_SECONDS)
                chunk = b""
                with self._until_stop(), self._wait_for(client, deadline - trio.current_time()) as scope:
                    if len(buffer) >= SHORT and not is_long:
                        await self._long.acquire()
                        is_long = True
                    try:
                        chunk = bytes(await stream.receive_some(65536 if is_long else SHORT))
                    except trio.BrokenResourceError:
                        return
                if scope.cancelled_caught and trio.current_time() >= deadline:
                    log.warning("control: process %d does not finish its request; dropped", client.pid)
                if not chunk:
                    return
                buffer += chunk
        finally:
            if is_long:
                self._long.release()

    @contextmanager
    def _wait_for(self, client: Client, seconds: float) -> Iterator[trio.CancelScope]:
        """Wait for the client to do something; cancelled after `seconds`, or when another needs its place."""
        if self._stopping:
            seconds = min(seconds, LAST_SEND_SECONDS)
        with trio.move_on_after(max(seconds, 0)) as scope:
            client.idle_since = trio.current_time()
            self._idle[client] = scope
            try:
                yield scope
            finally:
                del self._idle[client]

    @contextmanager
    def _until_stop(self) -> Iterator[None]:
        with trio.CancelScope() as scope:
            if self._stopping:
                scope.cancel()
            self._waiting.add(scope)
            try:
                yield
            finally:
                self._waiting.discard(scope)
