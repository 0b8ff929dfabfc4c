"""Copies that are interrupted, killed and resumed: identical in the end, nothing twice, and refused when in doubt."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import Run, failed, succeeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from migrations import GARBAGE, sparse_content
from mounts import Mount, mounted
from services import MIB, SLOWER
from test_migration import make
from volumes import Storage, StoredVolume, raises, random_bytes

from volfs import copy_journal, endpoint, resuming
from volfs.copy_journal import Journal

BLOCK = 64 << 10
SIZE = 4 * MIB + 12_345
DATA = sparse_content(SIZE, seed=4)
LAG = (
    5 * BLOCK
)  # of what is noted behind what is written: what the queue has, and the piece on either side of it
KILLS = 20

# The command, with small blocks that are noted one by one. It is killed (or only says so, and waits) before its Nth
# call of those that change a file, of which it may have done a half; or as soon as an offset is reached.
CHILD = """
import contextlib, functools, os, signal, sys
from volfs import cli, copy_journal, progress, resuming

calls, half, offset, *arguments = sys.argv[1:]
left, offset = int(calls), int(offset)

def before(name, real):
    def call(number, *more):
        global left
        left -= 1
        if not left:
            if name == "pwrite" and half == "half":
                cached = os.open(f"/proc/self/fd/{number}", os.O_WRONLY)  # O_DIRECT has whole sectors
                real(cached, bytes(more[0])[: len(more[0]) // 2], *more[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(number, *more)
    return call

for name in ("pwrite", "fsync", "fdatasync", "ftruncate", "link", "unlink"):
    setattr(os, name, before(name, getattr(os, name)))

@contextlib.contextmanager
def show(title, *, quiet):
    def shown(done, total):
        if done >= offset >= 0:
            print("reached", flush=True)
            sys.stdin.read()
    yield shown

progress.show = show
resuming.copy = functools.partial(resuming.copy, block_size=64 << 10, checkpoint_seconds=0)
sys.argv = ["volfs", "copy", "--resume", *arguments]
cli.main()
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of this test's own; where the journals are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "volfs" / "copies"


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) - before == set()


class Interrupted(BaseException):
    """Ctrl-C, at a known place."""


@dataclass
class Files:
    """An ordinary file and its copy to be."""

    source: Path
    target: Path
    journal: Path
    block_size: int = BLOCK
    seen: list[int] = field(default_factory=list)

    def copy(self, stop_at: int | None = None) -> endpoint.CopySummary:
        """Go on with the copy; Interrupted once that offset is reached."""
        self.seen = []

        def shown(done: int, total: int) -> None:
            assert total == self.source.stat().st_size
            self.seen.append(done)
            if stop_at is not None and done >= stop_at:
                raise Interrupted

        return resuming.copy(
            str(self.source),
            str(self.target),
            journal_path=str(self.journal),
            progress=shown,
            block_size=self.block_size,
            checkpoint_seconds=0,
        )

    def interrupt(self, offset: int = 2 * MIB) -> int:
        """Stop the copy there; returns what is noted as done."""
        with pytest.raises(Interrupted):
            self.copy(stop_at=offset)
        return self.done

    @property
    def done(self) -> int:
        journal = copy_journal.find(str(self.journal))
        assert journal is not None
        journal.close()
        return journal.done

    def assert_done(self, content: bytes = DATA) -> None:
        assert self.target.read_bytes() == content
        assert not self.journal.exists()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "source").write_bytes(DATA)
    return Files(tmp_path / "source", tmp_path / "target", tmp_path / "journal")


# What is done is not done again


def test_an_interrupted_copy_goes_on_where_it_was(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    done = files.interrupt(2 * MIB)
    assert 2 * MIB - LAG <= done <= 2 * MIB + BLOCK
    written: list[int] = []
    real = os.pwrite

    def pwrite(number: int, data: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{number}") == str(files.target):
            written.append(offset)
        return real(number, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    summary = files.copy()
    files.assert_done()
    assert min(written) >= done
    assert summary.resumed_at == done
    assert summary.data <= SIZE - done
    assert files.seen == sorted(set(files.seen))
    assert files.seen[-1] == SIZE
    assert f": {SIZE - done} bytes copied in " in str(summary)
    assert f", from offset {done} on" in str(summary)


def test_a_copy_that_nobody_interrupts_leaves_no_journal(files: Files) -> None:
    files.target.write_bytes(GARBAGE * (SIZE + 100))
    summary = files.copy()
    files.assert_done()
    assert (summary.resumed_at, summary.size) == (0, SIZE)
    assert "from offset" not in str(summary)


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1])
def test_small_sizes(files: Files, size: int) -> None:
    files.source.write_bytes(DATA[:size])
    files.copy()
    files.assert_done(DATA[:size])


@pytest.mark.slow
@given(
    runs=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 30), st.booleans()), max_size=5),
    stops=st.lists(st.integers(1, 64 * 4096), max_size=4),
    used=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_any_holes_and_any_stops(
    tmp_path: Path, runs: list[tuple[int, int, bool]], stops: list[int], used: bool
) -> None:
    """Holes, zeros that are data, and data, with blocks larger than these; onto a new and a used file."""
    files = Files(tmp_path / "source", tmp_path / "target", tmp_path / "journal", block_size=3 * 4096)
    for path in (files.source, files.target, files.journal):
        path.unlink(missing_ok=True)
    with open(files.source, "wb") as file:
        file.truncate(64 * 4096)
        for page, pages, zeros in runs:
            length = min(pages * 4096, 64 * 4096 - page * 4096)
            os.pwrite(file.fileno(), bytes(length) if zeros else random_bytes(length, page), page * 4096)
    if used:
        files.target.write_bytes(GARBAGE * (70 * 4096))
    done = 0
    for stop in stops:
        try:
            files.copy(stop_at=stop)
        except Interrupted:
            assert files.done >= done
            done = files.done
        else:
            break
    files.copy()
    files.assert_done(files.source.read_bytes())


def test_a_finished_copy_whose_journal_stayed_has_nothing_left_to_do(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)
        files.copy()
    assert files.done == SIZE
    summary = files.copy()
    assert (summary.resumed_at, summary.data) == (SIZE, 0)
    files.assert_done()
    (files.target).write_bytes(bytes(SIZE))
    assert files.copy().resumed_at == 0  # the journal is gone, so this is another copy
    files.assert_done()


def test_the_target_is_stable_before_that_is_noted(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the blocks that are noted had been written when it was made so."""
    written = stable = 0
    noted: list[int] = []
    real_pwrite, real_fsync, real_note = os.pwrite, os.fsync, Journal.note

    def is_target(number: int) -> bool:
        return os.readlink(f"/proc/self/fd/{number}") == str(files.target)

    def pwrite(number: int, data: Any, offset: int) -> int:
        nonlocal written
        length = real_pwrite(number, data, offset)
        written = offset + length if is_target(number) else written
        return length

    def fsync(number: int) -> None:
        nonlocal stable
        before = written
        real_fsync(number)
        stable = before if is_target(number) else stable

    def note(self: Journal, blocks: Any, done: int) -> None:
        ends = [block.end for block in blocks if block.checksum]
        assert max(ends, default=0) <= -(-stable // BLOCK) * BLOCK
        noted.append(done)
        real_note(self, blocks, done)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Journal, "note", note)
    files.source.write_bytes(random_bytes(SIZE))  # no holes, so that what is written is how far it is
    files.copy()
    assert len(noted) > 20


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_nothing_is_noted_after_an_error_of_the_target(
    files: Files, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once; a later fsync that succeeds says nothing about what was lost."""
    files.source.write_bytes(random_bytes(SIZE))  # without a hole
    real = getattr(os, call)
    left = 30

    def fail(number: int, *more: Any) -> Any:
        nonlocal left
        if os.readlink(f"/proc/self/fd/{number}") == str(files.target):
            left -= 1
            if not left:
                raise OSError(errno.EIO, "Input/output error")
        return real(number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with raises(errno.EIO) as caught:
            files.copy()
    assert str(caught.value).startswith("copy stopped at offset ")
    assert left == 0, "the target was asked again"
    assert files.done == 29 * BLOCK
    files.copy()
    files.assert_done(files.source.read_bytes())


def test_a_journal_that_cannot_be_written_ends_the_copy(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than to go on for hours that a kill would cost."""
    files.source.write_bytes(random_bytes(SIZE))  # without a hole, so that it is seen how far it went on

    def fail(number: int, data: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    done = files.interrupt()
    with monkeypatch.context() as patch:
        patch.setattr(copy_journal, "_write", fail)
        with raises(errno.ENOSPC) as caught:
            files.copy()
    assert str(caught.value) == f"journal {files.journal}: No space left on device"
    assert files.done == done
    assert files.seen[-1] <= done + 2 * LAG
    files.copy()
    files.assert_done(files.source.read_bytes())


# What has changed


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit, past whoever has the file open."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


def keep_mtime(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        before = path.stat()
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


def replaced(path: Path) -> None:
    """By another file of the same content and times, as far as these can be set."""
    before = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: flip(path, SIZE - 1), "its inode, mtime or ctime is another"),
        (keep_mtime(lambda path: flip(path, 5)), "its inode, mtime or ctime is another"),
        (replaced, "its inode, mtime or ctime is another"),
        (lambda path: os.truncate(path, SIZE - 1), f"it has {SIZE - 1} bytes, and had {SIZE}"),
        (lambda path: os.truncate(path, SIZE + 1), f"it has {SIZE + 1} bytes, and had {SIZE}"),
    ],
    ids=["written", "mtime-set-back", "replaced", "shorter", "longer"],
)
def test_a_source_that_has_changed_is_refused(
    files: Files, change: Callable[[Path], None], reason: str
) -> None:
    files.interrupt()
    change(files.source)
    before, journal = files.target.read_bytes(), files.journal.read_bytes()
    with raises(errno.ESTALE) as caught:
        files.copy()
    assert str(caught.value) == (
        f"the source has changed since the copy began: {reason}; to copy anew remove {files.journal}"
    )
    assert (files.target.read_bytes(), files.journal.read_bytes()) == (before, journal)
    files.journal.unlink()
    files.copy()
    files.assert_done(files.source.read_bytes())


def test_a_source_that_changes_during_the_copy_is_told_at_its_end(files: Files) -> None:
    files.interrupt()
    original = files.copy

    def shown(done: int, total: int) -> None:
        if done == total:
            flip(files.source, 0)

    with raises(errno.ESTALE):
        resuming.copy(str(files.source), str(files.target), journal_path=str(files.journal), progress=shown)
    with raises(errno.ESTALE):
        original()


@pytest.mark.slow
@given(where=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_one_bit_that_changed_on_the_target_is_found_where_it_counts(
    files: Files, where: int, bit: int
) -> None:
    """What is not done yet is written over."""
    files.journal.unlink(missing_ok=True)
    files.target.unlink(missing_ok=True)
    done = files.interrupt()
    flip(files.target, where, bit)
    if where >= done:
        files.copy()
        files.assert_done()
        return
    before = files.target.read_bytes()
    with raises(errno.ESTALE) as caught:
        files.copy()
    block = where // BLOCK * BLOCK
    assert caught.value.offset == block  # type: ignore[attr-defined]
    assert (
        f"the target has changed since the copy began: contents differ in the block at offset {block};"
        in str(caught.value)
    )
    assert files.target.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "it is not there"),
        (lambda path: os.truncate(path, 3 * BLOCK), f"the file ends at {3 * BLOCK}"),
        (
            lambda path: (os.truncate(path, 0), os.truncate(path, SIZE)),
            "contents differ in the block at offset 0",
        ),
    ],
    ids=["removed", "cut-off", "all-hole"],
)
def test_a_target_that_was_replaced_is_refused(
    files: Files, change: Callable[[Path], object], reason: str
) -> None:
    files.interrupt()
    change(files.target)
    with raises(errno.ESTALE) as caught:
        files.copy()
    assert f"the target has changed since the copy began: {reason}; " in str(caught.value)


def test_a_target_that_became_sparse_or_full_is_the_same(files: Files) -> None:
    """As cp --sparse would leave it: the content is what counts."""
    files.source.write_bytes(bytes(8 * BLOCK) + DATA[8 * BLOCK :])
    files.interrupt()
    content = files.target.read_bytes()
    files.target.write_bytes(content)
    files.copy()
    files.assert_done(files.source.read_bytes())


# Whose journal it is


def test_the_journal_of_another_copy_is_refused(files: Files, tmp_path: Path) -> None:
    files.interrupt()
    (tmp_path / "other").write_bytes(DATA)
    for source, target in ((tmp_path / "other", files.target), (files.source, tmp_path / "third")):
        other = Files(source, target, files.journal)
        with raises(errno.EINVAL) as caught:
            other.copy()
        assert (
            str(caught.value) == f"journal {files.journal}: of another copy: {files.source} -> {files.target}"
        )
    assert not (tmp_path / "third").exists()


def test_names_are_of_the_file_and_not_of_the_directory_one_is_in(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.interrupt()
    monkeypatch.chdir(files.source.parent)
    resuming.copy("source", "./target", journal_path="journal")
    files.assert_done()


def test_two_copies_at_once_are_one(files: Files) -> None:
    files.interrupt()
    journal = copy_journal.find(str(files.journal))
    assert journal is not None
    with raises(errno.EBUSY) as caught:
        files.copy()
    assert str(caught.value) == f"journal {files.journal}: its copy is under way in another process"
    journal.close()
    files.copy()
    files.assert_done()


def test_what_cannot_be_copied_leaves_no_journal(files: Files, loop_device: Callable[..., Path]) -> None:
    for target, number in ((files.source, errno.EINVAL), (loop_device(MIB), errno.ENOSPC)):
        with raises(number):
            Files(files.source, target, files.journal).copy()
        assert not files.journal.exists()
    assert files.source.read_bytes() == DATA


def test_a_file_that_is_no_journal_is_left_alone(files: Files) -> None:
    for path in (files.source, files.target):
        files.target.write_bytes(b"")
        with raises(errno.EINVAL):
            Files(files.source, files.target, path).copy()
    assert (files.source.read_bytes(), files.target.read_bytes()) == (DATA, b"")


# The command


def test_the_command_keeps_its_journal_in_the_state_directory(run: Run, files: Files, state: Path) -> None:
    arguments = ("copy", "--resume", "-q", files.source, files.target)
    files.journal = Path(copy_journal.default_path(str(files.source), str(files.target)))
    done = files.interrupt()
    assert list(state.iterdir()) == [files.journal]
    found = json.loads(succeeded(run(*arguments, "--json")))
    assert (found["resumed_at"], found["size"]) == (done, SIZE)
    assert list(state.iterdir()) == []
    files.assert_done()
    assert json.loads(succeeded(run(*arguments, "--json")))["resumed_at"] == 0
    assert list(state.iterdir()) == []


def test_the_command_refuses_in_one_line(run: Run, files: Files) -> None:
    files.interrupt()
    flip(files.target, 5)
    arguments = ("copy", "-q", "--resume", "--journal", files.journal, files.source, files.target)
    message = "contents differ in the block at offset 0; to copy anew remove"
    failed(run(*arguments), 1, f"the target has changed since the copy began: {message} {files.journal}")
    failed(
        run("copy", "--journal", files.journal, files.source, files.target),
        2,
        "--journal is for --resume; see volfs copy --help",
    )


def test_verify_after_a_resumed_copy(run: Run, files: Files) -> None:
    files.interrupt()
    done = run("copy", "-q", "--resume", "--verify", "--journal", files.journal, files.source, files.target)
    assert "identical" in succeeded(done)


# Killed


@dataclass
class Copies:
    """Runs of the command in a process of its own, one after the other."""

    source: str
    target: str
    journal: Path
    environment: dict[str, str]

    def start(self, calls: int = 0, *, half: bool = False, offset: int = -1) -> subprocess.Popen[str]:
        how = (str(calls), "half" if half else "", str(offset))
        command = [sys.executable, "-c", CHILD, *how, "--json", "--journal", str(self.journal)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*command, self.source, self.target],
            env={**os.environ, **self.environment},
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def run(self, calls: int = 0, *, half: bool = False) -> tuple[int, dict[str, Any]]:
        """Exit code, and what was told of it."""
        with self.start(calls, half=half) as process:
            out, err = process.communicate(timeout=60 * SLOWER)
        assert process.returncode in (0, -signal.SIGKILL), err
        return process.returncode, json.loads(out) if out else {}

    @property
    def done(self) -> int:
        journal = copy_journal.find(str(self.journal)) if self.journal.exists() else None
        if journal is None:
            return 0
        journal.close()
        return journal.done


def killed_often(copies: Copies, kills: int, seed: int, most_calls: int) -> None:
    """Kill it at random calls, until it was killed so often; then let it end."""
    chance = random.Random(seed)
    done = 0
    for kill in range(kills):
        code, _ = copies.run(chance.randint(1, most_calls), half=chance.random() < 0.5)
        assert code == -signal.SIGKILL, f"it ended before kill {kill}: make it larger"
        assert copies.done >= done, "it has forgotten what was done"
        done = copies.done
    assert done > 0, "nothing was ever noted"
    code, told = copies.run()
    assert (code, told["resumed_at"]) == (0, done)
    assert told["data"] <= told["size"] - done
    assert not copies.journal.exists()


# Data in each block, so that each is some calls; 20 times at most 44 calls, of 4 for each, do not suffice for it.
FULL = random_bytes(KILLS * 11 * BLOCK + 777)
MOST_CALLS = 44


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=pytest.mark.thorough if seed else pytest.mark.slow) for seed in range(5)],
)
def test_killed_twenty_times_between_ordinary_files(tmp_path: Path, seed: int) -> None:
    (tmp_path / "source").write_bytes(FULL)
    (tmp_path / "target").write_bytes(GARBAGE * (len(FULL) + 1000))
    copies = Copies(str(tmp_path / "source"), str(tmp_path / "target"), tmp_path / "journal", {})
    killed_often(copies, KILLS, seed, MOST_CALLS)
    assert (tmp_path / "target").read_bytes() == FULL


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One that serves nothing but what is attached."""
    with mounted(tmp_path_factory.mktemp("d"), []) as mount:
        yield mount


KINDS = ("rbd", "iscsi-512", "file", "ordinary")
SOME = [("rbd", "iscsi-512"), ("iscsi-512", "ordinary"), ("ordinary", "rbd")]
PAIRS = [
    pytest.param(*pair, 6, id=f"{'-to-'.join(pair)}-a-few-times", marks=pytest.mark.slow) for pair in SOME
] + [
    pytest.param(source, target, KILLS, id=f"{source}-to-{target}", marks=pytest.mark.thorough)
    for source in KINDS
    for target in KINDS
    if (source, target) != ("ordinary", "ordinary")
]


@dataclass
class Side:
    """A volume, or an ordinary file."""

    name: str
    environment: dict[str, str]
    read: Callable[[], bytes]
    write: Callable[[bytes, int], None]
    volume: StoredVolume | None = None


MakeSide = Callable[[str, int, bytes], Side]


@pytest.fixture
def make_side(storage: Storage, tmp_path: Path) -> MakeSide:
    def make_it(kind: str, size: int, content: bytes) -> Side:
        if kind == "ordinary":
            path = tmp_path / f"ordinary-{len(list(tmp_path.iterdir()))}"
            path.write_bytes(content.ljust(size, b"\0"))

            def write(data: bytes, offset: int) -> None:
                with open(path, "r+b") as file:
                    os.pwrite(file.fileno(), data, offset)

            return Side(str(path), {}, path.read_bytes, write)
        volume = make(storage, kind, size, content)
        return Side(volume.url, volume.environment, volume.read, volume.write, volume)

    return make_it


def up_to_sectors(content: bytes) -> bytes:
    return content[: len(content) // 4096 * 4096]


@pytest.mark.parametrize(("source_kind", "target_kind", "kills"), PAIRS)
def test_killed_between_storages(
    daemon: Mount, make_side: MakeSide, tmp_path: Path, source_kind: str, target_kind: str, kills: int
) -> None:
    content = up_to_sectors(FULL[: len(FULL) * kills // KILLS])
    source = make_side(source_kind, len(content), content)
    target = make_side(target_kind, len(content) + MIB, GARBAGE * (len(content) + MIB))
    environment = {**source.environment, **target.environment, "VOLFS_SOCKET": str(daemon.socket)}
    copies = Copies(source.name, target.name, tmp_path / "journal", environment)
    killed_often(copies, kills, 1, MOST_CALLS)
    behind = b"" if target_kind == "ordinary" else GARBAGE * MIB
    assert target.read() == content + behind
    for side in (source, target):
        assert side.volume is None or side.volume.users() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_at_once_and_it_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "source").write_bytes(DATA)
    copies = Copies(str(tmp_path / "source"), str(tmp_path / "target"), tmp_path / "journal", {})
    with copies.start(offset=2 * MIB) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reached\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30 * SLOWER)
    assert (process.returncode, err) == (130 if number == signal.SIGINT else -number, "")
    done = copies.done
    assert done >= 2 * MIB - LAG
    code, told = copies.run()
    assert (code, told["resumed_at"]) == (0, done)
    assert (tmp_path / "target").read_bytes() == DATA


@pytest.mark.slow
def test_a_second_copy_while_one_is_under_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    copies = Copies(str(tmp_path / "source"), str(tmp_path / "target"), tmp_path / "journal", {})
    with copies.start(offset=MIB) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reached\n"
        with copies.start() as second:
            _, err = second.communicate(timeout=30 * SLOWER)
        assert (second.returncode, err) == (
            1,
            f"volfs: journal {tmp_path}/journal: its copy is under way in another process\n",
        )
        process.kill()


# Volumes


@contextmanager
def client(daemon: Mount, *sides: Side) -> Iterator[None]:
    """This process is a client of the daemon, and may use what the sides need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOLFS_SOCKET", str(daemon.socket))
        for side in sides:
            for name, value in side.environment.items():
                patch.setenv(name, value)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("source_kind", "target_kind"), [("rbd", "iscsi-512"), ("iscsi-4096", "rbd")])
@pytest.mark.parametrize("which", ["source", "target"])
def test_a_volume_that_was_written_meanwhile_is_refused(
    daemon: Mount, make_side: MakeSide, tmp_path: Path, source_kind: str, target_kind: str, which: str
) -> None:
    """By a look at what is done, as their times tell nothing; behind that they may change."""
    content = up_to_sectors(DATA)
    source = make_side(source_kind, len(content), content)
    target = make_side(target_kind, len(content), b"")
    files = Files(Path(), Path(), tmp_path / "journal")
    files.copy = functools.partial(copy_until, source, target, files.journal)  # type: ignore[method-assign]
    with client(daemon, source, target):
        done = files.interrupt(2 * MIB)
        changed = {"source": source, "target": target}[which]
        at = done - 4096
        there = bytearray(changed.read()[at : at + 4096])
        there[7] ^= 0x10
        changed.write(bytes(there), at)
        with raises(errno.ESTALE) as caught:
            files.copy()
        assert str(caught.value).startswith(
            f"the {which} has changed since the copy began: contents differ in "
        )
        there[7] ^= 0x10
        changed.write(bytes(there), at)
        changed.write(random_bytes(4096, seed=9), done + BLOCK)
        files.copy()
    assert target.read() == source.read()
    assert not files.journal.exists()


def copy_until(source: Side, target: Side, journal: Path, stop_at: int | None = None) -> endpoint.CopySummary:
    def shown(done: int, total: int) -> None:
        if stop_at is not None and done >= stop_at:
            raise Interrupted

    return resuming.copy(
        source.name,
        target.name,
        journal_path=str(journal),
        progress=shown,
        block_size=BLOCK,
        checkpoint_seconds=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rbd", "iscsi-512", "file"])
def test_a_target_that_was_resized_meanwhile_is_refused(
    daemon: Mount, make_side: MakeSide, tmp_path: Path, kind: str
) -> None:
    content = up_to_sectors(DATA)
    source, target = make_side("ordinary", len(content), content), make_side(kind, 8 * MIB, b"")
    assert target.volume is not None
    with client(daemon, source, target):
        with pytest.raises(Interrupted):
            copy_until(source, target, tmp_path / "journal", 2 * MIB)
        target.volume.resize(9 * MIB)
        with raises(errno.ESTALE) as caught:
            copy_until(source, target, tmp_path / "journal")
    assert f"the target has changed since the copy began: it has {9 * MIB} bytes, and had {8 * MIB};" in str(
        caught.value
    )


@pytest.mark.slow
def test_a_journal_has_no_password_of_a_url(
    daemon: Mount, new_lun: Callable[..., Any], make_side: MakeSide, tmp_path: Path, state: Path
) -> None:
    lun = new_lun(8 * MIB, chap="one-way")
    account = lun.initiator
    content = up_to_sectors(DATA)
    source = make_side("ordinary", len(content), content)
    url = lun.url.replace("iscsi://", f"iscsi://{account.user}%{account.secret}@")
    target = Side(url, {}, lun.backing.read_bytes, lambda data, offset: None)
    with client(daemon), pytest.raises(Interrupted):
        resuming.copy(
            source.name, target.name, progress=stop_after(2 * MIB), block_size=BLOCK, checkpoint_seconds=0
        )
    (journal,) = state.iterdir()
    assert f'target "{lun.url}"' in journal.read_text().splitlines()
    assert account.secret not in journal.read_text()
    assert account.user not in journal.read_text()
    with client(daemon):
        assert resuming.copy(source.name, target.name).resumed_at > MIB
    assert target.read()[: len(content)] == content


def stop_after(offset: int) -> Callable[[int, int], None]:
    def shown(done: int, total: int) -> None:
        if done >= offset:
            raise Interrupted

    return shown


# Verify


@pytest.mark.slow
@given(
    where=st.integers(0, MIB + 4),
    bit=st.integers(0, 7),
    side=st.sampled_from(["source", "target"]),
    holes=st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_verify_finds_one_flipped_bit_on_either_side_anywhere(
    tmp_path: Path, where: int, bit: int, side: str, holes: tuple[bool, bool]
) -> None:
    """Also where both had a hole."""
    content = DATA[: MIB + 5]
    for name, sparse in zip(("source", "target"), holes, strict=True):
        (tmp_path / name).unlink(missing_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(len(content))
            for at in range(0, len(content), 4096):
                if not sparse or any(content[at : at + 4096]):
                    os.pwrite(file.fileno(), content[at : at + 4096], at)
    paths = str(tmp_path / "source"), str(tmp_path / "target")
    endpoint.verify(*paths)
    flip(tmp_path / side, where, bit)
    with raises(errno.EILSEQ) as caught:
        endpoint.verify(*paths)
    assert str(caught.value) == f"contents differ at offset {where}"


@pytest.mark.slow
@pytest.mark.parametrize(("source_kind", "target_kind"), [("rbd", "iscsi-512"), ("iscsi-512", "rbd")])
def test_verify_finds_one_flipped_bit_of_volumes(
    daemon: Mount, make_side: MakeSide, source_kind: str, target_kind: str
) -> None:
    content = up_to_sectors(DATA)
    source, target = (make_side(kind, len(content), content) for kind in (source_kind, target_kind))
    chance = random.Random(1)
    with client(daemon, source, target):
        endpoint.verify(source.name, target.name)
        for where in (0, len(content) - 1, chance.randrange(len(content))):
            for side in (source, target):
                at = where // 4096 * 4096
                page = bytearray(content[at : at + 4096])
                page[where - at] ^= 1 << chance.randrange(8)
                side.write(bytes(page), at)
                with raises(errno.EILSEQ) as caught:
                    endpoint.verify(source.name, target.name)
                assert caught.value.offset == where  # type: ignore[attr-defined]
                side.write(content[at : at + 4096], at)
