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
from volfs.fuse.filesystem import Filesystem

log = logging.getLogger(__name__)

NAME = "volfs"  # of the file system, in /proc/mounts: "fuse.volfs" with source "volfs", free of '/' (see facts on df)
UNMOUNT_SECONDS = 30.0


def prepare_mountpoint(path: str) -> None:
    """Refuse a mountpoint that is missing, no directory, not empty or mounted on already. MountError.

    What a killed volfs left mounted (every access answers ENOTCONN) is unmounted first.
    """
    try:
        if not os.path.isdir(path):
            os.stat(path)
            raise MountError(f"{path}: expected a directory to mount on", errno.ENOTDIR)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise MountError(f"{path}: {exc.strerror}", exc.errno) from exc
        log.warning("%s: unmounting what a dead daemon left behind", path)
        unmount(path, lazy=True)
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
def mounted(filesystem: Filesystem, path: str, *, allow_other: bool) -> Iterator[None]:
    """Mount, and unmount at the end; lazily, so that files still open do not keep it."""
    options = set(pyfuse3.default_options) | {f"fsname={NAME}", f"subtype={NAME}"}
    if allow_other:
        options.add("allow_other")
    try:
        pyfuse3.init(filesystem, path, options)
    except RuntimeError as exc:
        # libfuse has written the reason to stderr, where it comes from fusermount3 or mount(2).
        raise MountError(
            f"{path}: cannot mount: {exc}; is /dev/fuse accessible, fuse3 installed?", errno.EPERM
        ) from exc
    try:
        yield
    finally:
        pyfuse3.close(unmount=True)


async def serve() -> None:
    """Answer the kernel until the file system is unmounted or `stop` is called; requests under way are finished."""
    await pyfuse3.main()


def stop() -> None:
    """Make `serve` return."""
    pyfuse3.terminate()


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount as umount(8) does. MountError (EBUSY) while files are open, unless `lazy`. Blocks."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=UNMOUNT_SECONDS, check=False)
    except FileNotFoundError as exc:
        raise MountError("fusermount3 is missing: install fuse3", errno.ENOENT) from exc
    except subprocess.TimeoutExpired as exc:
        raise MountError(
            f"{path}: fusermount3 did not end in {UNMOUNT_SECONDS:g} s", errno.ETIMEDOUT
        ) from exc
    if done.returncode:
        raise MountError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else path, errno.EBUSY)


def set_read_ahead(path: str, size: int) -> None:
    """Let the kernel read ahead `size` bytes; its default of 128 KiB halves the speed of dd and cp. Needs root."""
    device = os.stat(path).st_dev
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w") as file:
            file.write(str(size // 1024))
    except OSError as exc:
        log.info("read-ahead stays at the kernel's default: %s", exc.strerror)


async def wait_ready(path: str, inside: str) -> None:
    """Return when the mount answers: the kernel asks, the main loop replies."""
    await trio.to_thread.run_sync(os.stat, os.path.join(path, inside))
