"""Tests marked `vm` run in the guest of scripts/vm, and are reported here under their own names.

On the host a guest for each processor is booted for them, before the other tests: nothing else runs then that needs
the processors. Each runs pytest on its share of the tests and hands over each report as it comes, by a file that both
see. In the guest (VOLFS_VM is set) they are ordinary tests. conftest.py registers `plugin` for both.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from services import TOP, is_required, load_script

VM = TOP / "scripts" / "vm"
INSIDE = "VOLFS_VM" in os.environ
RUN_SECONDS = 1500  # for all tests in a guest
MOST_GUESTS = 2  # each has four gigabytes of memory
TEST_SECONDS = 1  # of a test whose mark does not say it
STOP_SECONDS = 30
STARTING_CEPH = {"services", "guest_storage"}  # fixtures
PASSED_ON = ("PYTHONPATH", "VOLFS_REQUIRE", "CI")  # variables that the guest's pytest gets
LAST_LINES = 40


def plugin(config: pytest.Config) -> object:
    """What has to be registered in this process."""
    reports = os.environ.get("VOLFS_VM_REPORTS")
    return Messenger(config, Path(reports)) if INSIDE and reports else Host(config)


class Messenger:
    """In the guest: write each report as one line of JSON."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.config = config
        self.file = path.open("a")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.file, flush=True)


class Host:
    """On the host: have the selected tests run in guests that are booted when the first is due."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.stack = contextlib.ExitStack()
        self.guests: dict[str, Guest] = {}  # by the test that runs there

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if item.get_closest_marker("vm"):
            item.add_marker("slow")
            if not INSIDE:
                # pytest-timeout's; the time that the first test waits is that of building and booting. Those of
                # the guest's pytest count.
                item.add_marker(pytest.mark.timeout(0), append=False)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not INSIDE:
            items.sort(key=turn)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if INSIDE or not item.get_closest_marker("vm"):
            return None
        faulthandler.cancel_dump_traceback_later()  # pytest's, for tests that hang
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def reports(self, item: pytest.Item) -> Iterable[pytest.TestReport]:
        if reason := why_not():
            if is_required("vm"):
                return [own_report(item, "failed", f"vm is required: {reason}")]
            path, line, _ = item.location
            return [own_report(item, "skipped", (path, line or 0, f"Skipped: vm: {reason}"))]
        if not self.guests:
            for part in parts(item.session.items, min(len(os.sched_getaffinity(0)), MOST_GUESTS)):
                self.guests |= dict.fromkeys(part, self.stack.enter_context(guest(self.config, part)))
        return self.guests[item.nodeid].reports(item)

    def pytest_sessionfinish(self) -> None:
        self.stack.close()


def turn(item: pytest.Item) -> tuple[bool, bool]:
    """Those of the guest first; of these, those that need Ceph last, so that it is started in few guests."""
    inside = item.get_closest_marker("vm") is not None
    return not inside, inside and not STARTING_CEPH.isdisjoint(getattr(item, "fixturenames", ()))


def parts(items: Iterable[pytest.Item], number: int) -> list[list[str]]:
    """The tests for so many guests at the most, cut in their order where the times that their marks tell are even."""
    seconds: dict[str, float] = {}
    for item in items:
        if mark := item.get_closest_marker("vm"):
            seconds[item.nodeid] = mark.kwargs.get("seconds", TEST_SECONDS)
    found: list[list[str]] = [[] for _ in range(number)]
    passed, total = 0.0, sum(seconds.values())
    for nodeid, each in seconds.items():
        found[int((passed + each / 2) * number / total)].append(nodeid)
        passed += each
    return [part for part in found if part]


def why_not() -> str:
    """Why this host cannot run a guest; "" when it can."""
    script = load_script(VM)
    try:
        script.check_host(TOP, [])
    except script.Failure as error:
        return str(error)
    return ""


class Guest:
    """pytest in a guest, and what it has reported so far."""

    def __init__(self, config: pytest.Config, process: subprocess.Popen[bytes], directory: Path) -> None:
        self.config = config
        self.process = process
        self.output = directory / "output"
        self.lines: IO[str] = (directory / "reports").open()
        self.came: dict[str, list[pytest.TestReport]] = {}
        self.partial = ""

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Those of one test as they come; where the guest ends too early, a failure that tells why."""
        while True:
            ended = self.process.poll() is not None  # asked before looking, so that nothing is missed
            self.receive()
            for report in self.came.pop(item.nodeid, []):
                yield report
                if report.when == "teardown":
                    return
            if ended:
                yield own_report(item, "failed", self.last_words(), when="call")
                return
            time.sleep(0.05)

    def receive(self) -> None:
        self.partial += self.lines.read()
        *whole, self.partial = self.partial.split("\n")
        for line in whole:
            report = self.config.hook.pytest_report_from_serializable(
                config=self.config, data=json.loads(line)
            )
            if isinstance(report.longrepr, list):  # of a skip: a tuple, which JSON does not know
                report.longrepr = tuple(report.longrepr)
            self.came.setdefault(report.nodeid, []).append(report)

    def last_words(self) -> str:
        said = self.output.read_text(errors="replace").splitlines() if self.output.exists() else []
        code = self.process.returncode
        title = f"the guest brought no result of this test (scripts/vm ended with {code}); it said last:"
        return "\n".join([title, *said[-LAST_LINES:]])


@contextlib.contextmanager
def guest(config: pytest.Config, selected: list[str]) -> Iterator[Guest]:
    """Boot one that runs these tests. With -s its output is shown as it comes."""
    shown = config.getoption("capture") == "no"
    with tempfile.TemporaryDirectory(prefix="volfs-vm-") as name:
        directory = Path(name)
        (directory / "reports").touch()
        (directory / "arguments").write_text("\n".join([*guest_options(config), *selected]))
        environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
        environment["VOLFS_VM_REPORTS"] = str(directory / "reports")
        command = [
            *(str(VM), "run", "--timeout", str(RUN_SECONDS), "--share", name, "--", "env"),
            *(f"{key}={value}" for key, value in environment.items()),
            *(sys.executable, "-m", "pytest", f"@{directory}/arguments"),
        ]
        with (directory / "output").open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=None if shown else output,
                stderr=None if shown else output,
                cwd=config.rootpath,
                env={**os.environ, "VIRTUAL_ENV": sys.prefix},
            )
        try:
            running = Guest(config, process, directory)
            with running.lines:
                yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # the kernel ends the guest with it
                process.wait()


def guest_options(config: pytest.Config) -> list[str]:
    """Those that shape reports, or end the run."""
    options = ["-p", "no:cacheprovider", f"--tb={config.getoption('tbstyle')}"]
    options += ["-v"] * max(config.getoption("verbose"), 0)
    if config.getoption("showlocals"):
        options.append("--showlocals")
    if maxfail := config.getoption("maxfail"):
        options.append(f"--maxfail={maxfail}")
    if config.getoption("capture") == "no":
        options.append("-s")
    return options


def own_report(item: pytest.Item, outcome: Any, why: Any, when: Any = "setup") -> pytest.TestReport:
    """A report by the host, of a test that did not run."""
    return pytest.TestReport(item.nodeid, item.location, dict(item.keywords), outcome, why, when)
