"""A volfs daemon as a user runs it: a process of its own, mounted, talked to with the command and the kernel."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services import SLOWER, skip_or_fail

START_SECONDS = 30.0 * SLOWER
STOP_SECONDS = 30.0 * SLOWER
VOLFS = [sys.executable, "-m", "volfs"]


def run_volfs(
    *arguments: str | Path, env: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the volfs command; its output is text, its exit code is the caller's to judge."""
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [*VOLFS, *map(str, arguments)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120 * SLOWER,
        check=False,
        **more,
    )


@dataclass
class Mount:
    """A mounted daemon. `log` is what it wrote to stderr so far."""

    path: Path
    socket: Path
    process: subprocess.Popen[str]
    log_path: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def volfs(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the volfs command as a client of this daemon."""
        return run_volfs(*arguments, env={**self.environment, "VOLFS_SOCKET": str(self.socket)})

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextlib.contextmanager
def mounted(
    directory: Path,
    prefixes: Sequence[str],
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    mountpoint: Path | None = None,
    volfs: Sequence[str] = VOLFS,
) -> Iterator[Mount]:
    """`volfs mount`, below `directory` unless there is a `mountpoint`, ready for I/O; unmounted at the end.

    The daemon must then end by itself with success and without a traceback in its log, unless the test ended it.
    """
    require_fuse()
    path = mountpoint or directory / "mnt"
    socket, log_path = directory / "control", directory / "volfs.log"
    if not is_mounted(path):  # by a daemon that was killed, which mkdir does not get past
        path.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    command = [*volfs, "mount", str(path), *prefixes, "--socket", str(socket), *options]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **(env or {})}
        )
    mount = Mount(path, socket, process, log_path, dict(env or {}))
    try:
        _wait_ready(mount)
        yield mount
        if process.poll() is None:
            assert mount.stop() == 0, f"the daemon ended with {process.returncode}:\n{mount.log}"
        assert "Traceback" not in mount.log, mount.log
    finally:
        print(f"log of the daemon at {path}:\n{mount.log}")  # pytest shows it when the test failed
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if is_mounted(path):
            subprocess.run(["umount", "-l", str(path)], check=False)


def require_fuse() -> None:
    """Skip, or fail where it is required, when nothing can be mounted here."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        skip_or_fail("fuse", "/dev/fuse is missing or not for this user")
    if shutil.which("fusermount3") is None:
        skip_or_fail("fuse", "fusermount3 is not installed (scripts/setup)")


def wait_until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Poll a condition that nothing announces. Fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def _wait_ready(mount: Mount) -> None:
    assert mount.process.stdout is not None
    ready, _, _ = select.select([mount.process.stdout], [], [], START_SECONDS)
    line = mount.process.stdout.readline() if ready else ""
    assert re.search(": ready ", line), f"volfs mount is not ready: {line!r}\n{mount.log}"


def is_mounted(path: Path) -> bool:
    return any(line.split()[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())
