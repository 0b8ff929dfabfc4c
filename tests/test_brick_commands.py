"""The commands that os-brick's connectors run: as os-brick would run them, but for how they are started and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from connectors import processutils
from mounts import wait_until
from os_brick import exception
from os_brick.privileged import rootwrap
from services import skip_or_fail
from test_unprivileged import BECOME, READ_ALL

from volfs.backends.brick_commands import Commands

ENOUGH = 20.0  # seconds


@pytest.fixture
def commands() -> Commands:
    return Commands(ENOUGH)


def sh(commands: Commands, script: str, **how: Any) -> tuple[str, str]:
    return commands("sh", "-c", script, **how)


# ---- what it says ----------------------------------------------------------------------------------------------


def test_what_it_says_is_text_whatever_it_is(commands: Commands) -> None:
    assert sh(commands, r"printf 'a\377'; echo b >&2") == ("a\udcff", "b\n")


@pytest.mark.parametrize("data", ["caf\u00e9", "caf\u00e9".encode()])
def test_it_is_told_what_it_is_to_read(commands: Commands, data: str | bytes) -> None:
    assert commands("cat", process_input=data) == ("caf\u00e9", "")


def test_it_has_nothing_to_read_else(commands: Commands) -> None:
    assert commands("cat") == ("", "")


def test_a_line_for_a_shell(commands: Commands) -> None:
    assert commands("echo a | tr a b", shell=True) == ("b\n", "")


def test_words_are_what_they_are_when_spelt(commands: Commands) -> None:
    assert commands("echo", 1, Path("/x")) == ("1 /x\n", "")


def test_it_has_the_signals_that_a_program_expects(commands: Commands) -> None:
    """Python ignores SIGPIPE, and who inherits that is not ended by it."""
    said, _ = commands("cat", "/proc/self/status")
    ignored = next(int(line.split()[1], 16) for line in said.splitlines() if line.startswith("SigIgn:"))
    assert not ignored & 1 << signal.SIGPIPE - 1


# ---- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "accepted", "succeeds"),
    [
        (0, {}, True),
        (3, {}, False),
        (3, {"check_exit_code": False}, True),
        (3, {"check_exit_code": True}, False),
        (0, {"check_exit_code": True}, True),
        (3, {"check_exit_code": 3}, True),
        (0, {"check_exit_code": 3}, False),
        (21, {"check_exit_code": [0, 21, 255]}, True),
        (3, {"check_exit_code": (0, 21)}, False),
        (3, {"check_exit_code": None}, False),
    ],
)
def test_which_exit_codes_are_errors(
    commands: Commands, code: int, accepted: dict[str, Any], succeeds: bool
) -> None:
    """As for os-brick's own way."""
    for run in (commands, rootwrap.execute):
        command = ("sh", "-c", f"echo out; echo err >&2; exit {code}")
        if succeeds:
            assert run(*command, **accepted) == ("out\n", "err\n")
        else:
            with pytest.raises(processutils.ProcessExecutionError) as caught:
                run(*command, **accepted)
            told = caught.value
            assert (told.exit_code, told.stdout, told.stderr) == (code, "out\n", "err\n")
            assert told.cmd == " ".join(command)
    assert len(commands.failures) == (0 if succeeds else 1)


def test_a_password_is_not_told(commands: Commands) -> None:
    with pytest.raises(processutils.ProcessExecutionError) as caught:
        sh(commands, "echo --password hush >&2; false --password hush")
    assert "hush" not in str(caught.value)


def test_a_command_that_there_is_not_is_a_failure_like_others(commands: Commands) -> None:
    with pytest.raises(processutils.ProcessExecutionError, match="No such file or directory: 'nosuch'"):
        commands("nosuch", "--flag")
    assert len(commands.failures) == 1


@pytest.mark.parametrize("pause", [{"delay_on_retry": False}, {"interval": 0.01}])
def test_it_is_tried_so_often(commands: Commands, tmp_path: Path, pause: dict[str, Any]) -> None:
    script = f"echo >>{tmp_path}/tries; test $(wc -l <{tmp_path}/tries) = 3"
    with pytest.raises(processutils.ProcessExecutionError):
        sh(commands, script, attempts=2, **pause)
    (tmp_path / "tries").unlink()
    sh(commands, script, attempts=3, **pause)


def test_attempts_are_further_and_further_apart(commands: Commands) -> None:
    began = time.monotonic()
    with pytest.raises(processutils.ProcessExecutionError):
        commands("false", attempts=3, interval=0.1)
    assert 0.2 + 0.4 < time.monotonic() - began < ENOUGH


def test_what_os_brick_does_not_know_is_refused(commands: Commands) -> None:
    with pytest.raises(TypeError, match="nosuch"):
        commands("true", nosuch=1)


def test_what_connectors_do_not_use_is_left_to_os_brick(commands: Commands, tmp_path: Path) -> None:
    assert commands("pwd", cwd=str(tmp_path)) == (f"{tmp_path}\n", "")


# ---- time ------------------------------------------------------------------------------------------------------


def stops(commands: Commands, script: str, pids: Path, **how: Any) -> exception.ExecutionTimeout:
    """The error of a command that would take too long; and none of the processes whose ids it wrote is there."""
    began = time.monotonic()
    with pytest.raises(exception.ExecutionTimeout) as caught:
        sh(commands, script, **how)
    assert time.monotonic() - began < ENOUGH
    assert caught.value.stderr == "Time out after 0.3 s"
    for pid in pids.read_text().split():
        wait_until(lambda pid=pid: not is_running(pid), f"{pid} has ended")  # type: ignore[misc]
    return caught.value


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_ends_in_time_with_all_that_it_started(commands: Commands, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    error = stops(commands, f"sleep 1000 & echo $$ $! >{pids}; wait; exit 0", pids, timeout=0.3)
    assert isinstance(error, processutils.ProcessExecutionError)
    assert "sleep 1000" in str(error.cmd)


def test_the_shortest_time_counts(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stops(Commands(0.3), f"echo $$ >{pids}; exec sleep 1000", pids, timeout=600)


def test_one_that_does_not_want_to_end_is_killed(commands: Commands, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 1000 & echo $$ $! >{pids}; while :; do wait; done"
    stops(commands, script, pids, timeout=0.3)


def test_one_that_goes_on_elsewhere_is_not_waited_for(commands: Commands, tmp_path: Path) -> None:
    """A daemon in a session of its own, which keeps our pipes open, lives on."""
    pid = tmp_path / "pid"
    lives_on = f"echo $$ >{pid}; exec sleep 1000"
    began = time.monotonic()
    try:
        with pytest.raises(exception.ExecutionTimeout):
            sh(commands, f"setsid sh -c '{lives_on}' & until test -s {pid}; do sleep 0.01; done", timeout=2)
        assert time.monotonic() - began < ENOUGH
        assert is_running(pid.read_text().strip())
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_each_attempt_has_its_time(commands: Commands, tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    script = f"echo >>{tries}; test $(wc -l <{tries}) = 2 || exec sleep 1000"
    assert sh(commands, script, attempts=2, delay_on_retry=False, timeout=0.5) == ("", "")


def test_where_no_failure_counts_it_says_that_it_took_too_long(commands: Commands) -> None:
    assert commands("sleep", 1000, timeout=0.1, check_exit_code=False) == ("", "Time out after 0.1 s")


# ---- how it is started -----------------------------------------------------------------------------------------

forks: list[int] = []
os.register_at_fork(before=lambda: forks.append(os.getpid()))


@pytest.mark.filterwarnings("ignore")  # of forks where there are threads
def test_this_process_is_not_forked_for_it(commands: Commands) -> None:
    """Python runs these hooks where something of Python is to run in the child, before the command."""
    forks.clear()
    rootwrap.execute("true")
    assert len(forks) == 1, "os-brick's own way"
    for how in ({}, {"process_input": "x", "attempts": 3, "interval": 10, "timeout": 300}, {"shell": True}):
        commands("true", **how)
    if os.geteuid() == 0:
        commands("true", run_as_root=True, root_helper="sudo")
    assert len(forks) == 1


def test_who_is_not_root_has_os_bricks_helper_asked_for_it(tmp_path: Path) -> None:
    """The helper is to be run by root_helper. This one says no."""
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can become somebody else")
    script = """
import sys
from volfs.backends import brick_library
from volfs.backends.brick_commands import Commands

lock_path = "/tmp"
options = brick_library.Options(root_helper="false says-no", lock_path=lock_path, use_multipath=False,
                                enforce_multipath=False, device_scan_attempts=1)
brick_library.set_up(options)
commands = Commands(20)
print(commands("id", "-u")[0].strip())
try:
    commands("id", "-u", run_as_root=True, root_helper=options.root_helper)
except Exception as exc:
    print(type(exc).__name__, commands.failures == [exc])
"""
    done = subprocess.run(
        [*BECOME, *READ_ALL, sys.executable, "-W", "ignore", "-c", script],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["65534", "FailedToDropPrivileges True"], done.stderr
