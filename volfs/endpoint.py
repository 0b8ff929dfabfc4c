"""Copying and comparing between two named sides: sources, paths on a mount, block devices, ordinary files."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO

from volfs.api import mount_attribute, open_volume, path_error
from volfs.backends import is_url
from volfs.comparing import compare_volume_data
from volfs.copying import copy_volume_data
from volfs.descriptors import file_size, uncached
from volfs.errors import CopyError, MountError, VolfsError

Shown = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Summary:
    """What a comparison did. `size` in bytes, `seconds` of wall time."""

    source: str
    target: str
    size: int
    seconds: float
    verified: bool

    def __str__(self) -> str:
        rate = self.size / max(self.seconds, 1e-6) / 1e6
        took = f"{self.seconds:.1f} s ({rate:.0f} MB/s)"
        return f"{self.source} -> {self.target}: {self.size} bytes compared: identical in {took}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class CopySummary(Summary):
    """What a copy did; `data`: as many of the bytes were data, the others holes or zeros.

    What is before `resumed_at` was done by an earlier copy, and does not count.
    """

    data: int
    resumed_at: int = 0

    def __str__(self) -> str:
        # Of the data alone: a terabyte of nothing is no feat.
        rate = self.data / max(self.seconds, 1e-6) / 1e6
        size = self.size - self.resumed_at
        text = (
            f"{self.source} -> {self.target}: {size} bytes copied in {self.seconds:.1f} s ({rate:.0f} MB/s)"
        )
        text += f", from offset {self.resumed_at} on" if self.resumed_at else ""
        return text if self.data == size else f"{text}; {self.data} of them data, the rest holes"


@dataclass(frozen=True)
class Endpoint:
    """An open side. `size` in bytes, when it was opened; `ordinary`: a file whose size follows what is written."""

    name: str
    file: IO[bytes]
    size: int
    ordinary: bool


def copy(source: str, target: str, *, progress: Shown | None = None) -> CopySummary:
    """Copy all of `source` over the beginning of `target`. Errors as copy_volume_data and open_volume."""
    start = time.monotonic()
    with open_endpoint(source) as from_side, open_endpoint(target, writable=True) as to_side:
        size = from_side.size
        data = copy_volume_data(from_side.file, to_side.file, size, progress=_with_total(progress, size))
        cut(to_side, size)
    return CopySummary(source, target, size, time.monotonic() - start, verified=False, data=data)


def cut(target: Endpoint, size: int) -> None:
    """An ordinary file ends with its copy: what an older, longer one had behind that is not the volume's."""
    if target.ordinary:
        os.ftruncate(target.file.fileno(), size)
        os.fsync(target.file.fileno())


def verify(source: str, target: str, *, progress: Shown | None = None) -> Summary:
    """Compare all of `source` with as much of `target`. CopyError (EILSEQ) where they differ."""
    start = time.monotonic()
    with open_endpoint(source) as one, open_endpoint(target) as other:
        if other.size < one.size:
            raise CopyError(
                f"{target} has {other.size} bytes, {source} has {one.size}", errno.EILSEQ, offset=other.size
            )
        # What the page cache remembers is not what the storage has, and others may keep it there.
        files = uncached(one.file, 0), uncached(other.file, 0)
        compare_volume_data(*files, one.size, progress=_with_total(progress, one.size))
    return Summary(source, target, one.size, time.monotonic() - start, verified=True)


@contextmanager
def open_endpoint(text: str, *, writable: bool = False) -> Iterator[Endpoint]:
    """Open a side, and close it at the end. An ordinary file that is not there is made when `writable`.

    Nothing is truncated here: a target keeps its content until the first byte is written. It is opened for writing
    alone: what reads as well may be mapped, and must be asked for dirty pages each time the mount looks for holes.
    """
    file = open_volume(text, "wb" if writable else "rb", 0) if is_url(text) else _open_path(text, writable)
    try:
        ordinary = not is_url(text) and stat.S_ISREG(os.fstat(file.fileno()).st_mode) and not _on_mount(text)
        yield Endpoint(text, file, file_size(file), ordinary)
    finally:
        file.close()


def _open_path(path: str, writable: bool) -> IO[bytes]:
    # O_NONBLOCK: a FIFO would make us wait for its other end; files and block devices ignore it.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_WRONLY | os.O_CREAT if writable else os.O_RDONLY)
    try:
        number = os.open(path, flags, 0o600)
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # a socket, or a FIFO that nobody reads
            raise _no_file(path) from exc
        raise path_error(path, exc) from exc
    mode = os.fstat(number).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(number)
        raise _no_file(path)
    return os.fdopen(number, "wb" if writable else "rb", 0)


def _no_file(path: str) -> VolfsError:
    return VolfsError(f"{path}: expected a file, a volume or a block device", errno.EINVAL)


def _on_mount(path: str) -> bool:
    try:
        mount_attribute(path, "source")
    except MountError:
        return False
    return True


def _with_total(progress: Shown | None, total: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(done, total)
