"""The journal of a copy: what its reader believes, whatever is in the file, and who may have it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from volumes import raises

from volfs import copy_journal
from volfs.block_sums import Block, BlockSums, one_by_one
from volfs.copy_journal import Header, Journal
from volfs.errors import CopyError

UNIT = 4096
SIZE = 10 * UNIT + 100
HEADER = Header("rbd:volumes/disk-1", "/srv/disk\n\udcff", SIZE, 0, "inode 7 mtime 1 ctime 2", UNIT)
SUM = "5a" * 32
# What a copy notes, in three times.
NOTES = (
    [Block(0, UNIT, SUM), Block(UNIT, 3 * UNIT, "")],
    [Block(4 * UNIT, UNIT, SUM)],
    [Block(5 * UNIT, UNIT, SUM), Block(6 * UNIT, 4 * UNIT, ""), Block(10 * UNIT, 100, SUM)],
)
ALL = [block for blocks in NOTES for block in blocks]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "copy.journal"


@lru_cache
def written(notes: int = 3) -> bytes:
    """What is in the file when so many of the notes were made."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "journal")
        journal = copy_journal.begin(str(path), HEADER)
        for blocks in NOTES[:notes]:
            journal.note(blocks, blocks[-1].end)
        journal.close()
        return path.read_bytes()


def read(path: Path, data: bytes) -> tuple[Header, int, list[Block]]:
    """What the reader makes of these bytes."""
    path.write_bytes(data)
    path.chmod(0o600)
    journal = copy_journal.find(str(path))
    assert journal is not None
    try:
        return journal.header, journal.done, list(journal.blocks())
    finally:
        journal.close()


def closed_by(text: bytes, done: int) -> bytes:
    """The lines, with one behind them that vouches for all."""
    return text + f"stable {done} {zlib.crc32(text):08x}\n".encode()


def test_what_was_noted_is_read(path: Path) -> None:
    assert read(path, written()) == (HEADER, SIZE, ALL)
    assert read(path, written(0)) == (HEADER, 0, [])


def test_people_can_read_it(path: Path) -> None:
    lines = written(1).decode("ascii").splitlines()
    assert lines[0] == "volfs copy journal 1"
    assert 'target "/srv/disk\\n\\udcff"' in lines
    assert f"size {SIZE}" in lines
    assert lines[-3:-1] == [f"0 {UNIT} {SUM}", f"{UNIT} {3 * UNIT} zero"]
    assert lines[-1].startswith(f"stable {4 * UNIT} ")


def test_it_goes_on_behind_what_a_killed_copy_left(path: Path) -> None:
    """Also where that is more than what comes instead of it."""
    data = written(1)
    path.write_bytes(data + b"4 4 no line " * 1000)
    journal = copy_journal.find(str(path))
    assert journal is not None
    for blocks in NOTES[1:]:
        journal.note(blocks, blocks[-1].end)
    journal.close()
    assert path.read_bytes() == written()


@given(length=st.integers(0, 1200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_that_was_cut_off_tells_of_what_was_noted_before(path: Path, length: int) -> None:
    stages = [written(number) for number in range(4)]
    data = stages[-1][:length]
    whole = [number for number, stage in enumerate(stages) if data.startswith(stage)]
    if not whole:
        with raises(errno.EINVAL):
            read(path, data)
        return
    expected = [block for blocks in NOTES[: whole[-1]] for block in blocks]
    assert read(path, data) == (HEADER, sum(block.length for block in expected), expected)


@given(where=st.integers(0, 10_000), byte=st.integers(0, 255), remove=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_one_that_was_damaged_ends_there_or_is_refused_for_its_header(
    path: Path, where: int, byte: int, remove: bool
) -> None:
    good = written()
    where %= len(good)
    data = good[:where] + (b"" if remove else bytes([byte])) + good[where + 1 :]
    if where < len(written(0)) and data != good:
        with raises(errno.EINVAL) as caught:
            read(path, data)
        assert str(caught.value).isprintable()
        return
    header, done, blocks = read(path, data)
    assert header == HEADER
    assert blocks == ALL[: len(blocks)]
    assert done == sum(block.length for block in blocks)
    assert done < SIZE or data == good


lines = st.one_of(
    st.tuples(st.integers(0, 12), st.integers(-1, 12), st.sampled_from([SUM, "zero", "", "5a"])).map(
        lambda it: f"{it[0] * UNIT} {it[1] * UNIT} {it[2]}\n".encode()
    ),
    st.just(f"{10 * UNIT} 100 {SUM}\n".encode()),
    st.integers(0, 11).map(lambda it: f"stable {it * UNIT} 00000000\n".encode()),
    st.sampled_from([b"\n", b"0 0 zero\n", b"9" * 30 + b" 1 zero\n", b"x" * 100_000, "² 1 zero\n".encode()]),
)


@given(body=st.lists(lines, max_size=12), done=st.integers(0, 11).map(lambda it: min(it * UNIT, SIZE)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@example(body=[b"0 0 zero\n"] * 3, done=0)
@example(body=[f"0 {UNIT} zero\n".encode()] * 2, done=2 * UNIT)
def test_one_that_lies_tells_of_no_block_that_cannot_be(path: Path, body: list[bytes], done: int) -> None:
    """However well its checksum fits."""
    found = read(path, closed_by(written(0) + b"".join(body), done))
    assert found[1] in (0, done)
    at = 0
    for block in found[2]:
        assert block.offset == at
        assert block.length > 0
        assert block.length <= UNIT or not block.checksum
        at = block.end
    assert at == found[1]
    assert at <= SIZE


header_lines = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"volfs copy journal 1\n",
            b"volfs copy journal 12\n",
            b"volfs copy journal \x1b[2J\n",
            b'source "a"\n',
            b'target "b"\n',
            b"size 5\n",
            b"size " + b"9" * 5000 + b"\n",
            b"size " + b"[" * 60_000 + b"\n",
            b"size true\n",
            b"size -1\n",
            b"target-size 5\n",
            b'source-state ""\n',
            b"block-size 1\n",
            b"block-size 4096\n",
            b'checksum "md5"\n',
            b'checksum "sha256"\n',
        ]
    ),
)


@given(text=st.lists(header_lines, max_size=9).map(b"".join), fits=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@example(text=b"", fits=False)
@example(text=b"volfs copy journal 1\n", fits=True)
def test_of_anything_else_it_says_so(path: Path, text: bytes, fits: bool) -> None:
    data = closed_by(text, 0) if fits else text
    with pytest.raises(CopyError, match=r"^journal .*/copy\.journal: ") as caught:
        read(path, data)
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "expected blocks of 4096 to 67108864 bytes, by sha256"),
        ({"block_size": 1 << 40}, "expected blocks of 4096 to 67108864 bytes, by sha256"),
        ({"checksum": "md5"}, "expected blocks of 4096 to 67108864 bytes, by sha256"),
        ({"size": -1}, "no volume has that size"),
        ({"target_size": 1 << 70}, "no volume has that size"),
        ({"source": 7}, "expected a line of its source"),
        ({"size": True}, "expected a line of its size"),
    ],
)
def test_a_header_that_no_copy_writes_is_refused(path: Path, change: dict[str, object], message: str) -> None:
    text = replace(HEADER, **change).encode()  # type: ignore[arg-type]
    with raises(errno.EINVAL) as caught:
        read(path, closed_by(text, 0))
    assert str(caught.value) == f"journal {path}: not a journal of a copy: {message}"


def test_one_of_another_version_is_left_to_that(path: Path) -> None:
    with raises(errno.EINVAL) as caught:
        read(path, written(0).replace(b"journal 1\n", b"journal 2\n"))
    assert str(caught.value) == (
        f"journal {path}: of version 2, expected 1: let the volfs that began this copy finish it, or remove the journal"
    )


# Who may have it


def test_it_is_its_owners_alone(path: Path) -> None:
    copy_journal.begin(str(path), HEADER).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with raises(errno.EPERM):
            copy_journal.find(str(path))


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (Path.mkdir, errno.EISDIR),
        (os.mkfifo, errno.EINVAL),
        (lambda path: path.symlink_to("/etc/passwd"), errno.ELOOP),
        (lambda path: path.symlink_to("nothing"), errno.ELOOP),
    ],
    ids=["directory", "fifo", "link", "dangling"],
)
def test_it_is_an_ordinary_file(path: Path, make: Callable[[Path], None], number: int) -> None:
    make(path)
    with raises(number) as caught:
        copy_journal.find(str(path))
    assert str(caught.value).startswith(f"journal {path}: ")


def test_one_process_has_it(path: Path) -> None:
    copy_journal.begin(str(path), HEADER).close()
    journal = copy_journal.find(str(path))
    assert journal is not None
    with raises(errno.EBUSY) as caught:
        copy_journal.find(str(path))
    assert str(caught.value) == f"journal {path}: its copy is under way in another process"
    journal.close()
    journal.close()
    again = copy_journal.find(str(path))
    assert again is not None
    again.close()


def test_one_of_two_that_begin_at_once_is_refused_and_leaves_nothing(path: Path) -> None:
    journal = copy_journal.begin(str(path), HEADER)
    with raises(errno.EBUSY):
        copy_journal.begin(str(path), HEADER)
    assert list(path.parent.iterdir()) == [path]
    journal.remove()
    journal.close()
    assert list(path.parent.iterdir()) == []
    assert copy_journal.find(str(path)) is None


def test_one_that_is_removed_while_somebody_waits_for_it_is_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy ended between our open and our lock."""
    copy_journal.begin(str(path), HEADER).close()
    real = fcntl.flock

    def flock(number: int, operation: int) -> None:
        path.unlink(missing_ok=True)
        real(number, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert copy_journal.find(str(path)) is None


def test_one_that_was_removed_during_its_copy_ends_it(path: Path) -> None:
    """Rather than to go on without what was asked for."""
    journal = copy_journal.begin(str(path), HEADER)
    path.unlink()
    with raises(errno.ENOENT):
        journal.note(NOTES[0], NOTES[0][-1].end)
    journal.close()


def test_it_is_stable_when_that_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text before it has its name, the directory after; the file alone when it grows."""
    synced: list[str] = []

    def sync(number: int) -> None:
        synced.append(
            Path(os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)")).suffix or "directory"
        )

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "fdatasync", sync)
    journal = copy_journal.begin(str(path), HEADER)
    assert synced == [".new", "directory"]
    journal.note(NOTES[0], NOTES[0][-1].end)
    assert synced[2:] == [".new"]  # as it was opened
    journal.remove()
    assert synced[3:] == ["directory"]
    journal.close()


def test_copies_have_a_journal_each_in_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    pairs = [("a", "b"), ("b", "a"), ("a", "bc"), ("ab", "c"), ("a\udcff", "b")]
    paths = {copy_journal.default_path(*pair) for pair in pairs}
    assert len(paths) == len(pairs)
    assert {os.path.dirname(path) for path in paths} == {str(tmp_path / "volfs" / "copies")}
    assert stat.S_IMODE((tmp_path / "volfs" / "copies").stat().st_mode) == 0o700
    assert copy_journal.default_path(*pairs[0]) in paths


# The checksums


def pieces_of(content: bytes, lengths: list[int], holes: bool) -> Iterator[bytes | int]:
    at = number = 0
    while at < len(content):
        part = content[at : at + lengths[number % len(lengths)]]
        yield len(part) if holes and not any(part) else part
        at += len(part)
        number += 1


@given(
    runs=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), max_size=12),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    block_size=st.integers(1, 20),
    begin=st.integers(0, 3),
    holes=st.booleans(),
)
@settings(max_examples=150)
def test_the_same_content_has_the_same_blocks_in_whatever_pieces_it_comes(
    runs: list[tuple[int, int]], lengths: list[int], block_size: int, begin: int, holes: bool
) -> None:
    content = b"".join(bytes([byte]) * length for length, byte in runs)
    begin = min(begin * block_size, len(content) // block_size * block_size)
    sums = BlockSums(begin, len(content), block_size)
    found = [block for piece in pieces_of(content[begin:], lengths, holes) for block in sums.add(piece)]
    expected = []
    for offset in range(begin, len(content), block_size):
        part = content[offset : offset + block_size]
        expected.append(Block(offset, len(part), hashlib.sha256(part).hexdigest() if any(part) else ""))
    assert list(one_by_one(found, block_size)) == expected


def test_a_terabyte_of_nothing_is_one_block() -> None:
    sums = BlockSums(0, 1 << 40, 4 << 20)
    assert list(sums.add((1 << 40) - 1)) == [Block(0, (1 << 40) - (4 << 20), "")]
    assert [it.length for it in sums.add(b"\1")] == [4 << 20]


@pytest.mark.parametrize("piece", [101, b"x" * 101])
def test_no_more_is_summed_up_than_there_is(piece: bytes | int) -> None:
    with pytest.raises(ValueError, match="expected at most 100 bytes at 0, not 101"):
        list(BlockSums(0, 100, UNIT).add(piece))


def test_a_journal_is_no_larger_for_its_holes(path: Path) -> None:
    header = replace(HEADER, size=1 << 60)
    journal = copy_journal.begin(str(path), header)
    journal.note([Block(0, 1 << 59, "")], 1 << 59)
    assert path.stat().st_size < 1000
    assert isinstance(journal, Journal)
    journal.close()
