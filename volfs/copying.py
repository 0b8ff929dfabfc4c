"""Copying and comparing volumes: plain reads and writes between two binary file objects, whatever is behind them.

Reading and writing overlap: a thread reads ahead of the caller, who writes. There is no special case for any backend
here; what a file object can do is found out by asking it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import queue
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import IO, Any

from volfs.errors import CopyError, VolfsError, error_text
from volfs.identity import local_identity

BLOCK_SIZE = 4 << 20
BLOCKS_AHEAD = 4  # read but not yet written; bounds the memory, and more than two hides no more latency

Progress = Callable[[int], None]


def copy_volume_data(
    source_file: IO[bytes],
    target_file: IO[bytes],
    size: int,
    *,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
    verify: bool = False,
) -> None:
    """Copy `size` bytes from where `source_file` stands to where `target_file` stands, and make them stable.

    Works on any two binary file objects: of open_volume, io.BytesIO, os-brick's RBDVolumeIOWrapper. A target that
    ends before `size` bytes is enlarged if it is an ordinary file, and refused (ENOSPC) before the first byte is
    written if it is a volume or a block device; what has no end, such as a pipe or /dev/null, takes all. `progress` is
    called in this thread with the number of bytes written so far. With `verify` both are read again, past the page
    cache, and compared; both must then be seekable and the target readable.

    Raises CopyError with the errno of the cause; its `offset` tells how many bytes had been written, or where the
    two differ. The position of the files is undefined then. Do not use the files elsewhere meanwhile.
    """
    _check(source_file, target_file, size, block_size, verify=verify)
    start = (source_file.tell(), target_file.tell()) if verify else (0, 0)
    offset = 0
    try:
        with closing(_blocks_ahead(source_file, size, block_size, "source")) as blocks:
            for block in blocks:
                for written in _write_all(target_file, block):
                    offset += written
                if progress is not None:
                    progress(offset)
        _make_stable(target_file)
    except OSError as exc:
        raise CopyError(
            f"copy stopped at offset {offset}: {error_text(exc)}", exc.errno, offset=offset
        ) from exc
    if verify:
        source_file, target_file = _uncached(source_file, start[0]), _uncached(target_file, start[1])
        compare_volume_data(source_file, target_file, size, block_size=block_size)


def compare_volume_data(
    first_file: IO[bytes],
    second_file: IO[bytes],
    size: int,
    *,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
) -> None:
    """Compare `size` bytes of two files from where they stand. CopyError (EILSEQ) at the first offset that differs."""
    _check_sizes(size, block_size)
    offset = 0
    try:
        with (
            closing(_blocks_ahead(first_file, size, block_size, "first file")) as first,
            closing(_blocks_ahead(second_file, size, block_size, "second file")) as second,
        ):
            for one, other in zip(first, second, strict=True):
                if one != other:
                    offset += next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
                    raise CopyError(f"contents differ at offset {offset}", errno.EILSEQ, offset=offset)
                offset += len(one)
                if progress is not None:
                    progress(offset)
    except CopyError:
        raise
    except OSError as exc:
        raise CopyError(
            f"comparison stopped at offset {offset}: {error_text(exc)}", exc.errno, offset=offset
        ) from exc


def file_size(file: IO[bytes]) -> int:
    """The number of bytes from the beginning of a seekable file to its end; its position stays."""
    position = file.tell()
    try:
        return file.seek(0, os.SEEK_END) or file.tell()  # RBDVolumeIOWrapper.seek returns None
    finally:
        file.seek(position)


def _check(source: IO[bytes], target: IO[bytes], size: int, block_size: int, *, verify: bool) -> None:
    _check_sizes(size, block_size)
    if source is target or _same(source, target):
        raise VolfsError("source and target are the same volume", errno.EINVAL)
    if verify and (_is_stream(source) or _is_stream(target) or not _can("readable", target)):
        raise ValueError("verify=True: expected seekable files, and a target opened for reading too (r+b)")
    if not _can("writable", target):
        raise ValueError("expected a target opened for writing (r+b)")
    if not _is_stream(target):
        end = target.tell() + size
        have = file_size(target)
        if have < end:
            # An ordinary file can be enlarged, a volume cannot. Only truncate knows which this is, but for a volume
            # that may be resized: that is not what somebody who copies has asked for.
            try:
                if _is_volume(target):
                    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
                target.truncate(end)
                if _appends(target):
                    target.truncate(have)  # what is written goes behind what is there
            except OSError as exc:
                raise CopyError(
                    f"the target is too small: {have} bytes, expected at least {end}", errno.ENOSPC
                ) from exc


def _check_sizes(size: int, block_size: int) -> None:
    if size < 0 or block_size <= 0:
        raise ValueError(f"expected size >= 0 and block_size > 0, not {size} and {block_size}")


def _blocks_ahead(file: IO[bytes], size: int, block_size: int, what: str) -> Generator[bytes, None, None]:
    """The next `size` bytes of the file in blocks, read ahead by a thread. Close the iterator to end the thread."""
    blocks: queue.Queue[bytes | BaseException] = queue.Queue(BLOCKS_AHEAD)
    stop = threading.Event()

    def read() -> None:
        try:
            for offset in range(0, size, block_size):
                if stop.is_set():
                    return
                blocks.put(_read_exactly(file, min(block_size, size - offset), offset, what))
        except BaseException as exc:
            blocks.put(exc)

    thread = threading.Thread(target=read, name="volfs-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(0, size, block_size):
            block = blocks.get()
            if isinstance(block, BaseException):
                raise block
            yield block
    finally:
        stop.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            try:
                blocks.get(timeout=0.05)
            except queue.Empty:
                pass


def _read_exactly(file: IO[bytes], length: int, offset: int, what: str) -> bytes:
    data: bytes | None = file.read(length)
    if data is not None and len(data) == length:
        return data
    parts = []
    missing = length
    while data:
        parts.append(data)
        missing -= len(data)
        if not missing:
            return b"".join(parts)
        data = file.read(missing)
    if data is None:
        raise _would_block()
    raise OSError(errno.ENODATA, f"the {what} ends at {offset + length - missing}")


def _write_all(file: IO[bytes], block: bytes) -> Iterator[int]:
    """Write all of the block; yields how much each call has written."""
    rest: bytes | memoryview = block  # RBDVolumeIOWrapper takes nothing but bytes
    while rest:
        written: int | None = file.write(rest)
        if written is None:
            # RBDVolumeIOWrapper has written all, a non-blocking raw file nothing.
            number = _descriptor(file)
            if number is not None and not os.get_blocking(number):
                raise _would_block()
            written = len(rest)
        if not written:
            raise OSError(errno.EIO, "the target takes no bytes, and tells no error")
        yield written
        rest = memoryview(rest)[written:]


def _would_block() -> OSError:
    return BlockingIOError(errno.EAGAIN, "a non-blocking file is not ready")


def _make_stable(file: IO[bytes]) -> None:
    file.flush()
    number = _descriptor(file)
    if number is not None:
        try:
            os.fsync(number)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a pipe or socket has nothing to make stable
                raise


def _uncached(file: IO[bytes], position: int) -> IO[bytes]:
    """The file at that position, without what the page cache and its own buffer remember."""
    number = _descriptor(file)
    if number is not None:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(position)
    raw: Any = getattr(file, "raw", None)
    if not isinstance(raw, io.RawIOBase):
        return file
    raw.seek(position)
    return raw  # type: ignore[return-value]


def _can(ability: str, file: IO[bytes]) -> bool:
    """Whether the file is `readable` or `writable`. RBDVolumeIOWrapper denies both, can both, and has no descriptor."""
    return _descriptor(file) is None or bool(getattr(file, ability)())


def _is_volume(file: IO[bytes]) -> bool:
    number = _descriptor(file)
    try:
        return number is not None and bool(os.getxattr(number, "user.volfs.source"))
    except OSError:
        return False


def _same(one: IO[bytes], other: IO[bytes]) -> bool:
    identity = _identity(one)
    return identity is not None and identity == _identity(other)


def _identity(file: IO[bytes]) -> str | None:
    """What the file is, whatever path, link, mount or URL led to it; None when nobody knows."""
    number = _descriptor(file)
    if number is None:
        return None
    try:
        told = os.fsdecode(os.getxattr(number, "user.volfs.identity"))
    except OSError:
        told = ""
    return told or local_identity(os.fstat(number))


def _is_stream(file: IO[bytes]) -> bool:
    """Whether the file has no size: a pipe, a socket; also a terminal or /dev/null, though one can seek there."""
    number = _descriptor(file)
    return not file.seekable() or (number is not None and stat.S_ISCHR(os.fstat(number).st_mode))


def _appends(file: IO[bytes]) -> bool:
    number = _descriptor(file)
    return number is not None and bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND)


def _descriptor(file: Any) -> int | None:
    try:
        return int(file.fileno())
    except (AttributeError, io.UnsupportedOperation, OSError):
        return None
