"""A volfs daemon as a user runs it: a process of its own, mounted, talked to with the command and the kernel."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 30.0
VOLFS = [sys.executable, "-m", "volfs"]


def run_volfs(*arguments: str | Path, env: Mapping[str, str] | None = None, **more: object) -> subprocess.CompletedProcess[str]:
    """Run the volfs command; its output is text, its exit code is the caller's to judge."""
    environment = {**os.environ, **(env or {})}
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*VOLFS, *map(str, arguments)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
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
    directory: Path, prefixes: Sequence[str], options: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Mount]:
    """`volfs mount` below `directory`, ready for I/O; unmounted at the end.

    The daemon must then end by itself with success and without a traceback in its log, unless the test ended it.
    """
    path, socket, log_path = directory / "mnt", directory / "control", directory / "volfs.log"
    path.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    command = [*VOLFS, "mount", str(path), *prefixes, "--socket", str(socket), *options]
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
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if _is_mounted(path):
            subprocess.run(["umount", "-l", str(path)], check=False)


def wait_until(condition: object, what: str, seconds: float = 10.0) -> None:
    """Poll a condition that nothing announces. Fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def _wait_ready(mount: Mount) -> None:
    assert mount.process.stdout is not None
    ready, _, _ = select.select([mount.process.stdout], [], [], START_SECONDS)
    line = mount.process.stdout.readline() if ready else ""
    assert re.search(": ready ", line), f"volfs mount is not ready: {line!r}\n{mount.log}"


def _is_mounted(path: Path) -> bool:
    return any(line.split()[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())
