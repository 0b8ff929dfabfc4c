"""What a process has: memory, descriptors, threads, processor time, as /proc tells it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Of one process at one time."""

    rss: int  # bytes
    peak_rss: int  # bytes, since the process began
    descriptors: int
    threads: int
    cpu: float  # seconds, of user and system
    switches: dict[str, int]  # by thread: how often it has waited for something

    def wakeups_since(self, before: Usage) -> int:
        """Of the threads that live."""
        return sum(count - before.switches.get(task, 0) for task, count in self.switches.items())


def usage(pid: int) -> Usage:
    process = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    # The name, in parentheses, may hold anything.
    times = (process / "stat").read_text().rpartition(")")[2].split()
    return Usage(
        rss=int(status["VmRSS"].split()[0]) * 1024,
        peak_rss=int(status["VmHWM"].split()[0]) * 1024,
        descriptors=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
        cpu=(int(times[11]) + int(times[12])) * TICK,
        switches={task.name: switches(task) for task in (process / "task").iterdir()},
    )


def switches(task: Path) -> int:
    try:
        lines = (task / "status").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
