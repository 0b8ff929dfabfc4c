"""Holes of files as programs see and make them: lseek(2) and fallocate(2), of which Python offers little."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from disks import opened

KEEP_SIZE, PUNCH, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
BOTH_ZEROINGS = {"punch": PUNCH | KEEP_SIZE, "zero": ZERO, "zero-keep-size": ZERO | KEEP_SIZE}

libc = ctypes.CDLL(None, use_errno=True)

Run = tuple[int, int]  # begin and end


def fallocate(file: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(file, mode, ctypes.c_long(offset), ctypes.c_long(length)) == -1:
        raise OSError(ctypes.get_errno(), f"fallocate: {os.strerror(ctypes.get_errno())}")


def punch(file: int, offset: int, length: int) -> None:
    fallocate(file, PUNCH | KEEP_SIZE, offset, length)


def data_of(file: int) -> list[Run]:
    """Where the file has data, as lseek(2) tells: in order, apart from each other, each within the file."""
    size = os.fstat(file).st_size
    runs: list[Run] = []
    end = 0
    while end < size:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                break
            raise
        assert not runs or begin > end, f"data at {begin} after data that ends at {end}"
        end = os.lseek(file, begin, os.SEEK_HOLE)
        assert begin < end <= size, f"a hole at {end} after data at {begin} of {size}"
        runs.append((begin, end))
    return runs


def data_of_path(path: Path) -> list[Run]:
    with opened(path, os.O_RDONLY) as file:
        return data_of(file)


def length_of(runs: list[Run]) -> int:
    return sum(end - begin for begin, end in runs)


def assert_hides_nothing(runs: list[Run], content: bytes | bytearray) -> None:
    """All that is not zero lies in the runs."""
    at = 0
    for begin, end in [*runs, (len(content), len(content))]:
        hidden = content[at:begin].lstrip(b"\0")
        assert not hidden, f"data at {begin - len(hidden)} is in a hole; data is only at {runs}"
        at = end


def allocated(path: Path) -> int:
    """Bytes, as stat(2) tells."""
    return path.stat().st_blocks * 512
