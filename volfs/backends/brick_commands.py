"""The commands of os-brick's connectors, started in a way that is safe and quick in a process as large as ours.

os-brick's own way, by oslo.concurrency, gives subprocess a function to call between fork and exec. Python says that
this may deadlock where there are threads, as here, and has to copy the page tables of the whole process for it. Without
such a function it uses vfork, which copies nothing. An iSCSI login and logout take some twenty commands.

A few come not by here, for os-brick gives them to nobody: what it asks multipathd once for each connect and disconnect,
and iscsiadm when it is imported.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)

# What connectors say of a command. With anything else, os-brick itself runs it.
KNOWN = frozenset(
    [
        *("attempts", "check_exit_code", "delay_on_retry", "interval", "process_input"),
        *("root_helper", "run_as_root", "shell", "timeout"),
    ]
)
END_SECONDS = 2.0  # for a command to end by itself that took too long
LOOK_SECONDS = 0.02  # how soon it is seen that it has ended


class Commands:
    """Runs a connector's commands, as os-brick would by itself, but none for longer than `timeout` seconds.

    Remembers what failed: os-brick goes on after most failures, and what it raises in the end does not say why.
    Connectors call it from several threads.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.failures: list[Exception] = []

    def __call__(self, *command: object, **how: Any) -> tuple[str, str]:
        """What it said on stdout and stderr. ProcessExecutionError of oslo.concurrency, also where there is none."""
        how["timeout"] = min(how.get("timeout", self._timeout), self._timeout)
        words = [str(word) for word in command]
        try:
            if how.keys() <= KNOWN and (os.geteuid() == 0 or not how.get("run_as_root")):
                return _run(
                    words, **{key: how[key] for key in how if key not in ("root_helper", "run_as_root")}
                )
            from os_brick.privileged import rootwrap  # which asks a helper that is root

            said: tuple[str, str] = rootwrap.execute(*words, **how)
            return said
        except Exception as exc:
            self.failures.append(exc)
            raise


def _run(
    words: list[str],
    *,
    timeout: float,
    attempts: int = 1,
    check_exit_code: bool | int | Collection[int] | None = None,
    process_input: str | bytes | None = None,
    shell: bool = False,
    **pauses: Any,
) -> tuple[str, str]:
    """As os_brick.privileged.rootwrap.execute, but that a command which takes too long is an error unless none is."""
    from os_brick.exception import ExecutionTimeout
    from oslo_concurrency.processutils import ProcessExecutionError
    from oslo_utils import strutils

    data = process_input.encode() if isinstance(process_input, str) else process_input
    shown = strutils.mask_password(" ".join(words))
    for attempt in range(1, attempts + 1):
        if attempt > 1:
            time.sleep(_pause(attempt - 1, **pauses))
        began = time.monotonic()
        try:
            code, *said = _run_once(words, data, timeout, shell)
        except subprocess.TimeoutExpired:
            log.debug("%s: stopped after %g s", shown, timeout)
            why = f"Time out after {timeout:g} s"
            if check_exit_code is False:
                return "", why
            failure = ExecutionTimeout(stdout="", stderr=why, cmd=shown)
        except OSError as exc:
            failure = ProcessExecutionError(cmd=shown, description=str(exc))
        else:
            log.debug("%s: exit code %d after %.3f s", shown, code, time.monotonic() - began)
            stdout, stderr = map(os.fsdecode, said)
            if _is_accepted(code, check_exit_code):
                return stdout, stderr
            stdout, stderr = map(strutils.mask_password, (stdout, stderr))
            failure = ProcessExecutionError(exit_code=code, stdout=stdout, stderr=stderr, cmd=shown)
    raise failure


def _is_accepted(code: int, accepted: bool | int | Collection[int] | None) -> bool:
    if isinstance(accepted, bool):
        return code == 0 or not accepted
    if isinstance(accepted, int) or accepted is None:
        return code == (accepted or 0)
    return code in accepted


def _pause(failed: int, *, delay_on_retry: bool | None = None, interval: float = 1) -> float:
    """Seconds before the next attempt, after so many: some at random, or more and more."""
    if delay_on_retry is None:
        return interval * 2.0**failed
    return random.uniform(0.2, 2) if delay_on_retry else 0


def _run_once(words: list[str], data: bytes | None, timeout: float, shell: bool) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr. OSError, or TimeoutExpired when it was ended with all that it started."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        shell=shell,
        process_group=0,
    )
    try:
        stdout, stderr = process.communicate(data, timeout)
    except BaseException:
        _end(process)
        raise
    return process.returncode, stdout, stderr


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks it first. One that waits in the kernel, for a disk that is gone, ends at some later time."""
    if process.returncode is None:  # so that the number is still that of its group
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + END_SECONDS
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(os.P_PID, process.pid, ended) is None and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
