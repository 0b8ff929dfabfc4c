"""Copying what is attached, from path to path: by Cinder's dd, or by `volfs copy`."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from cinder import exception, utils
from cinder.volume import throttling, volume_utils

from volfs.cinder import options

log = logging.getLogger(__name__)

MIB = 1 << 20
SECTOR = 512
KEPT_LINES = 5  # of what a copy that failed has said


def copy(
    source: Any, target: Any, size: int, settings: Any, *, block_size: str, blank: bool, title: str
) -> None:
    """Copy `size` bytes, or all of a smaller source, and return when that is done; what cannot be written is an error.

    `source` and `target` are what os-brick's connectors return: paths, or handles, which only Cinder's loop copies.
    On a target that is `blank`, and reads as zeros everywhere, dd leaves out what is zero.
    """
    _expect_room(source, target, size)
    if settings.copy_method == options.VOLFS and isinstance(source, str) and isinstance(target, str):
        _copy_by_volfs(source, target, size, settings.verify, title)
    else:
        volume_utils.copy_volume(source, target, -(-size // MIB), block_size, sparse=blank)


def size_of(path: Any) -> int | None:
    """Bytes of a volume's file or device, which this user need not be allowed to open, or of os-brick's handle; None
    when they cannot be told.
    """
    try:
        if not isinstance(path, str):
            position = path.tell()
            path.seek(0, os.SEEK_END)
            end = int(path.tell())
            path.seek(position)
            return end
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
        device = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        return int(Path(f"/sys/dev/block/{device}/size").read_text()) * SECTOR
    except OSError:
        return None


def _expect_room(source: Any, target: Any, size: int) -> None:
    """dd would find at the end that there is too little: the header of encryption takes some, with most drivers."""
    length, room = size_of(source), size_of(target)
    needed = size if length is None else min(size, length)
    if room is not None and room < needed:
        reason = f"volfs: the new volume takes {room} bytes, {needed - room} less than there are to copy"
        raise exception.VolumeBackendAPIException(data=reason)


def _copy_by_volfs(source: str, target: str, size: int, verify: bool, title: str) -> None:
    """In a process of its own, throttled as dd would be: neither this service's loop nor its interpreter waits."""
    throttle = throttling.Throttle.get_default() or throttling.Throttle()
    with throttle.subcommand(source, target) as prefix:
        root_helper, program = _program(source, target)
        command = [*root_helper, *prefix["prefix"], *program, "copy", *(["--verify"] if verify else [])]
        begin = time.monotonic()
        said: deque[str] = deque(maxlen=KEPT_LINES)
        with subprocess.Popen(
            [*command, source, target],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                # A line every few seconds tells how far it is.
                for line in process.stdout:
                    said.append(line.strip())
                    log.info("%s: %s", title, said[-1])
            except BaseException:
                process.kill()
                raise
    if process.returncode:
        reason = said[-1].removeprefix("volfs: ") if said else f"exit code {process.returncode}"
        raise exception.VolumeBackendAPIException(data=f"volfs copy: {reason}")
    seconds = max(time.monotonic() - begin, 0.001)
    log.info("%s: %d MiB in %.2f s, %.0f MiB/s", title, size // MIB, seconds, size / MIB / seconds)


def _program(source: str, target: str) -> tuple[list[str], list[str]]:
    """What makes a command root's, and how to call volfs: as root where this user may not open both."""
    if os.access(source, os.R_OK) and os.access(target, os.R_OK | os.W_OK):
        return [], [sys.executable, "-m", "volfs"]
    return utils.get_root_helper().split(), ["volfs"]  # as volfs.filters has it
