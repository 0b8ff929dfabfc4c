"""Ceph's daemons of the private services, standing still or dead for a while; they run again afterwards, for others."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from mounts import wait_until
from services import Services, script, services_command

END_SECONDS = 10.0


def pid_of(services: Services, daemon: str) -> int:
    """Of "ceph-osd" or "ceph-mon"."""
    return int(script.running(script.Place(services.var))[daemon])


@contextlib.contextmanager
def standing_still(services: Services, daemon: str) -> Iterator[None]:
    """The daemon keeps its connections and answers nothing."""
    pid = pid_of(services, daemon)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed(services: Services, daemon: str) -> Iterator[None]:
    """The daemon has died; at the end it is started again, and serves."""
    os.kill(pid_of(services, daemon), signal.SIGKILL)
    try:
        wait_until(
            lambda: daemon not in script.running(script.Place(services.var)),
            f"{daemon} is gone",
            END_SECONDS,
        )
        yield
    finally:
        started = services_command("start", var=services.var)
        assert started.returncode == 0, started.stderr
