"""The control protocol between clients and the daemon: typed messages, and the client's end. No volume logic.

A stream socket that only its owner may use. Each message is one line of JSON, a request one of at most MAX_MESSAGE
bytes. The client begins with `Hello`, the daemon answers `Welcome`; then each request gets one reply, in order. A
connection is what a client's leases hang on: when it ends, however it ends, they are given up.

No event loop here, since programs import this through the Python API; the daemon's end is control_server.py.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from volfs import errors
from volfs.errors import ControlError, VolfsError
from volfs.runtime import runtime_directory
from volfs.version import VERSION

PROTOCOL = 1
# Of a request. A connection info has a few KiB, and some 100 bytes for each path to a target.
MAX_MESSAGE = 1 << 18
TIMEOUT = 60.0  # seconds a client waits for a reply, unless the request is one that waits


class Hello(msgspec.Struct, tag=True):
    """First message of a client."""

    protocol: int = PROTOCOL
    version: str = VERSION


class Attach(msgspec.Struct, tag=True, kw_only=True):
    """Attach a volume. Exactly one of `source` and `connection_info` is given."""

    source: str | None = None
    connection_info: dict[str, Any] | None = None
    name: str | None = None
    hold: bool = True  # a lease of this connection; else it stays until Detach
    blank: bool = (
        False  # the client knows that it reads as zeros, and that nobody else writes to it meanwhile
    )
    environment: dict[str, str] = {}

    def __repr__(self) -> str:  # connection infos and environments hold secrets
        return f"Attach(name={self.name!r})"


class Detach(msgspec.Struct, tag=True, kw_only=True):
    """Give up leases: that of `lease`, or all of the attachment that `name` (or URL, or path) tells.

    Waits up to `wait` seconds for file handles on the volume: with `lease` for those of the client's own process, or,
    if `all_handles`, for all once nobody else has a lease on the volume; with `name` for all.
    """

    lease: int | None = None
    name: str | None = None
    wait: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    all_handles: bool = False


class Status(msgspec.Struct, tag=True, kw_only=True):
    """Ask what the daemon serves; with a `connection_info`, of all that is attached only that volume."""

    connection_info: dict[str, Any] | None = None
    environment: dict[str, str] = {}

    def __repr__(self) -> str:  # as of Attach
        return "Status()"


class Unmount(msgspec.Struct, tag=True, kw_only=True):
    """Unmount, flush and end. Refused with EBUSY while files are open, unless `force`."""

    force: bool = False


class Welcome(msgspec.Struct, tag=True, kw_only=True):
    """First message of the daemon."""

    protocol: int = PROTOCOL
    version: str = VERSION
    mountpoint: str
    pid: int


class Attached(msgspec.Struct, tag=True, kw_only=True):
    """Reply to Attach."""

    name: str
    path: str
    source: str
    driver: str
    size: int
    lease: int


class AttachedStatus(msgspec.Struct, kw_only=True):
    """One attachment in a `StatusReply`."""

    name: str
    source: str
    size: int
    leases: int
    handles: int


class OpenStatus(msgspec.Struct, kw_only=True):
    """One open volume in a `StatusReply`."""

    source: str
    size: int
    writable: bool
    handles: int


class StatusReply(msgspec.Struct, tag=True, kw_only=True):
    """Reply to Status. `backends` maps a name to its driver."""

    pid: int
    version: str
    mountpoint: str
    backends: dict[str, str]
    attached: list[AttachedStatus]
    open: list[OpenStatus]
    clients: int


class Done(msgspec.Struct, tag=True):
    """Reply to Detach and Unmount."""


class Failed(msgspec.Struct, tag=True, kw_only=True):
    """Reply to a request that failed. `kind` is the name of the exception's class."""

    kind: str
    errno: int
    message: str

    def error(self) -> VolfsError:
        """The exception that this reply stands for."""
        cls = getattr(errors, self.kind, VolfsError)
        if not (isinstance(cls, type) and issubclass(cls, VolfsError)):
            cls = VolfsError
        return cls(self.message, self.errno)


class _Spoken(msgspec.Struct):
    """What a `Welcome` says in any version of the protocol."""

    protocol: int
    version: str = "of unknown version"


Request = Hello | Attach | Detach | Status | Unmount
Reply = Welcome | Attached | StatusReply | Done | Failed
R = TypeVar("R", bound=msgspec.Struct)

_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises for one


def encode(message: Request | Reply) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """ControlError (EPROTO) for anything but a request."""
    try:
        return _request_decoder.decode(line)
    except _NOT_A_MESSAGE as exc:
        raise ControlError(f"not a request: {exc}", errno.EPROTO) from exc


def decode_reply(line: bytes) -> Reply:
    """ControlError (EPROTO) for anything but a reply."""
    try:
        return _reply_decoder.decode(line)
    except _NOT_A_MESSAGE as exc:
        raise ControlError(f"no reply of ours: {exc}", errno.EPROTO) from exc


def decode_failure(line: bytes) -> VolfsError | None:
    """The exception that a line stands for, if it is a `Failed`."""
    try:
        return msgspec.json.decode(line, type=Failed).error()
    except _NOT_A_MESSAGE:
        return None


def failure(exc: OSError) -> Failed:
    """The reply for an exception."""
    kind = type(exc).__name__ if isinstance(exc, VolfsError) else "VolfsError"
    return Failed(kind=kind, errno=exc.errno or errno.EIO, message=errors.error_text(exc))


def default_socket() -> str:
    """Where clients look for their daemon: $VOLFS_SOCKET, else `control` in the runtime directory."""
    return os.environ.get("VOLFS_SOCKET") or os.path.join(runtime_directory(), "control")


class Client:
    """A client's connection, with blocking calls. One thread at a time.

    Errors of the daemon are raised as the classes of errors.py; ControlError when it is not there (ECONNREFUSED),
    dies, or speaks another protocol (EPROTO).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Not settimeout: then a full backlog would be an error at once, and not a reason to wait (unix(7)).
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", round(TIMEOUT), 0)
            )
            try:
                self._socket.connect(path)
            except BlockingIOError as exc:
                raise ControlError(
                    f"the volfs daemon at {path} did not answer within {TIMEOUT:g} s", errno.ETIMEDOUT
                ) from exc
            except OSError as exc:
                raise _unreachable(path, exc) from exc
            self.pid, uid = peer_credentials(self._socket)
            if uid not in (0, os.geteuid()):
                raise ControlError(f"{path} belongs to user {uid}, not to this one or root", errno.EPERM)
            line = self._request(Hello(), TIMEOUT)
            self._check_protocol(line)
            self.welcome = self._expect(line, Welcome)
        except BaseException:
            self._socket.close()
            raise

    def call(self, request: Request, reply: type[R], timeout: float = TIMEOUT) -> R:
        """Send a request and return its reply, which must be of that type."""
        return self._expect(self._request(request, timeout), reply)

    def _request(self, request: Request, timeout: float) -> bytes:
        """Send a request and return the line that answers it."""
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(encode(request))
            return self._read_line(time.monotonic() + timeout)
        except TimeoutError as exc:
            self._socket.close()  # its reply, coming late, would be taken for that to the next request
            raise ControlError(
                f"the volfs daemon at {self.path} did not answer within {timeout:g} s", errno.ETIMEDOUT
            ) from exc
        except OSError as exc:
            if isinstance(exc, VolfsError):
                raise
            raise ControlError(f"the volfs daemon at {self.path} is gone: {exc.strerror}") from exc

    def _expect(self, line: bytes, reply: type[R]) -> R:
        try:
            answer = decode_reply(line)
        except ControlError as exc:
            raise ControlError(f"the daemon at {self.path} sent {exc}", errno.EPROTO) from exc
        if isinstance(answer, Failed):
            raise answer.error()
        if not isinstance(answer, reply):
            raise ControlError(
                f"the daemon at {self.path} sent an unexpected {type(answer).__name__}", errno.EPROTO
            )
        return answer

    def _check_protocol(self, line: bytes) -> None:
        """ControlError (EPROTO) when a daemon of another version answers, even if its Welcome is not as ours."""
        try:
            daemon = msgspec.json.decode(line, type=_Spoken)
        except _NOT_A_MESSAGE:
            return
        if daemon.protocol != PROTOCOL:
            newer = f"use volfs {daemon.version}, or " if daemon.protocol > PROTOCOL else ""
            raise ControlError(
                f"the daemon at {self.path} (volfs {daemon.version}) speaks protocol {daemon.protocol}, "
                f"this volfs {VERSION} protocol {PROTOCOL}: {newer}end that daemon by `kill {self.pid}`, "
                "which flushes and unmounts, and mount again",
                errno.EPROTO,
            )

    def close(self) -> None:
        """End the connection and with it the leases on it. Harmless when done before."""
        self._socket.close()

    def wait_closed(self, timeout: float | None) -> None:
        """Return when the daemon has ended the connection. ControlError (ETIMEDOUT) after `timeout` seconds."""
        self._socket.settimeout(timeout)
        try:
            while self._socket.recv(4096):
                pass
        except TimeoutError as exc:
            raise ControlError(f"the volfs daemon at {self.path} has not ended", errno.ETIMEDOUT) from exc
        except ConnectionError:
            pass

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ControlError(f"the volfs daemon at {self.path} ended the connection", errno.ECONNRESET)
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line


def _unreachable(path: str, exc: OSError) -> ControlError:
    """Why nobody can be spoken to there. ECONNREFUSED, where a daemon may be started, means that none is running."""
    if exc.errno is None:  # Python's own check
        return ControlError(
            f"{path}: expected the path of a control socket, at most 107 bytes long", errno.ENAMETOOLONG
        )
    if exc.errno == errno.ECONNREFUSED and not _is_socket(path):
        return ControlError(
            f"{path}: expected the path of a control socket; something else is there", errno.ENOTSOCK
        )
    number = errno.ECONNREFUSED if exc.errno == errno.ENOENT else exc.errno
    return ControlError(f"no volfs daemon answers at {path}: {exc.strerror}", number)


def _is_socket(path: str) -> bool:
    """Whether a socket, or nothing, is at the path; a link to one is as good to connect to."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True


class _HasSocketOptions(Protocol):
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def peer_credentials(connection: _HasSocketOptions) -> tuple[int, int]:
    """Process id and user id of the other end, as the kernel vouches (unix(7), SO_PEERCRED)."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
