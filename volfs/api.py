"""The synchronous calls: open, close, attach, detach, a client of the daemon. Usable from any thread.

No event loop and no storage library is loaded into the caller.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any

from volfs import control
from volfs.backends import caller_environment, is_url, secret_variables, split_url
from volfs.control import Attach, Attached, Client, Detach, Done, Status, StatusReply, Unmount
from volfs.errors import ControlError, MountError, SourceError, VolfsError, VolumeNotFound
from volfs.runtime import private_directory

ATTACH_SECONDS = 180.0  # for a backend to be connected to, and asked
CLOSE_SECONDS = 60.0  # for the backend to let go of a volume
STOP_SECONDS = 60.0  # for a daemon that is ending
START_SECONDS = 60.0
IDLE_SECONDS = 300.0  # a daemon started on demand ends when unused for so long

ConnectionInfo = Mapping[str, Any]


def open_volume(
    source: str | ConnectionInfo,
    mode: str = "rb",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    *,
    name: str | None = None,
    socket_path: str | None = None,
) -> IO[Any]:
    """Attach a volume and return what built-in open() returns on its file.

    `source` is a URL ("rbd:pool/image", "iscsi://portal/iqn/lun", ...) or a Cinder connection info; `mode` to
    `newline` are open()'s. Closing the file, by `close_volume`, `close` or as a context manager,
    flushes, makes stable what was written, detaches, and returns when the backend has let go of the volume. When
    no daemon serves this user, one is started. When the process dies, the volume is detached.

    Raises SourceError, VolumeNotFound, BackendError, ControlError, MountError, or what open() raises.
    """
    # What open() would refuse, it refuses here, before anything is attached.
    open(os.devnull, mode.replace("x", "w"), buffering, encoding, errors, newline).close()
    lease = Lease(source, name, socket_path)
    try:
        _check_mounted(lease.attached.path)
        # FileIO knows binary modes only; the text layer comes on top, as in open().
        raw = _VolumeIO(lease.attached.path, mode.replace("t", "").replace("b", ""), lease)
    except BaseException:
        lease.release()
        raise
    try:
        return _wrap(raw, mode, buffering, encoding, errors, newline)
    except BaseException:
        raw.close()
        raise


def close_volume(file: IO[Any]) -> None:
    """Close a file of `open_volume`: see there. Harmless when it is closed already; ValueError for another file."""
    raw = getattr(file, "buffer", file)  # of a text file
    raw = getattr(raw, "raw", raw)  # of a buffered one
    if not isinstance(raw, _VolumeIO):
        raise ValueError(f"{file!r} was not opened by open_volume")
    file.close()


def attach(
    source: str | ConnectionInfo,
    name: str | None = None,
    *,
    hold: bool = False,
    blank: bool = False,
    socket_path: str | None = None,
) -> tuple[Attached, Client]:
    """Attach a volume; returns what it is called now, and the connection. With `hold` it stays as long as that.

    `blank`: the caller knows that the whole volume reads as zeros, as a new one does on most storages, and that nobody
    else writes to it meanwhile. Copies then leave holes out that the storage cannot tell of. A wrong promise has old
    data show through the holes of a copy.
    """
    request = _attach_request(source, name, hold, blank)
    while True:
        client = connect(socket_path, request)
        try:
            return client.call(request, Attached, timeout=ATTACH_SECONDS), client
        except ControlError as exc:
            client.close()
            if exc.errno != errno.ECONNRESET:
                raise
            _wait_ended(client.pid, STOP_SECONDS)  # it was about to end, idle
        except BaseException:
            client.close()
            raise


def detach(name: str, *, wait: float = 5.0, socket_path: str | None = None) -> None:
    """Detach a volume by attached name, path or URL; EBUSY when it is still open after `wait` seconds."""
    if "/" in name and not is_url(name):
        name = os.path.abspath(name)
    if not _is_utf8(name):  # nor can it be told to the daemon
        raise VolumeNotFound(f"{name}: nothing of that name, URL or path is attached")
    with _running(socket_path) as client:
        client.call(Detach(name=name, wait=wait), Done, timeout=wait + CLOSE_SECONDS)


def status(connection_info: ConnectionInfo | None = None, *, socket_path: str | None = None) -> StatusReply:
    """What the daemon serves; of all that is attached only that volume, if one is given.

    ControlError when there is no daemon, SourceError for a wrong connection info.
    """
    info = None if connection_info is None else dict(connection_info)
    request = Status(connection_info=info, environment=caller_environment(os.environ))
    with _running(socket_path) as client:
        return client.call(request, StatusReply)


def unmount(mountpoint: str, *, force: bool = False, timeout: float = 300.0) -> None:
    """Unmount, and return when everything has reached the backends and the daemon has ended.

    EBUSY while files are open, unless `force`; another error when something could not be flushed. MountError when
    that is no volfs mount. What a dead daemon left is unmounted with `force` (ENOTCONN without).
    """
    try:
        socket_path = control_of(mountpoint)
    except MountError as exc:
        if exc.errno != errno.ENOTCONN:
            raise
        if not force:
            raise MountError(f"{exc}; unmount it with --force", exc.errno) from exc
        subprocess.run(["fusermount3", "-u", "-z", "--", mountpoint], check=True, timeout=STOP_SECONDS)
        return
    with _running(socket_path) as client:
        _check_same(mountpoint, client)
        client.call(Unmount(force=force), Done, timeout=timeout)
        client.close()
        _wait_ended(client.pid, STOP_SECONDS)


def control_of(mountpoint: str) -> str:
    """The control socket of the daemon that serves a mountpoint. MountError when it is none of ours."""
    return mount_attribute(mountpoint, "control")


def mount_attribute(path: str, key: str) -> str:
    """The extended attribute user.volfs.<key> of a path on a mount. MountError where there is none."""
    try:
        value = os.fsdecode(os.getxattr(path, f"user.volfs.{key}"))
        # An ordinary file has the attribute when somebody has copied it there.
        if _is_volfs(os.stat(path).st_dev):
            return value
    except OSError as exc:
        if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise path_error(path, exc) from exc
    raise MountError(f"{path}: not on a volfs mount", errno.EINVAL)


def _is_volfs(device: int) -> bool:
    """Whether the number is that of a file system of this type, see proc(5) on mountinfo."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            where, _, what = line.partition(" - ")
            if where.split()[2] == number:
                return what.split()[0] == "fuse.volfs"
    return False


def _check_same(mountpoint: str, client: Client) -> None:
    """MountError when the daemon serves another mount than the one whose attribute has led us to it.

    Anybody may run a file system that calls itself volfs, and names the socket of somebody else's daemon.
    """
    served = client.welcome.mountpoint
    try:
        same = os.stat(served).st_dev == os.stat(mountpoint).st_dev
    except OSError:  # mounted in another name space, where this one has a copy of it
        return
    if not same:
        raise MountError(f"{mountpoint}: the daemon that it names serves {served}", errno.EINVAL)


def path_error(path: str, exc: OSError) -> MountError:
    """What an error of the kernel at a path means, which may be on a mount."""
    dead = exc.errno == errno.ENOTCONN
    return MountError(
        f"{path}: {'the volfs daemon of this mount is dead' if dead else exc.strerror}", exc.errno
    )


def connect(socket_path: str | None = None, request: Attach | None = None) -> Client:
    """A connection to this user's daemon, which is started when there is none. ControlError.

    None is started to refuse `request`, the first that it is to answer: SourceError.
    """
    path = os.path.abspath(socket_path or control.default_socket())
    for _ in range(3):  # a daemon may end, idle, just as it is found
        try:
            return Client(path)
        except ControlError as exc:
            if exc.errno not in (errno.ECONNREFUSED, errno.ECONNRESET):
                raise
        _start_daemon(path, request)
    return Client(path)


def _attach_request(source: object, name: str | None, hold: bool, blank: bool) -> Attach:
    """The request for a source; SourceError for what cannot be one, before a daemon is started to say so."""
    if not isinstance(source, str | Mapping):
        raise SourceError(f"expected a URL or a connection info, not {type(source).__name__}")
    url, info = (source, None) if isinstance(source, str) else (None, dict(source))
    if url is not None:
        split_url(url)
    if name is not None and not _is_utf8(name):
        raise SourceError(f"{name!r}: expected a file name of UTF-8 text")
    environment = caller_environment(os.environ)
    request = Attach(
        source=url, connection_info=info, name=name, hold=hold, blank=blank, environment=environment
    )
    try:
        length = len(control.encode(request))
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise SourceError(f"expected a source of UTF-8 text, or of what JSON has: {exc}") from exc
    if length > control.MAX_MESSAGE:
        raise SourceError(f"expected a source of at most {control.MAX_MESSAGE} bytes, not {length}")
    return request


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Lease:
    """An attachment, held on a connection of its own until it is released, or this process dies. Any thread.

    `release` waits for the file handles that this process is closing; with `all_handles` the last lease on the volume
    waits for those of all processes, and is kept, with EBUSY, when some stay open: `release` may be called again.
    `blank` as of `attach`.
    """

    def __init__(
        self,
        source: str | ConnectionInfo,
        name: str | None = None,
        socket_path: str | None = None,
        *,
        all_handles: bool = False,
        blank: bool = False,
    ) -> None:
        self._all_handles = all_handles
        self.attached, self._client = attach(source, name, hold=True, blank=blank, socket_path=socket_path)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._released = False

    @property
    def is_own(self) -> bool:
        """Whether this process made it. A forked child must not detach its parent's volume."""
        return os.getpid() == self._process

    @property
    def is_held(self) -> bool:
        return not self._released

    def abandon(self) -> None:
        """Have the daemon detach the volume as soon as nobody has it open, and do not wait for it."""
        with self._lock:
            self._released = True
        self._client.close()

    def release(self, wait: float = CLOSE_SECONDS) -> None:
        """Detach, within `wait` seconds. VolfsError: what could not be closed; ControlError: the daemon is gone."""
        with self._lock:
            if self._released:
                return
            self._released = True
        try:
            if self.is_own:
                request = Detach(lease=self.attached.lease, wait=wait, all_handles=self._all_handles)
                self._client.call(request, Done, timeout=wait + CLOSE_SECONDS)
        except VolfsError as exc:
            if exc.errno == errno.EBUSY and self._all_handles:
                self._released = False
            raise
        finally:
            if self._released:
                self._client.close()


class _VolumeIO(io.FileIO):
    """The raw file under what open_volume returns: closing it, however that is done, makes stable and detaches."""

    def __init__(self, path: str, mode: str, lease: Lease) -> None:
        self._lease = lease
        super().__init__(path, mode)

    def close(self) -> None:
        if self.closed:
            return
        try:
            try:
                if self.writable():
                    os.fsync(self.fileno())
            finally:
                super().close()
        finally:
            self._lease.release()


def _wrap(
    raw: _VolumeIO,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> IO[Any]:
    """The buffer and text layers that built-in open() would put on the raw file."""
    binary = "b" in mode
    if buffering == 0:
        if not binary:
            raise ValueError("can't have unbuffered text I/O")
        return raw
    size = buffering if buffering > 1 else os.fstat(raw.fileno()).st_blksize
    buffered: Any
    if "+" in mode:
        buffered = io.BufferedRandom(raw, size)
    elif raw.writable():
        buffered = io.BufferedWriter(raw, size)
    else:
        buffered = io.BufferedReader(raw, size)
    if binary:
        return buffered  # type: ignore[no-any-return]
    text: Any = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode
    return text  # type: ignore[no-any-return]


def _check_mounted(path: str) -> None:
    """Where the mount is gone, its path is an ordinary one: writing there would fill the local disk."""
    mount_attribute(path, "source")


class _running:
    """A connection to a daemon that must be there already, for a `with` block."""

    def __init__(self, socket_path: str | None) -> None:
        self._path = os.path.abspath(socket_path or control.default_socket())

    def __enter__(self) -> Client:
        self._client = Client(self._path)
        return self._client

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()


def _start_daemon(path: str, request: Attach | None) -> None:
    """Start a daemon at the socket. However many callers race, one does it and the others wait for that."""
    # Before anything is made or waited for there: where others may write, a link would lead us elsewhere.
    try:
        private_directory(os.path.dirname(path))
    except ControlError as exc:
        raise ControlError(f"cannot start a volfs daemon: {exc}", exc.errno) from exc
    try:
        lock = _open_private(path + ".start", os.O_WRONLY | os.O_CREAT)
    except OSError as exc:
        raise ControlError(f"cannot start a volfs daemon: {exc.filename}: {exc.strerror}", exc.errno) from exc
    with os.fdopen(lock):
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            Client(path).close()
            return
        except ControlError as exc:
            if exc.errno not in (errno.ECONNREFUSED, errno.ECONNRESET):
                raise
        mountpoint = path + ".mnt"
        try:
            os.makedirs(mountpoint, mode=0o700, exist_ok=True)
        except OSError as exc:
            if exc.errno != errno.ENOTCONN and not isinstance(exc, FileExistsError):  # left by a dead daemon
                raise
        try:
            done = _run_mount(path, mountpoint, request)
        except subprocess.TimeoutExpired as exc:
            raise ControlError(
                f"a daemon started at {path} was not ready in {START_SECONDS:g} s", errno.ETIMEDOUT
            ) from exc
        if not done.returncode:
            return
        if refused := control.decode_failure(done.stdout):
            with contextlib.suppress(OSError):
                os.rmdir(mountpoint)
            raise refused
    reason = done.stderr.decode(errors="replace").strip().splitlines()
    text = reason[-1].removeprefix("volfs: ") if reason else f"status {done.returncode}"
    raise ControlError(f"cannot start a volfs daemon: {text}")


def _run_mount(path: str, mountpoint: str, request: Attach | None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "volfs", "mount", mountpoint, "--daemon"]
    command += ["--socket", path, "--exit-idle", f"{IDLE_SECONDS:g}"]
    # That process has what parses sources, which this one shall not load. By a pipe: requests hold secrets.
    command += [] if request is None else ["--first-request"]
    first = b"" if request is None else control.encode(request)
    # Nor shall it, and what it starts, go on showing them in their environment.
    environment = {name: value for name, value in os.environ.items() if name not in secret_variables()}
    return subprocess.run(
        command, capture_output=True, timeout=START_SECONDS, check=False, input=first, env=environment
    )


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _wait_ended(pid: int, timeout: float) -> None:
    """Return when the process has ended. ControlError (ETIMEDOUT)."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise ControlError(f"the volfs daemon, process {pid}, has not ended", errno.ETIMEDOUT)
    finally:
        os.close(process)
