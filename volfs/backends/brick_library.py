"""os-brick, as this program uses it: set up once a process, its connectors made, its errors and logs put into ours.

All that imports os_brick or oslo is here and in brick_commands.py, and is imported when a volume is first connected.
Everything here blocks: brick_connection.py calls it in threads. os-brick's settings are those of its own documentation;
two of them, `lock_path` and `root_helper`, are global to a process.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import msgspec

from volfs.backends.brick_commands import Commands
from volfs.errors import BackendError, BackendTimeout, VolfsError, VolumeNotFound, printable
from volfs.native import load_first
from volfs.runtime import private_directory, runtime_directory

log = logging.getLogger(__name__)

# Mounted rather than logged in to; the factory wants to know below which directory.
REMOTE_FILE_SYSTEMS = ("nfs", "glusterfs", "scality", "quobyte", "vzstorage")
# Their connectors tell the paths of a volume without doing anything for it.
SCSI = ("iscsi", "iser", "fibre_channel")

# Exit codes of iscsiadm (iscsi_err.h of open-iscsi, also in iscsiadm(8)).
ISCSIADM_ERRNOS = {
    4: errno.ECONNREFUSED,  # transport
    8: errno.ETIMEDOUT,  # connection timed out
    11: errno.ETIMEDOUT,
    13: errno.EACCES,  # the command itself, not root
    18: errno.ECONNREFUSED,  # iscsid cannot be spoken to
    19: errno.EREMOTEIO,  # login failed for good: no such target, as a rule
    20: errno.ECONNREFUSED,  # iscsid does not run
    24: errno.EACCES,  # CHAP
}
MAX_LINES = 4  # of what a command says, in an error
_COMMAND_NOT_FOUND = 127
_NO_NAME_SERVICE = "EVENTLET_NO_GREENDNS"  # a variable of the environment, for when eventlet is imported
_SECRET_KEYS = ("keyring",)  # that oslo does not know as such

Data = Mapping[str, Any]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How os-brick is to connect; see ConnectorSettings. All of it goes into the journal."""

    root_helper: str
    lock_path: str
    use_multipath: bool
    enforce_multipath: bool
    device_scan_attempts: int


class Connector(Protocol):
    """What we call of os_brick.initiator.initiator_connector.InitiatorConnector."""

    def connect_volume(self, connection_properties: dict[str, Any]) -> dict[str, Any]: ...

    def disconnect_volume(
        self,
        connection_properties: dict[str, Any],
        device_info: dict[str, Any],
        force: bool = False,
        ignore_errors: bool = False,
    ) -> None: ...

    def extend_volume(self, connection_properties: dict[str, Any]) -> int | None: ...

    def get_volume_paths(self, connection_properties: dict[str, Any]) -> list[str]: ...


_setup_lock = threading.Lock()
_setup: Options | None = None


def make_connector(protocol: str, data: Data, options: Options, timeout: float) -> tuple[Connector, Commands]:
    """A connector for volumes like that of `data`, and what it runs commands with. BackendError.

    `set_up` was called before.
    """
    module = _import()
    commands = Commands(timeout)
    more: dict[str, Any] = {}
    if protocol in REMOTE_FILE_SYSTEMS:
        # A directory of our own: a mount there is nobody else's, and may be taken away again. Cinder names that of
        # Nova, whose mounts nobody may unmount who is not Nova.
        base = mount_base()
        more = {"conn": dict(data), f"{protocol}_mount_point_base": base}
    with errors(commands, f"os-brick: {protocol}", data):
        made: Connector = module.InitiatorConnector.factory(
            protocol,
            options.root_helper,
            use_multipath=options.use_multipath,
            device_scan_attempts=options.device_scan_attempts,
            execute=commands,
            **more,
        )
    return made, commands


def mount_point(connector: Connector, data: Data) -> str:
    """Where a connector of REMOTE_FILE_SYSTEMS mounts the file system that has the volume; "" for other connectors."""
    client = getattr(connector, "_remotefsclient", None)
    return "" if client is None else str(client.get_mount_point(data.get("export")))


def mount_base() -> str:
    """Below which directory file systems are mounted."""
    path = os.path.join(runtime_directory(), "mounts")
    private_directory(path)
    return path


def without_secrets(data: Data) -> dict[str, Any]:
    """The data without what oslo takes for a secret, at any depth."""
    _import()
    from oslo_utils import strutils

    hidden = object()

    def keep(key: str) -> bool:
        masked = strutils.mask_dict_password({key: 0}, secret=hidden)  # type: ignore[arg-type, unused-ignore]
        return masked[key] is not hidden and not any(word in key.lower() for word in _SECRET_KEYS)

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): strip(inner) for key, inner in value.items() if keep(str(key))}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [strip(inner) for inner in value]
        return value

    stripped: dict[str, Any] = strip(data)
    return stripped


@contextmanager
def errors(commands: Commands | None, doing: str, data: Data) -> Iterator[None]:
    """Turn what os-brick raises into our errors."""
    try:
        yield
    except VolfsError:
        raise
    except Exception as exc:
        raise error(exc, commands, doing, data) from exc


def error(exc: Exception, commands: Commands | None, doing: str, data: Data) -> VolfsError:
    """What os-brick raised, as one of ours: an errno, and one line without the secrets of `data`."""
    if isinstance(exc, VolfsError):
        return exc
    cause = _cause(exc)
    name = type(cause).__name__
    # "Not found" is all that is known after a login that failed, and each mount that failed has a page of its own; the
    # command that failed last says it in a line.
    if (
        name in ("VolumeDeviceNotFound", "TargetPortalNotFound", "TargetPortalsNotFound", "BrickException")
        and commands
    ):
        cause = next(filter(_is_command, reversed(commands.failures)), cause)
    text = _without(_text(cause), data)
    if type(cause).__name__ == "ExecutionTimeout":
        return BackendTimeout(f"{doing}: {text}")
    if _is_command(cause):
        return BackendError(f"{doing}: {text}", _command_errno(cause))
    if name in ("VolumeDeviceNotFound", "VolumePathsNotFound", "NotFound"):
        return VolumeNotFound(f"{doing}: {text}")
    if name in ("TargetPortalNotFound", "TargetPortalsNotFound"):
        return BackendError(f"{doing}: {text}", errno.EHOSTUNREACH)
    if isinstance(cause, NotImplementedError):
        return BackendError(f"{doing}: not offered by os-brick", errno.EOPNOTSUPP)
    if isinstance(cause, (KeyError, ValueError, TypeError, AttributeError)):
        # Of a connection info that is not what the connector expects; it does not check.
        return BackendError(f"{doing}: {name}: {text}", errno.EINVAL)
    number = cause.errno if isinstance(cause, OSError) else None
    return BackendError(f"{doing}: {text}", number or errno.EIO)


def _import() -> Any:
    """os_brick.initiator.connector. BackendError when os-brick is not installed."""
    # os-brick loads python-rbd, after which the rbd driver could not use it. Where the helper is missing, that says so.
    with suppress(ImportError):
        load_first("rbd_image")
    try:
        logging.getLogger("oslo_service").setLevel(logging.WARNING)  # tells what it is imported for
        with warnings.catch_warnings(), _without_name_service():
            warnings.simplefilter("ignore")  # of its libraries, of what they will not have in future versions
            from os_brick.initiator import connector
    except ImportError as exc:
        raise BackendError(
            f"the brick driver needs os-brick (pip install 'volfs[brick]'): {exc}", errno.EOPNOTSUPP
        ) from exc
    return connector


@contextmanager
def _without_name_service() -> Iterator[None]:
    """Have eventlet, which os-brick's libraries load and nobody uses here, leave out its own: a quarter of the time."""
    before = os.environ.get(_NO_NAME_SERVICE)
    os.environ[_NO_NAME_SERVICE] = "yes"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_NAME_SERVICE]
        else:
            os.environ[_NO_NAME_SERVICE] = before


def set_up(options: Options, *, trial: bool = False) -> None:
    """os-brick's own set-up. BackendError when it was set up otherwise, but for a `trial`, after which it may be."""
    global _setup
    with _setup_lock:
        if _setup is not None:
            for key in ("lock_path", "root_helper"):
                before, wanted = getattr(_setup, key), getattr(options, key)
                if before != wanted:
                    raise BackendError(
                        f"os-brick has one {key} for a process: {before!r} already, not {wanted!r} as well",
                        errno.EINVAL,
                    )
            return
        _import()
        import os_brick
        from os_brick import privileged
        from oslo_concurrency import lockutils
        from oslo_config import cfg
        from oslo_privsep import priv_context

        if options.lock_path == default_lock_path():
            private_directory(runtime_directory())
            private_directory(options.lock_path)
        elif not os.path.isdir(options.lock_path):
            raise BackendError(f"lock_path: {options.lock_path}: no such directory", errno.ENOENT)
        lockutils.set_defaults(options.lock_path)
        os_brick.setup(cfg.CONF)
        if os.geteuid() == 0:
            # In this process: we may do it all, and a helper of its own would be one more thing to outlive us.
            for context in (privileged.default, privileged.brick_privsep_hide_output):
                context.set_client_mode(False)
        else:
            priv_context.init(root_helper=shlex.split(options.root_helper))
        for name in ("os_brick", "oslo_privsep", "oslo_concurrency", "brick_privsep_hide_output"):
            logger = logging.getLogger(name)
            logger.handlers = [_OneLine()]
            logger.propagate = False
        if not trial:
            _setup = options


def default_lock_path() -> str:
    return os.path.join(runtime_directory(), "os-brick")


class _OneLine(logging.Handler):
    """os-brick's log in ours. It logs a traceback where a target refuses a login; a line says it as well."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelno if record.levelno < logging.INFO else record.levelno - 10
        if not log.isEnabledFor(level):
            return
        try:
            from oslo_utils import strutils

            text = strutils.mask_password(record.getMessage())
            if record.exc_info and isinstance(record.exc_info[1], Exception):
                text = f"{text}: {_text(record.exc_info[1])}"
            log.log(level, "%s: %s", record.name, printable(text))
        except Exception:
            self.handleError(record)


def _cause(exc: Exception) -> Exception:
    """Of an ExceptionChainer, whose text is all the tracebacks in it, the first exception."""
    for _, inner, _ in getattr(exc, "_exceptions", ()):
        return _cause(inner)
    return exc


def _is_command(exc: Exception) -> bool:
    return hasattr(exc, "stderr") and hasattr(exc, "exit_code")


def _text(exc: Exception) -> str:
    """One line: of a command that failed its name and what it said, for its arguments may be secret."""
    exc = _cause(exc)
    if not _is_command(exc):
        lines = str(getattr(exc, "msg", None) or exc).strip().splitlines()
        return lines[0] if lines else type(exc).__name__
    failed: Any = exc
    words = (failed.cmd or "").split()
    command = os.path.basename(words[0]) if words else "command"
    lines = (failed.stderr or failed.stdout or "").splitlines()
    said = [line.strip().removeprefix(f"{command}:").strip() for line in lines if line.strip()]
    why = "; ".join(said[:MAX_LINES]) or failed.description or f"exit code {failed.exit_code}"
    return f"{command}: {why}"


def _command_errno(exc: Any) -> int:
    words = (exc.cmd or "").split()
    if exc.exit_code == _COMMAND_NOT_FOUND or "No such file or directory" in str(exc.description):
        return errno.EOPNOTSUPP  # it is not installed
    if words and os.path.basename(words[0]) == "iscsiadm":
        return ISCSIADM_ERRNOS.get(exc.exit_code, errno.EIO)
    return errno.EIO


def _without(text: str, data: Data) -> str:
    """The text with the secrets of `data` spelt ***, wherever they come from."""
    shown = without_secrets(data)

    def secrets(value: Any, kept: Any) -> list[str]:
        if isinstance(value, Mapping):
            pairs = (
                (inner, kept.get(key) if isinstance(kept, Mapping) else None) for key, inner in value.items()
            )
            return [found for inner, other in pairs for found in secrets(inner, other)]
        return [value] if isinstance(value, str) and value and kept is None else []

    for secret in secrets(data, shown):
        text = text.replace(secret, "***")
    return text
