"""The journal of a copy that may be interrupted: what it copies, and how far it is stable on the target.

A text that people can read, of lines that end with a line feed:

    volfs copy journal 1
    source "rbd:volumes/disk-1"             JSON, as all of the header; URLs without accounts, absolute paths
    target "/srv/disk-1.raw"
    size 10737418240                        bytes to copy
    target-size 10737418240                 of the target as it was found
    source-state "inode 7 mtime 1 ctime 2"  of an ordinary file; "" of what has no trustworthy times
    block-size 4194304
    checksum "sha256"
    stable 0 1a2b3c4d
    0 4194304 9f86d081884c7d659a2feaa0...   offset, length, checksum of a block
    4194304 1069547520 zero                 blocks that read as zeros
    stable 1073741824 99aabbcc              all before is on stable storage

Only what a `stable` line closes counts. It ends with the CRC-32 of all bytes of the file before it, so that what a
dying machine leaves at the end, a line that was edited or a lost sector are noticed: the journal ends before the first
line that is not as it should be, which costs no more than to copy again what came behind. The header appears all at
once under the file's name. After it the file only grows (a mapfile that is written anew each time, as ddrescue has it,
would be 20 MB for each terabyte, every few seconds). Nothing here is secret; the file is for its owner alone all the
same, as whoever could write there could have a copy leave blocks out.

Concurrency: one thread at a time; one process, which holds the file's lock (flock).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from volfs.block_sums import ALGORITHM, Block
from volfs.errors import CopyError, VolfsError
from volfs.runtime import private_directory, state_directory

MAGIC = b"volfs copy journal "
VERSION = b"1"
MAX_LINE = 64 << 10  # bytes; two paths of the kernel's longest, every byte of them escaped, have room
BLOCK_SIZES = range(4096, (64 << 20) + 1)  # what is believed: a block is held in memory
MAX_SIZE = 1 << 63

_BLOCK = re.compile(rb"(\d{1,19}) (\d{1,19}) ([0-9a-f]{64}|zero)\n")
_STABLE = re.compile(rb"stable (\d{1,19}) ([0-9a-f]{8})\n")


@dataclass(frozen=True)
class Header:
    """What is copied. Sizes in bytes."""

    source: str
    target: str
    size: int
    target_size: int
    source_state: str
    block_size: int
    checksum: str = ALGORITHM

    def encode(self) -> bytes:
        lines = [MAGIC + VERSION, *(f"{key} {json.dumps(value)}".encode() for key, value in self._fields())]
        return b"".join(line + b"\n" for line in lines)

    def _fields(self) -> Iterator[tuple[str, str | int]]:
        for key in _TYPES:
            yield key, getattr(self, key.replace("-", "_"))


# In their order in the file.
_TYPES: dict[str, type] = {
    "source": str,
    "target": str,
    "size": int,
    "target-size": int,
    "source-state": str,
    "block-size": int,
    "checksum": str,
}


class Journal:
    """An open journal, with its lock. Ends with `close`; `remove` before that when the copy is done."""

    def __init__(self, path: str, number: int) -> None:
        """Read it; takes the descriptor over once that succeeded. CopyError (EINVAL) for what is no journal."""
        self.path = path
        self._number = number
        with _named(path), self._reader() as file:
            self.header, self.done, self._end, self._crc = _scan(path, file)

    def blocks(self) -> Iterator[Block]:
        """What is done, from offset 0 on, without gaps."""
        with _named(self.path), self._reader() as file:
            while file.tell() < self._end:
                block = _block(file.readline(MAX_LINE))
                if block is not None:  # else a line of the header, or a stable one
                    yield block

    def note(self, blocks: Iterable[Block], done: int) -> None:
        """These, which follow what is done, are stable on the target, up to `done`. On stable storage itself then.

        CopyError with the errno, also when the journal was removed meanwhile: nobody could go on by it.
        """
        text = b"".join(
            f"{block.offset} {block.length} {block.checksum or 'zero'}\n".encode() for block in blocks
        )
        with _named(self.path):
            status = os.fstat(self._number)
            if not status.st_nlink:
                raise OSError(errno.ENOENT, "it was removed during the copy")
            self._crc = zlib.crc32(text, self._crc)
            line = _stable_line(done, self._crc)
            self._crc = zlib.crc32(line, self._crc)
            if status.st_size != self._end:  # a copy that was killed has left something behind the last line
                os.ftruncate(self._number, self._end)
            _write(self._number, text + line, self._end)
            os.fdatasync(self._number)
        self._end += len(text) + len(line)
        self.done = done

    def remove(self) -> None:
        """The copy is done."""
        with _named(self.path):
            os.unlink(self.path)
            _sync_directory(self.path)

    def close(self) -> None:
        """Let go of it. Harmless when closed before."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    @contextmanager
    def _reader(self) -> Iterator[BinaryIO]:
        os.lseek(self._number, 0, os.SEEK_SET)
        with open(self._number, "rb", closefd=False) as file:
            yield file


def default_path(source: str, target: str) -> str:
    """Where the journal of a copy is that nobody named: one for each pair of names. ControlError."""
    private_directory(state_directory())
    directory = os.path.join(state_directory(), "copies")
    private_directory(directory)
    pair = json.dumps([source, target]).encode()
    return os.path.join(directory, f"{hashlib.sha256(pair).hexdigest()[:32]}.journal")


def find(path: str) -> Journal | None:
    """The journal of a copy that was interrupted; None when there is no file of that name.

    CopyError: EBUSY when that copy is under way, EINVAL when the file is no journal of this version, EPERM when
    somebody else could have written it, or the errno of opening it.
    """
    with _named(path):
        while True:
            try:
                # O_NONBLOCK: of a FIFO. It may be a link of somebody else's in a directory such as /tmp.
                number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            with ExitStack() as undo:
                undo.callback(os.close, number)
                _check_private(path, os.fstat(number))
                _lock(path, number)
                if os.fstat(number).st_nlink:  # else its copy ended just now, and removed it
                    journal = Journal(path, number)
                    undo.pop_all()
                    return journal


def begin(path: str, header: Header) -> Journal:
    """A journal that says that nothing is done yet, stable. CopyError: EBUSY when there is one since, or as `find`."""
    new = f"{path}.{uuid.uuid4().hex[:8]}.new"
    with _named(path):
        number = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with ExitStack() as undo:
            undo.callback(os.close, number)
            try:
                _lock(path, number)
                text = header.encode()
                _write(number, text + _stable_line(0, zlib.crc32(text)), 0)
                os.fsync(number)
                os.link(new, path)  # unlike rename, for one of two that begin at once
            except FileExistsError as exc:
                raise _busy(path) from exc
            finally:
                os.unlink(new)
            _sync_directory(path)
            journal = Journal(path, number)
            undo.pop_all()
            return journal


def _check_private(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _no_journal(path, "it is no ordinary file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise CopyError(f"journal {path}: somebody else could have written it", errno.EPERM)


def _lock(path: str, number: int) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise _busy(path) from exc


def _busy(path: str) -> CopyError:
    return CopyError(f"journal {path}: its copy is under way in another process", errno.EBUSY)


def _no_journal(path: str, reason: str) -> CopyError:
    return CopyError(f"journal {path}: not a journal of a copy: {reason}", errno.EINVAL)


def _scan(path: str, file: BinaryIO) -> tuple[Header, int, int, int]:
    """The header, the bytes that are done, where the part of the file ends that tells it, and the CRC up to there."""
    header, crc = _read_header(path, file)
    line = file.readline(MAX_LINE)
    if _stable(line, crc) != 0:
        raise _no_journal(path, "its header is damaged")
    crc = stable_crc = zlib.crc32(line, crc)
    at = done = 0
    end = file.tell()
    while line := file.readline(MAX_LINE):
        if (block := _block(line)) is not None:
            if not _follows(block, at, header):
                break
            at = block.end
        elif _stable(line, crc) != at:
            break
        crc = zlib.crc32(line, crc)
        if block is None:
            done, end, stable_crc = at, file.tell(), crc
    return header, done, end, stable_crc


def _follows(block: Block, at: int, header: Header) -> bool:
    """Whether it is what the next block can be. No blocks of no length, which could go on for ever."""
    if block.offset != at or not 0 < block.length <= header.size - at:
        return False
    if block.end == header.size:
        return not block.checksum or block.length <= header.block_size
    return block.length % header.block_size == 0 and (not block.checksum or block.length == header.block_size)


def _read_header(path: str, file: BinaryIO) -> tuple[Header, int]:
    line = file.readline(MAX_LINE)
    if not line.startswith(MAGIC) or not line.endswith(b"\n"):
        raise _no_journal(path, f"expected a file that begins with {MAGIC.decode()!r}")
    if (version := line.removeprefix(MAGIC).rstrip(b"\n")) != VERSION:
        shown = version[:20].decode(errors="replace")
        raise CopyError(
            f"journal {path}: of version {shown}, expected {VERSION.decode()}:"
            " let the volfs that began this copy finish it, or remove the journal",
            errno.EINVAL,
        )
    crc = zlib.crc32(line)
    found: dict[str, Any] = {}
    for key, kind in _TYPES.items():
        line = file.readline(MAX_LINE)
        crc = zlib.crc32(line, crc)
        name, _, text = line.partition(b" ")
        try:
            value: object = json.loads(text.decode("ascii"))
        except (ValueError, RecursionError):
            value = None
        if name != key.encode() or not line.endswith(b"\n") or type(value) is not kind:
            raise _no_journal(path, f"expected a line of its {key}")
        found[key.replace("-", "_")] = value
    header = Header(**found)
    if not (0 <= header.size < MAX_SIZE and 0 <= header.target_size < MAX_SIZE):
        raise _no_journal(path, "no volume has that size")
    if header.block_size not in BLOCK_SIZES or header.checksum != ALGORITHM:
        raise _no_journal(
            path, f"expected blocks of {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} bytes, by {ALGORITHM}"
        )
    return header, crc


def _block(line: bytes) -> Block | None:
    if (match := _BLOCK.fullmatch(line)) is None:
        return None
    checksum = match[3].decode()
    return Block(int(match[1]), int(match[2]), "" if checksum == "zero" else checksum)


def _stable(line: bytes, crc: int) -> int | None:
    """How far the line says that the target is stable, if it is one, and of what comes before it."""
    match = _STABLE.fullmatch(line)
    return int(match[1]) if match is not None and int(match[2], 16) == crc else None


def _stable_line(done: int, crc: int) -> bytes:
    return f"stable {done} {crc:08x}\n".encode()


def _write(number: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(number, rest, offset)
        offset += written
        rest = rest[written:]


def _sync_directory(path: str) -> None:
    number = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """OSErrors of the system become CopyErrors that name the journal."""
    try:
        yield
    except VolfsError:
        raise
    except OSError as exc:
        raise CopyError(f"journal {path}: {exc.strerror}", exc.errno) from exc
