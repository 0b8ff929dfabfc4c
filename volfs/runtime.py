"""The directories for what lives until the machine goes down (sockets, logs, crash journal), or longer."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from volfs.errors import ControlError


def runtime_directory() -> str:
    """The user's directory for such files: $XDG_RUNTIME_DIR/volfs, /run/volfs for root, or /tmp/volfs-<uid>."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return os.path.join(base, "volfs")
    return "/run/volfs" if os.geteuid() == 0 else f"/tmp/volfs-{os.geteuid()}"


def private_directory(path: str) -> None:
    """Make sure of a directory that only this user can enter. ControlError when it is somebody else's."""
    try:
        with contextlib.suppress(FileExistsError):  # of something else, which is refused below
            os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as exc:
        raise ControlError(f"{path}: {exc.strerror}", exc.errno) from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ControlError(f"{path}: expected a directory of user {os.geteuid()}", errno.EPERM)
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise ControlError(
            f"{path}: others may write there (mode {stat.S_IMODE(status.st_mode):04o})", errno.EPERM
        )


def state_directory() -> str:
    """The user's directory for what outlives a restart: $XDG_STATE_HOME/volfs, or where that would be."""
    base = os.environ.get("XDG_STATE_HOME")
    if base:
        return os.path.join(base, "volfs")
    return "/var/lib/volfs" if os.geteuid() == 0 else os.path.expanduser("~/.local/state/volfs")
