"""The exceptions volfs raises. All derive from OSError, so that the errno travels with the message.

VolfsError
 |- SourceError          a URL or connection info that names no volume (EINVAL)
 |- ConfigError          a setting that cannot be used (EINVAL)
 |- VolumeNotFound       no such pool, image, snapshot, target, LUN, device or file (ENOENT)
 |- BackendError         what the storage answered, with its own errno
 |   |- BackendTimeout   no answer within the deadline (ETIMEDOUT)
 |- ControlError         the daemon cannot be reached or does not understand (ECONNREFUSED, EPROTO, ...)
 |- MountError           the mountpoint cannot be used (ENOTDIR, EBUSY, ...)
 |- CopyError            a copy that stopped; tells the offset

A caller may catch plain OSError. Messages are one line, name what was wrong and what was expected, and never
contain secrets.
"""

from __future__ import annotations

import errno as errnos
import os


class VolfsError(OSError):
    """Base of all errors of volfs: `errno` as in errno(3), `strerror` one line for people."""

    default_errno = errnos.EIO

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(self.default_errno if errno is None else errno, printable(message))

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[object, ...]:
        # OSError would pickle (errno, message), the other way round from the constructor above.
        return type(self), (self.strerror, self.errno)


class SourceError(VolfsError):
    """The text or connection info does not name a volume."""

    default_errno = errnos.EINVAL


class ConfigError(VolfsError):
    """A setting is missing, unknown or of the wrong kind; the message names file, key and expectation."""

    default_errno = errnos.EINVAL


class VolumeNotFound(VolfsError):
    """The source names a volume that is not there."""

    default_errno = errnos.ENOENT


class BackendError(VolfsError):
    """The storage refused or failed; errno and message are the backend's own."""


class BackendTimeout(BackendError):
    """The storage did not answer within the deadline; the operation may or may not take effect later."""

    default_errno = errnos.ETIMEDOUT


class ControlError(VolfsError):
    """The daemon cannot be reached, or the two ends do not understand each other."""

    default_errno = errnos.ECONNREFUSED


class MountError(VolfsError):
    """The mountpoint is missing, taken, or not what was expected."""

    default_errno = errnos.ENOTDIR


class CopyError(VolfsError):
    """A copy or comparison that stopped at `offset` bytes from where it began; all before it was done."""

    def __init__(self, message: str, errno: int | None = None, *, offset: int = 0) -> None:
        super().__init__(message, errno)
        self.offset = offset

    def __reduce__(self) -> tuple[object, ...]:
        return _copy_error, (str(self.strerror), self.errno or self.default_errno, self.offset)


def _copy_error(message: str, errno: int, offset: int) -> CopyError:
    return CopyError(message, errno, offset=offset)


def error_text(exc: BaseException) -> str:
    """One line for people: our own message as it is, a plain OSError as `strerror: filename`."""
    if isinstance(exc, OSError) and not isinstance(exc, VolfsError) and exc.errno:
        where = f"{exc.filename}: " if exc.filename else ""
        return printable(f"{where}{exc.strerror or os.strerror(exc.errno)}")
    return printable(str(exc)) or type(exc).__name__


def printable(text: str) -> str:
    """One line, whatever is in the names it tells: line ends, escapes of a terminal and stray bytes are spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
