"""How tests marked `vm` are reported. A script stands in for scripts/vm that runs the command right here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from guest import MOST_GUESTS
from services import TOP

pytestmark = pytest.mark.slow

STAND_IN = """\
#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
echo "$@" >>booted
VOLFS_VM=1 "$@"
code=$?
echo the last words
exit $code
"""
CONFTEST = """\
import guest, pathlib

guest.VM = pathlib.Path(__file__).with_name("vm")
guest.why_not = lambda: {why_not!r}

def pytest_configure(config):
    config.addinivalue_line("markers", "vm(seconds): in the guest")
    config.addinivalue_line("markers", "slow: left out")
    config.pluginmanager.register(guest.plugin(config))
"""
TESTS = """\
import os, pytest

def test_host():
    assert "VOLFS_VM" not in os.environ

pytestmark_vm = pytest.mark.vm

@pytestmark_vm
def test_passes():
    assert os.environ["VOLFS_VM"] == "1"

@pytestmark_vm
def test_fails():
    print("what it printed")
    assert 1 + 1 == 3

@pytestmark_vm
def test_skips():
    pytest.skip("no luck")

@pytestmark_vm
@pytest.mark.xfail(reason="known")
def test_xfails():
    assert False

@pytest.fixture
def broken():
    raise OSError("broken fixture")

@pytestmark_vm
def test_errors(broken):
    pass

@pytestmark_vm
@pytest.mark.parametrize("name", ["a b", "c::d", "@e"])
def test_names(name):
    pass

@pytestmark_vm
def test_kills_the_guest():
    os._exit(9)

@pytestmark_vm
def test_after_that():
    pass
"""


class Project:
    """A directory with tests, run by a pytest of its own."""

    def __init__(self, directory: Path, why_not: str = "") -> None:
        self.directory = directory
        (directory / "vm").write_text(STAND_IN)
        (directory / "vm").chmod(0o755)
        (directory / "conftest.py").write_text(CONFTEST.format(why_not=why_not))
        (directory / "test_it.py").write_text(TESTS)
        (directory / "pytest.ini").write_text("[pytest]\n")

    def run(self, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments],
            cwd=self.directory,
            env={
                **os.environ,
                "PYTHONPATH": f"{TOP}:{TOP / 'tests'}",
                "VOLFS_REQUIRE": "",
                "COLUMNS": "200",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout + done.stderr

    def boots(self) -> int:
        booted = self.directory / "booted"
        return len(booted.read_text().splitlines()) if booted.exists() else 0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_each_test_is_reported_as_it_went(project: Project) -> None:
    shown = project.run("-k", "not kills and not after")
    for line in (
        "PASSED test_it.py::test_passes",
        "PASSED test_it.py::test_host",
        "PASSED test_it.py::test_names[a b]",
        "PASSED test_it.py::test_names[c::d]",
        "FAILED test_it.py::test_fails - assert (1 + 1) == 3",
        "XFAIL test_it.py::test_xfails - known",
        "ERROR test_it.py::test_errors - OSError: broken fixture",
        "no luck",
        "what it printed",
        "1 failed, 5 passed, 1 skipped, 2 deselected, 1 xfailed, 1 error",
    ):
        assert line in shown, shown


def test_tests_are_shared_out_among_guests_by_their_time(project: Project) -> None:
    other = "import pytest\n\n@pytest.mark.vm(seconds=15)\ndef test_other():\n    pass\n"
    (project.directory / "test_more.py").write_text(other)
    shown = project.run("-k", "names or other")
    for name in ("test_it.py::test_names[a b]", "test_it.py::test_names[@e]", "test_more.py::test_other"):
        assert f"PASSED {name}" in shown, shown
    booted = (project.directory / "booted").read_text().splitlines()
    assert len(booted) == min(MOST_GUESTS, len(os.sched_getaffinity(0)))


def test_a_test_without_a_result_fails_with_the_last_words(project: Project) -> None:
    shown = project.run("-k", "passes or kills or after")
    assert "1 passed" in shown, shown
    assert "2 failed" in shown, shown
    assert shown.count("the guest brought no result of this test") >= 2
    assert "the last words" in shown


def test_only_what_is_selected_runs_and_x_ends_it(project: Project) -> None:
    assert "1 passed, 10 deselected" in project.run("-m", "not slow")
    assert project.boots() == 0
    shown = project.run("-x", "test_it.py::test_fails", "test_it.py::test_passes")
    assert "1 failed" in shown, shown
    assert "passed" not in shown.splitlines()[-1], shown


def test_a_host_without_it_skips_unless_it_is_required(tmp_path: Path) -> None:
    project = Project(tmp_path, why_not="no kernel")
    assert "1 passed, 10 skipped" in project.run()
    shown = project.run(VOLFS_REQUIRE="vm")
    assert "1 passed, 10 errors" in shown, shown
    assert "vm is required: no kernel" in shown
    assert project.boots() == 0
