"""What a file object is and can do, asked of its descriptor: the rest of a copy need not know any type of file."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

from volfs.identity import local_identity

BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


class Place(NamedTuple):
    """A byte of an open descriptor from which a copy begins; what is behind it has offsets, and no position."""

    number: int
    start: int


@contextmanager
def placed(file: IO[bytes], size: int) -> Iterator[Place | None]:
    """The place where the file stands, when its descriptor may be used in its stead; else None.

    Inside the block the file object itself must not be used. After it, unless that raised, the file stands `size`
    bytes further on.
    """
    number = _bytes_descriptor(file)
    if number is None:
        yield None
        return
    file.flush()  # also forgets what a BufferedRandom has read, and would still show after others wrote
    start, position = file.tell(), os.lseek(number, 0, os.SEEK_CUR)
    try:
        yield Place(number, start)
    finally:
        # Looking for holes moves it, and a buffer knows where it left it.
        os.lseek(number, position, os.SEEK_SET)
    file.seek(start + size)


def _bytes_descriptor(file: Any) -> int | None:
    """The descriptor, if reading or writing there at an offset is what the file object does at that position.

    Having one does not suffice: that of a GzipFile leads to other bytes, and an object that wraps a file may count,
    check or encrypt what passes. So the methods must be those of io itself.
    """
    raw = file.raw if type(file) in BUFFERED else file
    methods = ("read", "readall", "readinto", "write", "seek", "tell", "fileno")
    if not isinstance(raw, io.FileIO) or any(
        getattr(type(raw), it) is not getattr(io.FileIO, it) for it in methods
    ):
        return None
    number = raw.fileno()
    mode = os.fstat(number).st_mode
    # With O_APPEND Linux writes at the end, whatever offset pwrite is given.
    return number if (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and not appends(file) else None


def descriptor(file: Any) -> int | None:
    """The number of the file's descriptor; None when it has none."""
    try:
        return int(file.fileno())
    except (AttributeError, io.UnsupportedOperation, OSError):
        return None


def file_size(file: IO[bytes]) -> int:
    """The number of bytes from the beginning of a seekable file to its end; its position stays."""
    position = file.tell()
    try:
        return file.seek(0, os.SEEK_END) or file.tell()  # RBDVolumeIOWrapper.seek returns None
    finally:
        file.seek(position)


def can(ability: str, file: IO[bytes]) -> bool:
    """Whether the file is `readable` or `writable`. RBDVolumeIOWrapper denies both, can both, and has no descriptor."""
    return descriptor(file) is None or bool(getattr(file, ability)())


def is_stream(file: IO[bytes]) -> bool:
    """Whether the file has no size: a pipe, a socket; also a terminal or /dev/null, though one can seek there."""
    number = descriptor(file)
    return not file.seekable() or (number is not None and stat.S_ISCHR(os.fstat(number).st_mode))


def is_volume(file: IO[bytes]) -> bool:
    """Whether the file is one of a volfs mount."""
    number = descriptor(file)
    try:
        return number is not None and bool(os.getxattr(number, "user.volfs.source"))
    except OSError:
        return False


def appends(file: IO[bytes]) -> bool:
    """Whether all that is written goes to the end."""
    number = descriptor(file)
    return number is not None and bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND)


def same(one: IO[bytes], other: IO[bytes]) -> bool:
    """Whether both are known to be the same volume, file or device."""
    identity = _identity(one)
    return identity is not None and identity == _identity(other)


def _identity(file: IO[bytes]) -> str | None:
    """What the file is, whatever path, link, mount or URL led to it; None when nobody knows."""
    number = descriptor(file)
    if number is None:
        return None
    try:
        told = os.fsdecode(os.getxattr(number, "user.volfs.identity"))
    except OSError:
        told = ""
    return told or local_identity(os.fstat(number))


def make_stable(file: IO[bytes]) -> None:
    """Return when all that was written is on stable storage, as far as the file has such a thing."""
    file.flush()
    number = descriptor(file)
    if number is not None:
        try:
            os.fsync(number)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a pipe or socket has nothing to make stable
                raise


def uncached(file: IO[bytes], position: int) -> IO[bytes]:
    """The file at that position, without what the page cache and its own buffer remember."""
    number = descriptor(file)
    if number is not None:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(position)
    raw: IO[bytes] = cast("IO[bytes]", file.raw) if isinstance(file, BUFFERED) else file
    raw.seek(position)
    return raw
