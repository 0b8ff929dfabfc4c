"""Running the daemon: in this process until it ends, or in the background until it is ready."""

from __future__ import annotations

import errno
import functools
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence

import trio

from volfs import control, daemon
from volfs.attached import check_name
from volfs.config import Config
from volfs.errors import ConfigError, ControlError, MountError, SourceError, VolfsError, printable
from volfs.runtime import private_directory
from volfs.source import parse_connection_info, parse_source

READY = b"ready"
LOG_FORMAT = "%(asctime)s volfs[%(process)d] %(levelname)s %(message)s"


def serve(
    config: Config,
    mountpoint: str,
    *,
    socket_path: str | None,
    exit_idle: float | None,
    ready: Callable[[], None],
) -> list[VolfsError]:
    """Mount and serve until unmounted; returns what did not reach the backends. `ready` is called when I/O works.

    MountError, ControlError, ConfigError when it cannot start.
    """
    _allow_many_files()
    mountpoint = os.path.abspath(mountpoint)
    try:
        mountpoint.encode()
    except UnicodeEncodeError as exc:  # clients are told of it in JSON
        raise MountError(
            f"{mountpoint}: expected a mountpoint whose path is UTF-8 text", errno.EINVAL
        ) from exc
    path = os.path.abspath(socket_path or control.default_socket())
    if config.mount.allow_other and config.mount.resolve_mode() & 0o002 and not config.mount.read_only:
        raise ConfigError("mount.mode: with allow_other, expected a mode that not everybody may write with")
    try:
        return trio.run(
            functools.partial(daemon.run, config, mountpoint, path, exit_idle=exit_idle, ready=ready)
        )
    except BaseExceptionGroup as group:
        # trio's nurseries wrap even a single exception.
        raise _single(group) from group


def serve_in_background(arguments: Sequence[str], socket_path: str | None) -> None:
    """Start `volfs mount ARGUMENTS` as a process of its own and return when I/O works. ControlError with its reason.

    Its log is `<control socket>.log`. A new process, not a fork: nothing of the caller is left in it.
    """
    path = os.path.abspath(socket_path or control.default_socket())
    log_path = path + ".log"
    private_directory(os.path.dirname(log_path))
    reader, writer = os.pipe()
    # Appended to: the log may be that of a daemon that serves at this socket already.
    log_number = os.open(
        log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    log_begin = os.fstat(log_number).st_size
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "volfs", "mount", *arguments, "--socket", path, "--ready-fd", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_number,
            pass_fds=(writer,),
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(writer)
        os.close(log_number)
    with os.fdopen(reader, "rb") as pipe:
        try:
            told = pipe.read()
        except BaseException:  # Ctrl-C: nobody is there any more to use it, or to unmount it
            process.terminate()
            process.wait()
            raise
        if told == READY:
            process.returncode = 0  # it goes on without us; keep subprocess from warning about that
            return
    code = process.wait()
    with open(log_path, "rb") as log_file:
        log_file.seek(log_begin)
        lines = [line for line in log_file.read().decode(errors="replace").splitlines() if line]
    text = lines[-1].removeprefix("volfs: ") if lines else f"the daemon ended with status {code}"
    raise ControlError(text, errno.ECONNABORTED)


def refuse_request(line: bytes) -> control.Failed | None:
    """What a daemon would answer to an attach request whose source or name is wrong, without one; else None."""
    request = control.decode_request(line)
    assert isinstance(request, control.Attach)
    try:
        if request.source is not None:
            parse_source(request.source, request.environment)
        else:
            parse_connection_info(request.connection_info, request.environment)
        if request.name is not None:
            check_name(request.name)
    except SourceError as exc:
        return control.failure(exc)
    return None


def tell_parent(number: int) -> None:
    """In the background process: tell `serve_in_background` that I/O works."""
    os.write(number, READY)
    os.close(number)


def log_to_stderr(*, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(LOG_FORMAT))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    if not verbose:
        logging.getLogger("pyfuse3").setLevel(logging.WARNING)


class _OneLine(logging.Formatter):
    """Each message is one line, whatever is in the names it tells. A traceback, a bug, has lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _allow_many_files() -> None:
    """Clients and volumes of the file driver take a descriptor each, and 1024 are soon used up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _single(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception that matters: ours before others, the first before the rest."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        exc = stack.pop(0)
        if isinstance(exc, BaseExceptionGroup):
            stack.extend(exc.exceptions)
        else:
            leaves.append(exc)
    return next((leaf for leaf in leaves if isinstance(leaf, VolfsError)), leaves[0])
