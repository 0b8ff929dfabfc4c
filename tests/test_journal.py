"""The crash journal: what survives whom, who finds it, and what a daemon's start does about it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounts import mounted

from volfs import journal
from volfs.errors import BackendError

FACTS = {"name": "vg0/disk", "number": 3, "list": [1, "two"], "none": None}
# Makes two records, changes one, says so, and waits to be killed.
OWNER = """
import sys
from volfs import journal
first = journal.record("block", {"name": "first"})
second = journal.record("block", {"name": "second"})
second.update({"name": "second", "step": 2})
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "volfs"


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    """A process with two records."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        yield process
        process.kill()


def files(runtime: Path) -> list[Path]:
    return sorted((runtime / "journal").glob("*"))


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_record_is_nobodys_business_but_its_users(runtime: Path) -> None:
    journal.record("block", FACTS)
    (path,) = files(runtime)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_record_of_a_living_owner_is_no_orphan(owner: subprocess.Popen[str]) -> None:
    journal.record("block", FACTS)
    assert list(journal.orphans()) == []


def test_records_of_a_killed_owner_are_found_as_it_last_told_them(
    owner: subprocess.Popen[str], runtime: Path
) -> None:
    kill(owner)
    found = sorted(journal.orphans(), key=lambda it: it.facts["name"])
    assert [(it.driver, it.facts) for it in found] == [
        ("block", {"name": "first"}),
        ("block", {"name": "second", "step": 2}),
    ]
    assert list(journal.orphans()) == [], "two daemons that start at once do not both clean up"
    for record in found:
        record.remove()
    assert files(runtime) == []


def test_an_orphan_that_is_given_back_is_found_again(owner: subprocess.Popen[str]) -> None:
    kill(owner)
    for record in journal.orphans():
        record.release()
    assert len(list(journal.orphans())) == 2


def test_facts_come_back_as_they_were(runtime: Path) -> None:
    journal.record("block", FACTS).release()
    (found,) = journal.orphans()
    assert found.facts == FACTS


def test_removing_twice_is_harmless(runtime: Path) -> None:
    record = journal.record("block", FACTS)
    record.remove()
    record.remove()
    record.release()
    assert files(runtime) == []


def test_without_a_journal_there_are_no_orphans(runtime: Path) -> None:
    assert list(journal.orphans()) == []
    assert not runtime.exists()


def test_what_was_not_finished_is_removed_and_what_is_not_ours_is_left(runtime: Path) -> None:
    journal.record("block", FACTS).remove()
    (runtime / "journal" / "block-1.json.new").write_text('{"driver": "blo')
    (runtime / "journal" / "block-2.json").write_text('{"driver": 3}')
    (runtime / "journal" / "README").write_text("hands off")
    assert list(journal.orphans()) == []
    assert [path.name for path in files(runtime)] == ["README", "block-2.json"]


def test_what_cannot_be_noted_is_an_error_before_it_is_done(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    runtime.joinpath("journal").write_text("in the way")
    with pytest.raises(BackendError, match=r"journal .*: expected a directory"):
        journal.record("block", FACTS)


def test_an_update_that_fails_leaves_the_old_facts(runtime: Path) -> None:
    record = journal.record("block", FACTS)
    (path,) = files(runtime)
    Path(f"{path}.new").mkdir()
    with pytest.raises(BackendError, match="journal"):
        record.update({"name": "other"})
    assert record.facts == FACTS
    Path(f"{path}.new").rmdir()
    record.release()
    assert [it.facts for it in journal.orphans()] == [FACTS]


def test_a_start_keeps_what_it_cannot_clean_up_and_serves_all_the_same(
    runtime: Path, tmp_path: Path, volumes: Path
) -> None:
    """No driver of that name, as after a downgrade; and one that leaves nothing, hence knows no such record."""
    journal.record("of-the-future", FACTS).release()
    journal.record("file", FACTS).release()
    with mounted(tmp_path / "d", [f"file:{volumes}"], env=dict(os.environ)) as mount:
        assert "left to the next start: Record(of-the-future-" in mount.log
        assert "left to the next start: Record(file-" in mount.log
    assert len(files(runtime)) == 2
