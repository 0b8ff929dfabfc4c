"""scripts/demo: what a new user runs first. It shows what it promises, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import is_mounted, require_fuse, wait_until
from services import MIB, TOP, ImageFactory, Services, script, services_command

DEMO = TOP / "scripts" / "demo"
STATE = TOP / "var" / "demo"
MOUNTPOINT = STATE / "mnt"


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEMO, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, **environment},
    )


def interrupt_demo(*arguments: str, **environment: str) -> None:
    """Send SIGINT, as Ctrl-C does, once it has mounted; it is to end by that."""
    with subprocess.Popen(
        [DEMO, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    ) as process:
        wait_until(lambda: is_mounted(MOUNTPOINT), "mounted", 60)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def processes_of_the_demo() -> list[str]:
    """The command lines of processes that have to do with its mount."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:  # it ended meanwhile
            continue
        if str(MOUNTPOINT) in line:
            found.append(line)
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No mount, no process, no file of the demonstration, before and after."""

    def check() -> None:
        assert not is_mounted(MOUNTPOINT)
        assert processes_of_the_demo() == []
        assert not STATE.exists()

    check()
    yield
    check()


def checksums(text: str) -> list[str]:
    return re.findall(r"^([0-9a-f]{64})  \S+$", text, re.MULTILINE)


@pytest.mark.parametrize("arguments", [("--fast",), ("now",), ("--local", "now")])
def test_wrong_arguments_are_one_line_and_2(arguments: tuple[str, ...]) -> None:
    done = demo(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"demo: unknown argument {arguments[-1]}; expected none, or --local\n"


@pytest.mark.slow
def test_the_local_tour(nothing_left: None) -> None:
    require_fuse()
    done = demo("--local")
    shown = plain(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "Identical" in shown
    sums = checksums(shown)
    assert len(sums) == 3
    assert len(set(sums)) == 1


@pytest.mark.slow
def test_the_tour_from_ceph_to_iscsi_and_back_stops_the_services_that_it_started(
    tmp_path: Path, nothing_left: None
) -> None:
    require_fuse()
    try:
        done = demo(VOLFS_VAR=str(tmp_path))
        shown = plain(done.stdout)
        assert done.returncode == 0, f"{shown}\n{done.stderr}"
        assert "Identical" in shown
        sums = checksums(shown)
        assert len(sums) == 3
        assert len(set(sums)) == 1
        assert script.running(script.Place(tmp_path)) == {}
    finally:
        services_command("stop", "--purge", var=tmp_path)


@pytest.mark.slow
def test_interrupted_on_services_that_ran_before_it_leaves_them_running(
    services: Services, nothing_left: None
) -> None:
    require_fuse()
    images = services.json("rbd", "ls", "--format", "json", "rbd")
    interrupt_demo(VOLFS_VAR=str(services.var))
    assert services.json("rbd", "ls", "--format", "json", "rbd") == images
    assert services_command("status", var=services.var).returncode == 0


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(nothing_left: None) -> None:
    require_fuse()
    interrupt_demo("--local")


def test_it_says_in_one_line_when_the_services_cannot_start(tmp_path: Path, nothing_left: None) -> None:
    require_fuse()
    (tmp_path / "services").touch()  # where their directory should be
    done = demo(VOLFS_VAR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "demo: Ceph or the iSCSI target cannot start here; scripts/demo --local needs neither"
    )


def test_it_removes_nothing_from_the_cluster_that_the_environment_leads_to(
    services: Services, new_image: ImageFactory, tmp_path: Path, nothing_left: None
) -> None:
    """An operator's own, with images that happen to be called as the demonstration's."""
    image = new_image(MIB, pool="rbd", name="demo-1")
    (tmp_path / "services").touch()
    environment = {
        key: services.environment[key] for key in ("CEPH_CONF", "CEPH_ARGS") if key in services.environment
    }
    assert demo(VOLFS_VAR=str(tmp_path), **environment).returncode == 1
    assert image.watchers() == []  # it is there
