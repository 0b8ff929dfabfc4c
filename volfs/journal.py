"""The crash journal: what this machine was told to do for a volume, and must undo though the daemon was killed.

One file a thing, written before the thing is done and removed after it was undone: a login at a target, a logical
volume that was activated. Its owner holds a lock on it for as long as it lives, so the kernel, and not a process
number that may have been given to another, says whose owner is dead. All daemons of a user share the directory.

Never a secret: who cleans up knows only what is in the file. Nothing here knows a driver.

Concurrency: calls may come from any thread; each holds the directory's lock for as long as a small file takes to be
written and made stable, so on the trio loop they belong in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from volfs.errors import BackendError, VolfsError, printable
from volfs.runtime import private_directory, runtime_directory

log = logging.getLogger(__name__)

SUFFIX = ".json"
NEW_SUFFIX = ".new"  # being written
MAX_RECORD = 1 << 20  # bytes; a connection info, the longest that is noted, is shorter (control.MAX_MESSAGE)


class _Content(msgspec.Struct, frozen=True):
    driver: str
    facts: dict[str, Any]


class Record:
    """One thing to be undone. Whoever has it, be it the owner or one that found it an orphan, has its lock.

    One thread at a time. Ends with `remove` or `release`.
    """

    def __init__(self, path: str, lock: int, content: _Content) -> None:
        self.path = path
        self._lock = lock
        self._content = content

    @property
    def driver(self) -> str:
        return self._content.driver

    @property
    def facts(self) -> Mapping[str, Any]:
        """As they were told, after a way through JSON: tuples have become lists."""
        return self._content.facts

    def __repr__(self) -> str:
        return printable(f"Record({os.path.basename(self.path)}, {self.driver})")

    def update(self, facts: Mapping[str, Any]) -> None:
        """Replace the facts, all at once: who reads them after a crash finds the old ones or the new. BackendError."""
        content = _Content(self.driver, dict(facts))
        with _locked_directory():
            lock = _write(self.path, content)
        os.close(self._lock)
        self._lock, self._content = lock, content

    def remove(self) -> None:
        """It is undone. Harmless when removed before. BackendError."""
        if self._lock < 0:
            return
        with _locked_directory() as directory:
            try:
                os.unlink(self.path)
            except FileNotFoundError:  # somebody who tidied up; the thing is undone all the same
                pass
            os.fsync(directory)
        self.release()

    def release(self) -> None:
        """It could not be undone: leave it to the next start of a daemon. Harmless when removed before."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def record(driver: str, facts: Mapping[str, Any]) -> Record:
    """Note, before it is done, what `Backend.clean_up` of this driver would have to undo. BackendError.

    On stable storage when this returns. `facts` are of what JSON has.
    """
    content = _Content(driver, dict(facts))
    path = os.path.join(_directory(), f"{driver}-{uuid.uuid4().hex}{SUFFIX}")
    with _locked_directory():
        return Record(path, _write(path, content), content)


def orphans() -> Iterator[Record]:
    """The records whose owner is dead; the caller has their locks, and owes each a `remove` or a `release`.

    Remains that are no record, such as one that a dying machine had not finished, are removed: what they announce
    was never begun.
    """
    if not os.path.isdir(_directory()):
        return
    with _locked_directory() as directory:
        names = sorted(os.listdir(directory))
    for name in names:
        with _locked_directory():
            found = _take(os.path.join(_directory(), name))
        if found is not None:
            yield found


def living(driver: str, but: Record | None = None) -> list[Mapping[str, Any]]:
    """The facts of a driver's records whose owner lives, `but` for one. Orphans that somebody has are not among them.

    What several use, the last of them undoes; they need a lock of their own against each other.
    """
    found: list[Mapping[str, Any]] = []
    with _locked_directory() as directory:
        for name in os.listdir(directory):
            path = os.path.join(_directory(), name)
            mine = but is not None and but.path == path
            if name.startswith(f"{driver}-") and name.endswith(SUFFIX) and not mine and _is_owned(path):
                try:
                    found.append(_decode(Path(path).read_bytes()).facts)
                except (OSError, ValueError):  # removed since, or of another version
                    continue
    return found


def _directory() -> str:
    return os.path.join(runtime_directory(), "journal")


@contextmanager
def _locked_directory() -> Iterator[int]:
    """The directory's descriptor, with its lock. OSErrors become BackendErrors."""
    path = _directory()
    try:
        private_directory(runtime_directory())
        private_directory(path)
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            yield number
        finally:
            os.close(number)
    except OSError as exc:
        if isinstance(exc, BackendError):
            raise
        text = exc.strerror if not isinstance(exc, VolfsError) else str(exc)
        raise BackendError(f"journal {path}: {text}", exc.errno or errno.EIO) from exc


def _write(path: str, content: _Content) -> int:
    """Put the file in place, whole and stable; returns its descriptor, with the lock. Under the directory's lock."""
    new = path + NEW_SUFFIX
    number = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Nobody else can have it: whoever looks through the directory has its lock meanwhile.
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        data = msgspec.json.encode(content)
        if os.write(number, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(number)
        os.rename(new, path)
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        os.close(number)
        raise
    return number


def _decode(data: bytes) -> _Content:
    """ValueError for what is no record."""
    try:
        return msgspec.json.decode(data, type=_Content)
    except RecursionError as exc:
        raise ValueError(str(exc)) from exc


def _read(number: int) -> _Content:
    """The record in a file. ValueError when it is none."""
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_RECORD:
        raise ValueError(f"expected a file of at most {MAX_RECORD} bytes")
    return _decode(os.pread(number, status.st_size, 0))


def _is_owned(path: str) -> bool:
    """Whether its owner lives. Under the directory's lock, so that nobody takes our look for an owner."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(number)
    return False


def _take(path: str) -> Record | None:
    """The record at the path, if its owner is dead. Under the directory's lock."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # removed since, or none of ours
        return None
    taken = False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.endswith(SUFFIX):
            content = _read(number)
            # Who cleans up keeps others from doing so, but is no owner: see `_is_owned`.
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
            taken = True
            return Record(path, number, content)
        if path.endswith(NEW_SUFFIX):
            os.unlink(path)
    except BlockingIOError:  # its owner lives
        pass
    except ValueError as exc:  # also those of msgspec
        log.warning("%s", printable(f"{path}: not a record of this volfs, left alone: {exc}"))
    finally:
        if not taken:
            os.close(number)
    return None
