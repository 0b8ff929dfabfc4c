"""Copies between files that know their holes: what is skipped, punched or left to the kernel, and with what refused."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from services import MIB
from test_copying import failure
from volumes import random_bytes, sha256

from volfs import copying, endpoint, extents
from volfs.comparing import compare_volume_data
from volfs.copying import copy_volume_data
from volfs.descriptors import placed
from volfs.reading import BLOCKS_AHEAD

TIB = 1 << 40
BLOCK = 4096  # of the file systems below tmp_path

Runs = list[tuple[int, int, int]]  # offset, length, seed of the data there


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) - before == set()


def make(path: Path, size: int, runs: Runs) -> Path:
    """A file that is all hole but for the runs."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, length, seed in runs:
            os.pwrite(file.fileno(), random_bytes(length, seed)[: max(size - offset, 0)], offset)
        file.truncate(size)
    return path


def allocated(path: Path) -> int:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # the file system may not have chosen its blocks yet
    return path.stat().st_blocks * 512


@contextmanager
def counted(**refused: int) -> Iterator[dict[str, int]]:
    """How often each call that moves or looks for data is made; those that are named fail with that errno."""
    calls: dict[str, int] = {}

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            kind = name
            if name == "fallocate":
                kind = "punch" if arguments[1] & extents.PUNCH_HOLE else "zero_range"
            elif name == "lseek":
                if arguments[2] not in (os.SEEK_DATA, os.SEEK_HOLE):
                    return real(*arguments)
                kind = "seek"
            calls[kind] = calls.get(kind, 0) + 1
            if kind in refused:
                raise OSError(refused[kind], os.strerror(refused[kind]))
            return real(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("lseek", "copy_file_range", "pread", "pwrite"):
            patch.setattr(os, name, watch(name, getattr(os, name)))
        for module in (copying, extents):
            patch.setattr(module, "fallocate", watch("fallocate", extents.fallocate))
        yield calls


# ---- any holes, with anything refused --------------------------------------------------------------------------

SIZE = 64 * BLOCK
runs = st.lists(
    st.tuples(
        st.integers(0, SIZE - 1), st.sampled_from([1, 100, BLOCK, 3 * BLOCK, 10 * BLOCK]), st.integers(0, 99)
    ),
    max_size=6,
)
refusals = st.dictionaries(
    st.sampled_from(["seek", "punch", "zero_range", "copy_file_range"]),
    st.sampled_from([errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]),
)


class NoDescriptor(io.BytesIO):
    """Bytes that can only be read and written."""


@given(
    source_runs=runs,
    target_runs=runs,
    refused=refusals,
    size=st.integers(1, SIZE),
    source_at=st.sampled_from([0, 1, BLOCK, 5 * BLOCK]),
    target_at=st.sampled_from([0, 0, 511, BLOCK]),
    block_size=st.sampled_from([BLOCK, 5000, 8 * BLOCK, SIZE]),
    plain=st.sampled_from([(), ("source",), ("target",), ("source", "target")]),
    buffering=st.sampled_from([-1, 0]),
    verify=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_target_is_the_source_whatever_has_holes_and_is_refused(
    tmp_path: Path,
    source_runs: Runs,
    target_runs: Runs,
    refused: dict[str, int],
    size: int,
    source_at: int,
    target_at: int,
    block_size: int,
    plain: tuple[str, ...],
    buffering: int,
    verify: bool,
) -> None:
    paths = (
        make(tmp_path / "source", SIZE + 6 * BLOCK, source_runs),
        make(tmp_path / "target", SIZE, target_runs),
    )
    content, expected = paths[0].read_bytes(), bytearray(paths[1].read_bytes())
    expected[target_at : target_at + size] = content[source_at : source_at + size]
    seen: list[int] = []
    with contextlib.ExitStack() as stack:
        source: IO[bytes] = stack.enter_context(open(paths[0], "rb", buffering))
        target: IO[bytes] = stack.enter_context(open(paths[1], "r+b", buffering))
        if "source" in plain:
            source = NoDescriptor(content)
        if "target" in plain:
            target = NoDescriptor(paths[1].read_bytes())
        source.seek(source_at)
        target.seek(target_at)
        stack.enter_context(counted(**refused))
        moved = copy_volume_data(
            source, target, size, block_size=block_size, progress=seen.append, verify=verify
        )
        if not verify:
            assert (source.tell(), target.tell()) == (source_at + size, target_at + size)
        target.seek(0)
        assert target.read() == expected
    assert seen == sorted(set(seen))
    assert seen[-1] == size
    assert 0 <= moved <= size


@given(source_runs=runs, target_runs=runs, refused=refusals, block_size=st.sampled_from([BLOCK, 8 * BLOCK]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_the_target_is_no_larger_than_the_data_of_the_source(
    tmp_path: Path, source_runs: Runs, target_runs: Runs, refused: dict[str, int], block_size: int
) -> None:
    """A new one always; a used one where holes can be punched into it."""
    refused.pop("seek", None)
    if "punch" in refused:
        target_runs = []
    source, target = (
        make(tmp_path / "source", SIZE, source_runs),
        make(tmp_path / "target", SIZE, target_runs),
    )
    blocks = {at // BLOCK for o, n, _ in source_runs for at in range(o, min(o + n, SIZE))}
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted(**refused):
        moved = copy_volume_data(reader, writer, SIZE, block_size=block_size)
    assert target.read_bytes() == source.read_bytes()
    assert moved == len(blocks) * BLOCK
    # Freed space is given back when the file system gets to it; what is data is told at once.
    with open(target, "rb") as file:
        data = [it for it in extents.extents(file.fileno(), 0, SIZE) if it.data]
    assert sum(it.length for it in data) <= moved


# ---- a terabyte of nothing -------------------------------------------------------------------------------------

SCATTERED: Runs = [(number * TIB // 64 + 12345, 100_000, number) for number in range(64)]


@pytest.mark.parametrize("refused", [{}, {"copy_file_range": errno.EXDEV}], ids=["", "read-and-written"])
@pytest.mark.parametrize("dirty", [False, True], ids=["new", "used"])
def test_a_terabyte_of_hole_is_a_few_calls(tmp_path: Path, refused: dict[str, int], dirty: bool) -> None:
    """And a target that was used elsewhere is as empty afterwards."""
    source = make(tmp_path / "source", TIB, SCATTERED)
    old = [(offset + TIB // 128, 50_000, seed) for offset, _, seed in SCATTERED]
    target = make(tmp_path / "target", TIB, old if dirty else [])
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted(**refused) as calls:
        moved = copy_volume_data(reader, writer, TIB)
        punched = calls.get("punch", 0)
        assert sum(calls.values()) < 64 * 12, calls
        compare_volume_data(*rewound(reader, writer), TIB)
    assert moved == sum(length // BLOCK + 1 for _, length, _ in SCATTERED) * BLOCK
    assert moved <= allocated(target) <= moved + MIB  # and the file system's lists of it
    assert punched >= 64 if dirty else punched == 1, "the one is the question whether it copies by itself"


def rewound(*files: IO[bytes]) -> tuple[IO[bytes], ...]:
    for file in files:
        file.seek(0)
    return files


def test_a_file_full_of_old_data_is_punched_in_steps_that_progress_shows(tmp_path: Path) -> None:
    """One call for a terabyte could not be interrupted."""
    source, target = make(tmp_path / "source", TIB, []), make(tmp_path / "target", TIB, SCATTERED)
    seen: list[int] = []
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted() as calls:
        moved = copy_volume_data(reader, writer, TIB, progress=seen.append)
    assert (moved, allocated(target), seen[-1]) == (0, 0, TIB)
    assert calls["punch"] <= 64 + 1
    assert max(after - before for before, after in pairwise(seen)) <= 2 * extents.PUNCH_STEP


def test_comparing_reads_what_is_data_in_one_of_both(tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, TIB, SCATTERED) for name in ("first", "second"))
    for side, at in ((first, TIB // 2 + 5 * MIB), (second, TIB // 2 + 7 * MIB)):
        with open(side, "r+b") as file:
            os.pwrite(file.fileno(), b"\0", at)  # data, and yet zero
            with open(first, "rb") as one, open(second, "rb") as other, counted() as calls:
                compare_volume_data(one, other, TIB)
            assert calls["pread"] <= 2 * 66
            os.pwrite(file.fileno(), b"x", at)
            with open(first, "rb") as one, open(second, "rb") as other:
                exc = failure(compare_volume_data, one, other, TIB)
            assert (exc.errno, exc.offset) == (errno.EILSEQ, at)
            os.pwrite(file.fileno(), b"\0", at)


def test_zeros_that_are_read_leave_a_hole_of_the_target_alone(tmp_path: Path) -> None:
    """A source that does not know its holes."""
    data = random_bytes(BLOCK) + bytes(4 * MIB - BLOCK) + bytes(8 * MIB) + random_bytes(4 * MIB, seed=1)
    target = make(tmp_path / "target", len(data), [])
    with open(target, "r+b") as writer:
        moved = copy_volume_data(io.BytesIO(data), writer, len(data), block_size=4 * MIB)
    assert target.read_bytes() == data
    assert (moved, allocated(target)) == (8 * MIB, 8 * MIB)


def test_a_copy_tells_how_much_of_it_was_data(tmp_path: Path) -> None:
    """Into a file that is made, or was longer."""
    make(tmp_path / "target", 2 * TIB, SCATTERED)
    source = make(tmp_path / "source", TIB, [(MIB, MIB, 1)])
    for name in ("new", "target"):
        done = endpoint.copy(str(source), str(tmp_path / name))
        assert (done.size, done.data, done.as_dict()["data"]) == (TIB, MIB, MIB)
        assert re.fullmatch(
            rf"{source} -> {tmp_path}/{name}: {TIB} bytes copied in \d+\.\d s \(\d+ MB/s\); "
            rf"{MIB} of them data, the rest holes",
            str(done),
        )
        assert (tmp_path / name).stat().st_size == TIB
        assert allocated(tmp_path / name) <= 2 * MIB
        assert str(endpoint.verify(str(source), str(tmp_path / name))).count("identical") == 1
    full = make(tmp_path / "full", MIB, [(0, MIB, 1)])
    assert str(endpoint.copy(str(full), str(tmp_path / "copy"))).endswith(" MB/s)")


# ---- ways that are refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ((), "punch"),
        (("punch",), "zero_range"),
        (("punch", "zero_range"), "pwrite"),
        (("punch", "zero_range", "seek"), "pwrite"),
    ],
)
def test_old_data_becomes_zeros_in_the_best_way_there_is(
    tmp_path: Path, refused: tuple[str, ...], expected: str
) -> None:
    source = make(tmp_path / "source", 8 * MIB, [])
    target = make(tmp_path / "target", 8 * MIB, [(0, 8 * MIB, 1)])
    kinds = dict.fromkeys(refused, errno.EOPNOTSUPP)
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted(**kinds) as calls:
        copy_volume_data(reader, writer, 8 * MIB)
    assert target.read_bytes() == bytes(8 * MIB)
    made = {kind: calls.get(kind, 0) for kind in ("punch", "zero_range", "pwrite")}
    assert made[expected] >= 1, made
    for kind in refused:
        if kind != "seek":
            assert made[kind] <= 2, "what was refused once is not tried for each hole"
    assert (made["pwrite"] > 0) is (expected == "pwrite")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_what_the_kernel_does_not_copy_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """From where it stopped, also when it stops half-way and gives less than it is asked for."""
    source = make(tmp_path / "source", 4 * MIB, [(0, MIB, 1), (2 * MIB, 2 * MIB, 2)])
    target = make(tmp_path / "target", 4 * MIB, [(0, 4 * MIB, 3)])
    real, asked = os.copy_file_range, []

    def some(reader: int, writer: int, length: int, start: int, at: int) -> int:
        asked.append(start)
        if start >= 3 * MIB:
            raise OSError(number, os.strerror(number))
        return real(reader, writer, min(length, 300_000), start, at)

    monkeypatch.setattr(os, "copy_file_range", some)
    with open(source, "rb") as reader, open(target, "r+b") as writer:
        assert copy_volume_data(reader, writer, 4 * MIB, block_size=MIB) == 3 * MIB
    assert target.read_bytes() == source.read_bytes()
    assert len(asked) > 6
    assert sum(start >= 3 * MIB for start in asked) == 1


@pytest.mark.parametrize("call", ["copy_file_range", "pread", "pwrite", "punch", "seek"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ETIMEDOUT])
def test_an_error_of_the_data_ends_the_copy(tmp_path: Path, call: str, number: int) -> None:
    """No other way is tried, which might succeed and hide it."""
    source = make(tmp_path / "source", MIB, [])
    with open(source, "r+b") as file:
        os.pwrite(file.fileno(), b"x" * MIB, MIB)
    target = make(tmp_path / "target", 2 * MIB, [(0, 2 * MIB, 3)])
    by_hand = {"copy_file_range": errno.EXDEV} if call in ("pread", "pwrite") else {}
    refused = {**by_hand, call: number}
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted(**refused) as calls:
        exc = failure(copy_volume_data, reader, writer, 2 * MIB)
    done = {"punch": 0, "seek": 0}.get(call, MIB)
    assert (exc.errno, exc.offset) == (number, done)
    assert str(exc) == f"copy stopped at offset {done}: {os.strerror(number)}"
    assert target.read_bytes()[done:] == random_bytes(2 * MIB, 3)[done:]
    if call == "copy_file_range":
        assert (calls.get("pread", 0), calls.get("pwrite", 0)) == (0, 0)


def test_where_fallocate_is_not_known_the_kernel_would_only_emulate_a_copy(tmp_path: Path) -> None:
    """By pages, slower than blocks: a FUSE mount without both."""
    source, target = make(tmp_path / "source", MIB, [(0, MIB, 1)]), make(tmp_path / "target", MIB, [])
    refused = dict.fromkeys(("punch", "zero_range"), errno.EOPNOTSUPP)
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted(**refused) as calls:
        copy_volume_data(reader, writer, MIB)
    assert target.read_bytes() == source.read_bytes()
    assert "copy_file_range" not in calls


@pytest.mark.parametrize("refused", [{}, {"copy_file_range": errno.EXDEV}], ids=["", "read-and-written"])
def test_a_source_that_ends_with_a_hole_before_the_size(tmp_path: Path, refused: dict[str, int]) -> None:
    """What is behind its end is not taken for more of the hole."""
    source = make(tmp_path / "source", 3 * MIB, [(0, MIB, 1)])
    target = make(tmp_path / "target", 4 * MIB, [])
    with open(source, "rb") as reader, open(target, "r+b") as writer, counted(**refused):
        exc = failure(copy_volume_data, reader, writer, 4 * MIB, block_size=MIB)
    assert (exc.errno, exc.offset) == (errno.ENODATA, 3 * MIB)
    assert str(exc) == f"copy stopped at offset {3 * MIB}: the source ends at {3 * MIB}"


# ---- file objects and their descriptors ------------------------------------------------------------------------


def test_what_a_file_object_has_buffered_is_neither_lost_nor_shown_later(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"s" * 20_000)
    (tmp_path / "target").write_bytes(b"t" * 20_000)
    with open(tmp_path / "source", "r+b") as source, open(tmp_path / "target", "r+b") as target:
        source.write(b"new")  # still in its buffer
        source.seek(0)
        assert target.read(10) == b"t" * 10  # and more, into its buffer
        target.seek(3)
        copy_volume_data(source, target, 10_000)
        assert (source.tell(), target.tell()) == (10_000, 10_003)
        assert (source.read(), target.read()) == (b"s" * 10_000, b"t" * 9997)
        target.seek(0)
        assert target.read() == b"ttt" + b"new" + b"s" * 9997 + b"t" * 9997


def test_a_buffer_forgets_what_is_written_past_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"o" * 100)
    with open(tmp_path / "file", "r+b") as file:
        file.read(10)
        with placed(file, 20) as place:
            assert place == (file.fileno(), 10)
            os.pwrite(file.fileno(), b"new", 10)
        assert file.tell() == 30
        file.seek(10)
        assert file.read(3) == b"new"


@pytest.mark.parametrize("size", [50, 10_000])
def test_a_source_that_was_read_stands_behind_the_copy(tmp_path: Path, size: int) -> None:
    """Also where that is in its buffer, while the descriptor stands elsewhere."""
    data = random_bytes(40_000)
    (tmp_path / "source").write_bytes(data)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "w+b") as target:
        source.read(100)
        copy_volume_data(source, target, size)
        assert source.read() == data[100 + size :]
        target.seek(0)
        assert target.read() == data[100 : 100 + size]


def test_an_object_with_bytes_of_its_own_is_not_taken_for_its_descriptor(tmp_path: Path) -> None:
    data = random_bytes(100_000)

    class Inverted(io.FileIO):
        """Encrypts, so to speak."""

        def read(self, size: int | None = -1) -> bytes:
            return bytes(byte ^ 0xFF for byte in super().read(size) or b"")

    class Wrapped:
        """Hands all on but what it has itself."""

        def __init__(self, file: IO[bytes]) -> None:
            self.__dict__["file"] = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def read(self, size: int) -> bytes:
            return bytes(byte ^ 0xFF for byte in self.file.read(size))

    (tmp_path / "packed").write_bytes(gzip.compress(data))
    (tmp_path / "inverted").write_bytes(bytes(byte ^ 0xFF for byte in data))
    with (
        gzip.open(tmp_path / "packed") as unpacked,
        Inverted(tmp_path / "inverted") as inverted,
        open(tmp_path / "inverted", "rb") as file,
    ):
        sources: list[Any] = [unpacked, inverted, Wrapped(file)]
        for source in sources:
            with open(tmp_path / "target", "w+b") as target:
                copy_volume_data(source, target, len(data), verify=True)
                target.seek(0)
                assert target.read() == data, source
                source.seek(0)


def test_holes_are_appended_as_zeros(tmp_path: Path) -> None:
    source = make(tmp_path / "source", 4 * MIB, [(MIB, MIB, 1)])
    (tmp_path / "target").write_bytes(b"before")
    with open(source, "rb") as reader, open(tmp_path / "target", "ab") as writer:
        copy_volume_data(reader, writer, 4 * MIB)
    assert (tmp_path / "target").read_bytes() == b"before" + source.read_bytes()


@pytest.mark.parametrize("source_at", [0, 100])
def test_holes_on_a_used_block_device(
    tmp_path: Path, loop_device: Callable[..., Path], source_at: int
) -> None:
    """Which takes whole sectors only, and does not tell its own holes."""
    device = loop_device(32 * MIB)
    device.write_bytes(b"\xa5" * 32 * MIB)
    source = make(tmp_path / "source", 32 * MIB, [(MIB, 5000, 1), (31 * MIB, 1, 2)])
    size = 31 * MIB + BLOCK
    with open(source, "rb") as reader, open(device, "r+b") as writer, counted() as calls:
        reader.seek(source_at)
        copy_volume_data(reader, writer, size)
    expected = source.read_bytes()[source_at : source_at + size] + b"\xa5" * (32 * MIB - size)
    assert sha256(device.read_bytes()) == sha256(expected)
    assert calls["punch"] >= 3
    assert calls["pwrite"] < 10


# ---- what runs at the same time --------------------------------------------------------------------------------


def test_memory_is_bounded_and_a_stop_is_prompt(tmp_path: Path) -> None:
    """Ctrl-C comes out of what the caller's thread is doing."""
    blocks = 40
    source = make(tmp_path / "source", blocks * BLOCK, [(0, blocks * BLOCK, 1)])
    target = make(tmp_path / "target", blocks * BLOCK, [])

    def progress(done: int) -> None:
        assert calls["pread"] - done // BLOCK <= BLOCKS_AHEAD + 1, (
            "the whole volume would be read into memory"
        )
        if done >= 10 * BLOCK:
            raise KeyboardInterrupt

    with (
        open(source, "rb") as reader,
        open(target, "r+b") as writer,
        counted(copy_file_range=errno.EXDEV) as calls,
        pytest.raises(KeyboardInterrupt),
    ):
        copy_volume_data(reader, writer, blocks * BLOCK, block_size=BLOCK, progress=progress)
    assert calls["pread"] <= 10 + BLOCKS_AHEAD + 1
    assert target.read_bytes()[: 10 * BLOCK] == random_bytes(blocks * BLOCK, 1)[: 10 * BLOCK]
