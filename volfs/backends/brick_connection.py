"""Volumes that os-brick connects to this machine: each once for all who use it here, and taken down by the last.

What os-brick does changes the machine: sessions of the kernel's initiator, SCSI devices, maps of multipath, mounts.
So the journal knows of it from before it begins until it is undone, and a connection that comes up later than anybody
waits for it is taken down again.

Concurrency: the functions may be called by any task. os-brick blocks, so it runs in threads of the caller's limiter;
a thread that is given up goes on until os-brick returns, and cleans up by itself. What is done to one volume is done
one after the other, also by other processes of volfs: a lock beside those of os-brick sees to that. os-brick's own
locks do not: it would take a volume away from under a second user.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import trio

from volfs import journal
from volfs.backends import brick_library as library
from volfs.backends.base import deadline
from volfs.backends.brick_commands import Commands
from volfs.backends.brick_target import Target
from volfs.errors import BackendError, BackendTimeout, VolfsError

log = logging.getLogger(__name__)

DRIVER = "brick"  # whose `clean_up` the journal's records are for
POLL_SECONDS = 0.05  # how soon a lock that another process gives up is found free
SETTLE_SECONDS = 5  # that udev has for the events of this machine
CLEAN_UP_SECONDS = 60.0  # that one command may take to undo what a dead process left


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal knows of a connection: enough to take it down, if that is possible without its secrets."""

    name: str
    protocol: str
    identity: str  # of Target
    data: dict[str, Any]  # without secrets
    options: library.Options
    borrowed: bool  # was there before we came, so somebody else is to take it down
    path: str = ""  # of the device or file; "" before it is known
    mount_point: str = ""
    device_info: dict[str, Any] = {}


class Connection:
    """A volume that is connected. `path` is its block device or file. Made by `connect`, ended by `disconnect`."""

    def __init__(
        self,
        target: Target,
        connector: library.Connector,
        commands: Commands,
        record: journal.Record,
        facts: _Facts,
    ) -> None:
        self.target = target
        self.path = facts.path
        self._connector = connector
        self._commands = commands
        self._record = record
        self._facts = facts

    def extend(self, handover: _Handover) -> None:
        """Have the kernel look at the size of the volume's device again. Blocks. VolfsError."""
        with library.errors(self._commands, f"{self.target.name}: size", self.target.data):
            self._connector.extend_volume(copy.deepcopy(dict(self.target.data)))

    def end(self, handover: _Handover) -> None:
        """Take it down, unless somebody else on this machine uses it. Blocks. VolfsError.

        To be done even if nobody waits for it any more. A failure is left to the next start of a daemon.
        """
        try:
            with _volume_lock(self.target, _Handover()):
                _take_down(self._connector, self._commands, self.target.data, self._facts, self._record)
                self._record.remove()
        except VolfsError as exc:
            if handover.given_up:
                log.error("%s", exc)
            raise
        finally:
            self._record.release()


class _Handover:
    """Whether somebody still waits for what a thread brings: decided once, by whoever comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = False
        self._brought: Connection | None = None

    @property
    def given_up(self) -> bool:
        return self._given_up

    def bring(self, connection: Connection) -> bool:
        """For the thread: hand it over; False when nobody waits any more."""
        with self._lock:
            if not self._given_up:
                self._brought = connection
            return not self._given_up

    def give_up(self) -> Connection | None:
        """For who waits no longer: what was brought all the same, if anything was."""
        with self._lock:
            self._given_up = True
            return self._brought


async def connect(target: Target, threads: trio.CapacityLimiter) -> Connection:
    """Connect the volume. The caller owes one `disconnect`. VolumeNotFound, BackendError, BackendTimeout.

    Whatever fails leaves nothing behind, or else a record in the journal.
    """
    handover = _Handover()
    try:
        with deadline(target.timeout, f"{target.name}: connect"):
            return await trio.to_thread.run_sync(
                _connect, target, handover, limiter=threads, abandon_on_cancel=True
            )
    except BaseException:
        late = handover.give_up()
        if late is not None:  # it came in the moment in which we were cancelled
            await disconnect(late, threads)
        raise


async def disconnect(connection: Connection, threads: trio.CapacityLimiter) -> None:
    """Disconnect. Not cancelled; ends within the target's timeout, and is completed in the background after that.

    BackendError when something is left; it is tried again at the next start of a daemon.
    """
    await _finish(connection.end, connection.target, "disconnect", threads)


async def extend(connection: Connection, threads: trio.CapacityLimiter) -> None:
    """Have the kernel look at the volume's size again. VolfsError."""
    await _finish(connection.extend, connection.target, "size", threads)


async def _finish(
    call: Callable[[_Handover], None], target: Target, doing: str, threads: trio.CapacityLimiter
) -> None:
    handover = _Handover()
    try:
        with trio.CancelScope(shield=True), deadline(target.timeout, f"{target.name}: {doing}"):
            await trio.to_thread.run_sync(call, handover, limiter=threads, abandon_on_cancel=True)
    finally:
        handover.give_up()


async def clean_up(facts: Mapping[str, Any]) -> None:
    """The `Backend.clean_up` of the driver whose name the records have."""
    await trio.to_thread.run_sync(_clean_up, facts, abandon_on_cancel=True)


def _connect(target: Target, handover: _Handover) -> Connection:
    try:
        with _volume_lock(target, handover):
            connection = _connect_locked(target)
    except VolfsError as exc:
        if handover.given_up:
            log.warning("%s: connect: after nobody waited for it any more: %s", target.name, exc)
        raise
    if not handover.bring(connection):
        log.warning("%s: connected after nobody waited for it any more; disconnecting", target.name)
        connection.end(handover)
    return connection


def _connect_locked(target: Target) -> Connection:
    connector, commands = library.make_connector(target.protocol, target.data, target.options, target.timeout)
    with library.errors(commands, f"{target.name}: connect", target.data):
        facts = _Facts(
            name=target.name,
            protocol=target.protocol,
            identity=target.identity,
            data=library.without_secrets(target.data),
            options=target.options,
            borrowed=_is_borrowed(target, connector),
            mount_point=library.mount_point(connector, target.data),
        )
    record = journal.record(DRIVER, msgspec.to_builtins(facts))
    try:
        with library.errors(commands, f"{target.name}: connect", target.data):
            info = connector.connect_volume(copy.deepcopy(dict(target.data)))
        path = info.get("path") if isinstance(info, dict) else None
        path = path.decode(errors="surrogateescape") if isinstance(path, bytes) else path
        if not isinstance(path, str) or not path:
            close = getattr(path, "close", None)
            if close is not None:
                close()
            raise BackendError(
                f"{target.name}: os-brick gives no path for {target.protocol}", errno.EOPNOTSUPP
            )
        facts = msgspec.structs.replace(facts, path=path, device_info=_plain(info))
        record.update(msgspec.to_builtins(facts))
    except BaseException:
        _undo(target, connector, commands, facts, record)
        raise
    return Connection(target, connector, commands, record, facts)


def _undo(
    target: Target,
    connector: library.Connector,
    commands: Commands,
    facts: _Facts,
    record: journal.Record,
) -> None:
    """After a connect that failed; its own error is the one to be told."""
    try:
        _take_down(connector, commands, target.data, facts, record)
        record.remove()
    except VolfsError as exc:
        log.warning("%s: not all is undone, left to the next start of a daemon: %s", target.name, exc)
    finally:
        record.release()


def _take_down(
    connector: library.Connector,
    commands: Commands,
    data: Mapping[str, Any],
    facts: _Facts,
    record: journal.Record | None,
) -> None:
    """Disconnect and unmount what no living process of volfs uses. VolfsError when something is left."""
    if facts.borrowed:
        return
    others = [other for other in _living(record) if not other.borrowed]
    if not any(_same_device(facts, other) for other in others):
        _disconnect(connector, commands, data, facts)
    if facts.mount_point and not any(facts.mount_point == other.mount_point for other in others):
        with library.errors(commands, f"{facts.name}: unmount", data):
            _unmount(facts.mount_point, commands, facts.options)


def _disconnect(
    connector: library.Connector, commands: Commands, data: Mapping[str, Any], facts: _Facts
) -> None:
    """By force, since what was written was flushed before: os-brick goes through all steps, and tells of failures last.

    A second time then, as most failures (to flush a disk that is gone) leave nothing that could fail again.
    """
    if facts.device_info.get("multipath_id"):
        _settle()

    def disconnect() -> None:
        with library.errors(commands, f"{facts.name}: disconnect", data):
            connector.disconnect_volume(copy.deepcopy(dict(data)), dict(facts.device_info), force=True)

    try:
        disconnect()
    except VolfsError as exc:
        disconnect()
        log.warning("%s; nothing is left, though", exc)


def _settle() -> None:
    """Let udev have its look at what was written to: os-brick waits ten seconds when a map is in use meanwhile."""
    with suppress(Exception):  # no udev here, or a busy one: then it is os-brick's to wait
        Commands(SETTLE_SECONDS + 1)("udevadm", "settle", f"--timeout={SETTLE_SECONDS}")


def _unmount(mount_point: str, commands: Commands, options: library.Options) -> None:
    # Not os.path.ismount, which asks the file system: that of a server that is gone does not answer.
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if mount_point in (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), path) for path in mounts):
        commands("umount", mount_point, run_as_root=True, root_helper=options.root_helper)
    try:
        os.rmdir(mount_point)
    except FileNotFoundError:  # the mount had not come so far
        pass


def _clean_up(facts: Mapping[str, Any]) -> None:
    try:
        left = msgspec.convert(facts, _Facts)
    except msgspec.ValidationError as exc:
        raise VolfsError(f"not what this volfs notes of a connection: {exc}", errno.EINVAL) from exc
    target = Target(left.name, left.protocol, left.data, left.options, CLEAN_UP_SECONDS)
    with _volume_lock(target, _Handover(), trial=True):
        connector, commands = library.make_connector(left.protocol, left.data, left.options, CLEAN_UP_SECONDS)
        _take_down(connector, commands, left.data, left, None)


def _is_borrowed(target: Target, connector: library.Connector) -> bool:
    """Whether the volume is connected already, and not by us: by Nova, it may be, whose disk must stay.

    What os-brick finds connected it shares, and disconnects all the same.
    """
    present = _present(target.protocol, connector, target.data)
    ours = [other for other in _living(None) if not other.borrowed]
    return bool(present) and not any(
        other.identity == target.identity or other.path in present for other in ours
    )


def _present(protocol: str, connector: library.Connector, data: Mapping[str, Any]) -> list[str]:
    """The volume's devices that there are now, where a connector can tell without making some."""
    if protocol not in library.SCSI:
        return []
    paths = connector.get_volume_paths(copy.deepcopy(dict(data)))
    return [os.path.realpath(path) for path in paths if os.path.exists(path)]


def _living(but: journal.Record | None) -> list[_Facts]:
    found = []
    for facts in journal.living(DRIVER, but):
        try:
            found.append(msgspec.convert(facts, _Facts))
        except msgspec.ValidationError:  # of another version
            continue
    return found


def _same_device(one: _Facts, other: _Facts) -> bool:
    if one.mount_point or other.mount_point:
        return one.path == other.path
    return one.identity == other.identity or (one.path == other.path != "")


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of a connector's answer it wants to have back, as JSON has it."""
    return {
        key: value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
        for key, value in info.items()
        if isinstance(value, (str, bytes, int, float, bool, type(None)))
    }


@contextmanager
def _volume_lock(target: Target, handover: _Handover, *, trial: bool = False) -> Iterator[None]:
    """Against all else that is done to the volume, here and in other processes. BackendTimeout."""
    library.set_up(target.options, trial=trial)
    name = hashlib.sha256(target.identity.encode()).hexdigest()[:32]
    path = os.path.join(target.options.lock_path, f"volfs-{name}")
    until = time.monotonic() + target.timeout
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise BackendError(f"{path}: {exc.strerror}", exc.errno) from exc
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if handover.given_up or time.monotonic() > until:
                    raise BackendTimeout(f"{target.name}: still being connected or disconnected") from None
                time.sleep(POLL_SECONDS)
        if handover.given_up:
            raise BackendTimeout(f"{target.name}: nobody waits for it any more")
        yield
    finally:
        os.close(lock)
