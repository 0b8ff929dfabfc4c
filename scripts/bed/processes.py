"""The daemons of a place: which of them run, how they are started and stopped.

There are no pid files. A daemon is ours when it works in the directory that we made for it, or has our cinder.conf
among its arguments: some of them (gunicorn) write a title over their arguments and their environment.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bed.place import DAEMONS, ROWS, Place
from bed.storage import Failure

START_SECONDS = 180  # for a start as a whole
STOP_SECONDS = 20  # for each row of daemons, after SIGTERM and before SIGKILL
PAUSE = 0.05
# A shell or an editor in the directory of a daemon is not the daemon.
MAIN_PROGRAMS = re.compile(r"epmd|mariadbd|beam\.smp|python3.*")
CHILDREN = re.compile(r"erl_child_setup|inet_gethost|python3.*")


def families(place: Place) -> dict[str, dict[int, bool]]:
    """The processes of each daemon, and whether it is the one that was started, which leads its session."""
    found: dict[str, dict[int, bool]] = {}
    directories = {str(place.work(daemon)): daemon for daemon in DAEMONS}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            pid, program = int(entry.name), os.path.basename(os.readlink(entry / "exe"))
            daemon = directories.get(os.readlink(entry / "cwd"))
            leads = bool(daemon and MAIN_PROGRAMS.fullmatch(program) and os.getsid(pid) == pid)
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "--privsep_context" in argv:  # a helper, which works in / and ends by itself, a moment later
                if str(place.backup_conf) in argv:
                    daemon = "cinder-backup"
                elif str(place.cinder_conf) in argv:
                    daemon = "cinder-volume"
            if daemon and (leads or CHILDREN.fullmatch(program)):
                found.setdefault(daemon, {})[pid] = leads
    return found


def running(place: Place) -> dict[str, int]:
    """The daemons of this place that run now, and their pids."""
    every = families(place).items()
    return {daemon: pid for daemon, family in every for pid, leads in family.items() if leads}


def stop_daemons(place: Place, only: tuple[str, ...] = DAEMONS) -> None:
    """Return when they are gone, with all their children."""
    for row in reversed(ROWS):
        deadline, told = time.monotonic() + STOP_SECONDS, set[int]()
        while left := {
            name: family for name, family in families(place).items() if name in row and name in only
        }:
            late = time.monotonic() > deadline
            for family in left.values():
                # A child without its leader is what a kill left: nobody waits for what it does.
                kill = late or not any(family.values())
                for pid, leads in family.items():
                    if kill or (leads and pid not in told):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
                        told.add(pid)
            time.sleep(PAUSE)


class Runner:
    """Runs daemons and tools in a place until one deadline, in several threads; once a step fails, all give up."""

    def __init__(self, place: Place, state: dict[str, Any]) -> None:
        self.place, self.state = place, state
        self.deadline = time.monotonic() + START_SECONDS
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.gave_up = threading.Event()

    def spawn(self, daemon: str, *command: str) -> None:
        """Start a daemon, in a session of its own so that Ctrl-C reaches this script alone."""
        with self.place.log(daemon).open("ab") as log:
            self.daemons[daemon] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.place.work(daemon),
                env=self.place.environment(self.state),
                start_new_session=True,
            )

    def wait_for(self, what: str, done: Callable[[], bool], pause: float = PAUSE, log: str = "") -> None:
        see = f"see {self.place.log(log) if log else self.place.logs}"
        while not done():
            for daemon, process in list(self.daemons.items()):
                if process.poll() is not None:
                    raise Failure(f"{daemon} ended while starting; see {self.place.log(daemon)}")
            if self.gave_up.is_set():
                raise Failure(f"{what} given up; {see}")
            if time.monotonic() > self.deadline:
                raise Failure(f"{what} not done after {START_SECONDS} s; {see}")
            time.sleep(pause)

    def run(self, *command: str, **environment: str) -> None:
        """Run a tool to its end; what it says goes to a log."""
        name = os.path.basename(command[0])
        shown = shlex.join((name, *command[1:5]))
        with self.place.log(name).open("ab") as log:
            began = log.tell()
            env = self.place.environment(self.state) | environment
            tool = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.place.top, env=env
            )
            try:
                self.wait_for(shown, lambda: tool.poll() is not None, log=name)
            finally:
                tool.kill()
                tool.wait()
        if tool.returncode:
            said = self.place.log(name).read_bytes()[began:].decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "no output"
            raise Failure(f"{shown}: {last} (exit code {tool.returncode}); see {self.place.log(name)}")

    def call(self, function: Callable[["Runner"], None]) -> None:
        """In a thread."""
        try:
            function(self)
        except BaseException:
            self.gave_up.set()
            raise
