"""The mount itself: checking the mountpoint, mounting, the main loop, unmounting. One in a process (pyfuse3's rule)."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3
import trio

from volfs.errors import MountError
from volfs.fuse import helper
from volfs.fuse.filesystem import Filesystem
from volfs.fuse.requests import Requests

log = logging.getLogger(__name__)

NAME = "volfs"  # of the file system, in /proc/mounts: "fuse.volfs" with source "volfs", free of '/' (see facts on df)
UNMOUNT_SECONDS = 30.0
# Requests for names, attributes, opens and flushes handled at once, of which those of a hung backend must leave some to
# the others. Reads and writes do not pass there (requests.py): as many as the kernel lets through, MAX_BACKGROUND and
# one for each thread of a program that waits for one.
MAX_REQUESTS = 512
IDLE_WORKERS = 16  # tasks of pyfuse3 that wait for requests; each has a buffer of 1 MiB, costly to make anew
# Of these, read-ahead and other buffered requests: the kernel's 12 do not fill our read-ahead, and a dozen readers of
# one hung backend would take them all from the others.
MAX_BACKGROUND = 256


def prepare_mountpoint(path: str) -> None:
    """Refuse a mountpoint that is missing, no directory, not empty or mounted on already. MountError.

    What a killed volfs left mounted (every access answers ENOTCONN) is unmounted first.
    """
    try:
        # It always asks; what stat(2) tells, the kernel may remember of a daemon that just died.
        os.statvfs(path)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise MountError(f"{path}: {exc.strerror}", exc.errno) from exc
        log.warning("%s: unmounting what a dead daemon left behind", path)
        unmount(path, lazy=True)
    if not os.path.isdir(path):
        raise MountError(f"{path}: expected a directory to mount on", errno.ENOTDIR)
    if os.path.ismount(path):
        raise MountError(f"{path}: something is mounted there already", errno.EBUSY)
    if os.listdir(path):
        raise MountError(f"{path}: expected an empty directory; its files would be hidden", errno.ENOTEMPTY)
    if not os.path.exists("/dev/fuse"):
        raise MountError("/dev/fuse is missing: load the kernel's fuse module (modprobe fuse)", errno.ENODEV)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError(
            "/dev/fuse: this user may not open it; root can allow it: chmod 0666 /dev/fuse", errno.EACCES
        )


@contextmanager
def mounted(filesystem: Filesystem, path: str, *, allow_other: bool) -> Iterator[Requests]:
    """Mount, and unmount at the end; lazily, so that files still open do not keep it. `serve` what it yields."""
    options = set(pyfuse3.default_options) | {f"fsname={NAME}", f"subtype={NAME}"}
    if allow_other:
        options.add("allow_other")
    requests = Requests(filesystem)
    if helper is not None:
        helper.configure(MAX_BACKGROUND, requests)
    try:
        pyfuse3.init(filesystem, path, options)
    except RuntimeError as exc:
        # libfuse has written the reason to stderr, where it comes from fusermount3 or mount(2).
        raise MountError(
            f"{path}: cannot mount: {exc}; is /dev/fuse accessible, fuse3 installed?", errno.EPERM
        ) from exc
    try:
        yield requests
    finally:
        pyfuse3.close(unmount=True)


async def serve(requests: Requests) -> None:
    """Answer the kernel until the file system is unmounted or `stop` is called; requests under way are finished."""
    await requests.serve(IDLE_WORKERS, MAX_REQUESTS)


def stop() -> None:
    """Make `serve` return."""
    pyfuse3.terminate()


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount as umount(8) does. MountError (EBUSY) while files are open, unless `lazy`. Blocks."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    english = {**os.environ, "LC_ALL": "C"}  # the reason is only in its words
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=UNMOUNT_SECONDS, check=False, env=english
        )
    except FileNotFoundError as exc:
        raise MountError("fusermount3 is missing: install fuse3", errno.ENOENT) from exc
    except subprocess.TimeoutExpired as exc:
        raise MountError(
            f"{path}: fusermount3 did not end in {UNMOUNT_SECONDS:g} s", errno.ETIMEDOUT
        ) from exc
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"{path}: fusermount3 failed"])[-1]
        raise MountError(reason, errno.EBUSY if os.strerror(errno.EBUSY) in reason else errno.EIO)


def tune(path: str, read_ahead: int) -> None:
    """Set the kernel's read-ahead for this mount, where we may (root). Blocks: it asks the mount for its number.

    `read_ahead` bytes instead of 128 KiB, which halve the speed of dd and cp.
    """
    device = os.stat(path).st_dev
    limit = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(limit, "w") as file:
            file.write(str(read_ahead // 1024))
    except OSError as exc:
        log.debug("%s stays at the kernel's default: %s", limit, exc.strerror)
    if helper is None or not helper.hooked():
        log.info(
            "without the compiled helper fuse_session: no holes (all is data, none can be made), no copies inside the"
            " daemon, at most 12 buffered requests at once"
        )


async def wait_ready(path: str, inside: str) -> None:
    """Return when the mount answers: the kernel asks, the main loop replies."""
    # Abandoned when we are to stop before that: nobody would answer it any more.
    await trio.to_thread.run_sync(os.stat, os.path.join(path, inside), abandon_on_cancel=True)
