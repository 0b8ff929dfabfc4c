"""copy_volume_data and compare_volume_data on every kind of file object, against a model, and when things go wrong."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from services import MIB, Image, Services
from volumes import backing_file, random_bytes

from volfs import endpoint
from volfs.comparing import compare_volume_data
from volfs.copying import BLOCKS_BY_KERNEL, copy_volume_data
from volfs.descriptors import file_size
from volfs.errors import CopyError, VolfsError
from volfs.reading import BLOCKS_AHEAD

SECONDS = 10.0  # more than anything here may take


DATA = random_bytes(MIB + 12345)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Whatever happened, nothing goes on reading behind the caller's back."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) - before == set()


class Raw(io.RawIOBase):
    """Bytes behind the narrowest interface: reads and writes as much as the test says, fails where it says."""

    def __init__(
        self,
        data: bytes | bytearray = b"",
        *,
        most: Callable[[int], int] = lambda wanted: wanted,
        fail_at: int | None = None,
        number: int = errno.EIO,
        fixed: bool = True,
    ) -> None:
        self.data = bytearray(data)
        self.position = 0
        self.calls = 0
        self.flushes = 0
        self._most = most
        self._fail_at = fail_at
        self._number = number
        self._fixed = fixed

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.calls += 1
        length = self._length(size, len(self.data) - self.position)
        data = bytes(self.data[self.position : self.position + length])
        self.position += length
        return data

    def write(self, data: Any) -> int:
        self.calls += 1
        room = len(self.data) - self.position if self._fixed else len(data)
        if not room and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        length = self._length(len(data), room)
        self.data[self.position : self.position + length] = data[:length]
        self.position += length
        return length

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, len(self.data))[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def truncate(self, size: int | None = None) -> int:
        if self._fixed:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        assert size is not None
        self.data.extend(bytes(size - len(self.data)))
        return size

    def flush(self) -> None:
        self.flushes += 1

    def _length(self, wanted: int, there: int) -> int:
        if self._fail_at is not None:
            if self.position >= self._fail_at:
                raise OSError(self._number, os.strerror(self._number))
            there = min(there, self._fail_at - self.position)
        length = min(wanted, there)
        return max(1, min(length, self._most(length))) if length else 0


class Plain:
    """A source or target that can read or write, and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.write, self.flush = file.read, file.write, file.flush
        self.seekable = lambda: False


def failure(call: Callable[..., None], *arguments: Any, **more: Any) -> CopyError:
    with pytest.raises(CopyError) as caught:
        call(*arguments, **more)
    assert str(caught.value).isprintable()
    return caught.value


# Kinds of files


@contextmanager
def bytes_io(path: Path, data: bytes) -> Iterator[IO[bytes]]:
    yield io.BytesIO(data)


def on_disk(mode: str, buffering: int) -> Callable[[Path, bytes], Any]:
    def make(path: Path, data: bytes) -> IO[bytes]:
        path.write_bytes(data)
        return open(path, mode, buffering)

    return make


KINDS = {
    "bytes-io": bytes_io,
    "file": on_disk("r+b", -1),
    "unbuffered": on_disk("r+b", 0),
    "small-buffer": on_disk("r+b", 512),
}


@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("target_kind", KINDS)
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
def test_from_any_kind_to_any_kind(tmp_path: Path, source_kind: str, target_kind: str, verify: bool) -> None:
    seen: list[int] = []
    with (
        KINDS[source_kind](tmp_path / "source", DATA) as source,
        KINDS[target_kind](tmp_path / "target", b"x" * (len(DATA) + 5)) as target,
    ):
        copy_volume_data(source, target, len(DATA), block_size=100_000, progress=seen.append, verify=verify)
        target.seek(0)
        assert target.read() == DATA + b"x" * 5
    on_one_file_system = "bytes-io" not in (source_kind, target_kind)
    step = 100_000 * (BLOCKS_BY_KERNEL if on_one_file_system else 1)
    assert seen == [*range(step, len(DATA), step), len(DATA)]


def test_what_was_copied_is_flushed_when_it_returns(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"")
    with open(tmp_path / "target", "r+b") as target:
        copy_volume_data(io.BytesIO(b"abc"), target, 3)
        assert (tmp_path / "target").read_bytes() == b"abc"  # though the file is still open
    raw = Raw(bytes(3))
    copy_volume_data(io.BytesIO(b"abc"), raw, 3)
    assert raw.flushes == 1


def test_fsync_is_called_and_its_error_is_the_copys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").write_bytes(b"")
    synced: list[int] = []

    def fsync(number: int) -> None:
        synced.append(number)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with open(tmp_path / "target", "r+b") as target:
        exc = failure(copy_volume_data, io.BytesIO(DATA), target, len(DATA))
        assert synced == [target.fileno()]
    assert (exc.errno, exc.offset) == (errno.EIO, len(DATA))


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("start", [0, 4096, 1000])
def test_blocks_of_whole_pages_go_past_the_page_cache_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, refused: bool
) -> None:
    """Into a file, at whatever offset, of whatever length; its descriptor is as it was afterwards."""
    writes: list[tuple[int, bool]] = []
    pwrite, fcntl_ = os.pwrite, fcntl.fcntl

    def noted(number: int, data: Any, offset: int) -> int:
        writes.append((len(data), bool(fcntl_(number, fcntl.F_GETFL) & os.O_DIRECT)))
        return pwrite(number, data, offset)

    def refusing(number: int, command: int, argument: int = 0) -> int:
        if argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fcntl_(number, command, argument)

    monkeypatch.setattr(os, "pwrite", noted)
    if refused:
        monkeypatch.setattr(fcntl, "fcntl", refusing)
    path = tmp_path / "file"
    path.write_bytes(b"-" * (start + len(DATA) + 10))
    with path.open("r+b") as file:
        flags = fcntl_(file, fcntl.F_GETFL)
        file.seek(start)
        copy_volume_data(io.BytesIO(DATA), file, len(DATA), block_size=MIB // 2)
        assert fcntl_(file, fcntl.F_GETFL) == flags
    assert path.read_bytes() == b"-" * start + DATA + b"-" * 10
    direct = not refused and start % 4096 == 0
    assert writes == [(MIB // 2, direct), (MIB // 2, direct), (len(DATA) - MIB, False)]


def test_between_pipes() -> None:
    """Also of less than asked for at a time, as pipes do."""
    data = random_bytes(3 * MIB)
    with pipe() as (first_in, first_out), pipe() as (second_in, second_out):
        received: list[bytes] = []
        feeder = threading.Thread(target=lambda: (first_in.write(data), first_in.close()))
        drain = threading.Thread(target=lambda: received.append(second_out.read()))
        feeder.start()
        drain.start()
        copy_volume_data(first_out, second_in, len(data), block_size=300_000)
        second_in.close()
        feeder.join(SECONDS)
        drain.join(SECONDS)
    assert received == [data]


@contextmanager
def pipe(buffering: int = 0) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reader, writer = os.pipe()
    with open(writer, "wb", buffering) as into, open(reader, "rb", buffering) as out:
        yield into, out


def test_files_that_can_only_read_and_write() -> None:
    target = io.BytesIO()
    copy_volume_data(Plain(io.BytesIO(DATA)), Plain(target), len(DATA), block_size=4096)  # type: ignore[arg-type]
    assert target.getvalue() == DATA


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("size", [0, 1, 512, 513])
def test_small_sizes(size: int, verify: bool) -> None:
    seen: list[int] = []
    target = io.BytesIO(b"x" * 600)
    copy_volume_data(io.BytesIO(DATA), target, size, block_size=512, progress=seen.append, verify=verify)
    assert target.getvalue() == DATA[:size] + b"x" * (600 - size)
    assert (seen or [0])[-1] == size


def test_less_than_the_source_has_is_copied_from_where_the_files_stand(tmp_path: Path) -> None:
    source, target = io.BytesIO(DATA), io.BytesIO(b"x" * 100)
    source.seek(1000)
    target.seek(10)
    copy_volume_data(source, target, 50, block_size=7, verify=True)
    assert target.getvalue() == b"x" * 10 + DATA[1000:1050] + b"x" * 40


# Against a model

sizes = st.integers(0, 3000)
pattern = st.lists(st.integers(1, 700), min_size=1, max_size=5)


def cycle(numbers: list[int]) -> Callable[[int], int]:
    """As much as the numbers say, one after the other."""
    turn = iter(range(1 << 30))
    return lambda wanted: numbers[next(turn) % len(numbers)]


@given(
    size=sizes,
    block_size=st.integers(1, 1200),
    start=st.integers(0, 500),
    at=st.integers(0, 500),
    behind=st.integers(0, 300),
    reads=pattern,
    writes=pattern,
    verify=st.booleans(),
)
def test_copy_does_as_a_slice_assignment(
    size: int,
    block_size: int,
    start: int,
    at: int,
    behind: int,
    reads: list[int],
    writes: list[int],
    verify: bool,
) -> None:
    source = Raw(random_bytes(start + size + behind, seed=size), most=cycle(reads))
    target = Raw(b"t" * (at + size + behind), most=cycle(writes))
    source.seek(start)
    target.seek(at)
    seen: list[int] = []
    copy_volume_data(source, target, size, block_size=block_size, progress=seen.append, verify=verify)
    expected = bytearray(b"t" * (at + size + behind))
    expected[at : at + size] = source.data[start : start + size]
    assert target.data == expected
    assert seen == sorted(set(seen))
    assert (seen or [0])[-1] == size


@given(
    size=st.integers(1, 3000),
    block_size=st.integers(1, 1200),
    where=st.data(),
    writes=pattern,
)
def test_a_failing_writer_is_told_with_what_was_written_before(
    size: int, block_size: int, where: st.DataObject, writes: list[int]
) -> None:
    """To the byte, when the target says how much it took."""
    fail_at = where.draw(st.integers(0, size - 1))
    source = io.BytesIO(random_bytes(size))
    target = Raw(bytes(size), most=cycle(writes), fail_at=fail_at, number=errno.EDQUOT)
    exc = failure(copy_volume_data, source, target, size, block_size=block_size)
    assert (exc.errno, exc.offset) == (errno.EDQUOT, fail_at)
    assert str(exc) == f"copy stopped at offset {fail_at}: {os.strerror(errno.EDQUOT)}"
    assert target.data == source.getvalue()[:fail_at] + bytes(size - fail_at)


@given(size=st.integers(1, 3000), block_size=st.integers(1, 1200), where=st.data(), reads=pattern)
def test_a_failing_reader_is_told_with_the_whole_blocks_before_it_written(
    size: int, block_size: int, where: st.DataObject, reads: list[int]
) -> None:
    fail_at = where.draw(st.integers(0, size - 1))
    source = Raw(random_bytes(size), most=cycle(reads), fail_at=fail_at, number=errno.ETIMEDOUT)
    target = io.BytesIO(bytes(size))
    exc = failure(copy_volume_data, source, target, size, block_size=block_size)
    written = fail_at - fail_at % block_size
    assert (exc.errno, exc.offset) == (errno.ETIMEDOUT, written)
    assert target.getvalue() == bytes(source.data[:written]) + bytes(size - written)


@given(size=st.integers(1, 3000), block_size=st.integers(1, 1200), where=st.data(), reads=pattern)
def test_one_flipped_bit_is_found(size: int, block_size: int, where: st.DataObject, reads: list[int]) -> None:
    at = where.draw(st.integers(0, size - 1))
    data = bytearray(random_bytes(size))
    data[at] ^= 1 << where.draw(st.integers(0, 7))
    first = io.BytesIO(random_bytes(size))
    exc = failure(compare_volume_data, first, Raw(data, most=cycle(reads)), size, block_size=block_size)
    assert (exc.errno, exc.offset) == (errno.EILSEQ, at)
    assert str(exc) == f"contents differ at offset {at}"


@given(data=st.binary(max_size=3000), block_size=st.integers(1, 1200), reads=pattern)
def test_what_is_the_same_compares_equal(data: bytes, block_size: int, reads: list[int]) -> None:
    seen: list[int] = []
    compare_volume_data(
        Raw(data, most=cycle(reads)),
        io.BytesIO(data + b"more"),
        len(data),
        block_size=block_size,
        progress=seen.append,
    )
    assert seen == sorted(set(seen))
    assert (seen or [0])[-1] == len(data)


# Verify


class Forgetful(Raw):
    """A target that acknowledges a write and keeps one bit of it wrong."""

    def write(self, data: Any) -> int:
        length = super().write(data)
        if self.position > 5000 and self.data[5000] == DATA[5000]:
            self.data[5000] ^= 0x10
        return length


def test_verify_finds_a_bit_that_the_target_lost() -> None:
    target = Forgetful(bytes(10_000))
    exc = failure(copy_volume_data, io.BytesIO(DATA), target, 10_000, block_size=4096, verify=True)
    assert (exc.errno, exc.offset) == (errno.EILSEQ, 5000)
    copy_volume_data(io.BytesIO(DATA), Forgetful(bytes(10_000)), 10_000)  # without, nobody looks


def test_verify_reads_what_the_device_has_and_not_what_the_page_cache_remembers(
    tmp_path: Path, loop_device: Callable[..., Path]
) -> None:
    """A disk that has lost a bit is what one looks for. The kernel forgets at the last close, which is not ours."""
    device = loop_device(2 * MIB)
    (tmp_path / "source").write_bytes(DATA)
    paths = str(tmp_path / "source"), str(device)
    with open(device, "rb"):
        endpoint.copy(*paths)
        endpoint.verify(*paths)
        with open(backing_file(device), "r+b") as file:
            os.pwrite(file.fileno(), bytes([DATA[5000] ^ 0x10]), 5000)
        with pytest.raises(CopyError, match="contents differ at offset 5000"):
            endpoint.verify(*paths)


@pytest.mark.parametrize("which", ["source", "target", "target-readable"])
def test_verify_of_what_cannot_be_read_again_is_refused_before_anything_is_written(
    tmp_path: Path, which: str
) -> None:
    with open(tmp_path / "target", "wb" if which == "target-readable" else "w+b") as file:
        source: Any = Plain(io.BytesIO(DATA)) if which == "source" else io.BytesIO(DATA)
        target: Any = Plain(file) if which == "target" else file
        with pytest.raises(ValueError, match="verify=True: expected seekable files"):
            copy_volume_data(source, target, len(DATA), verify=True)
    assert (tmp_path / "target").read_bytes() == b""


# Targets that are too small, grow, or are the source


@pytest.mark.parametrize("mode", ["wb", "r+b"])
def test_a_character_device_takes_all_as_a_pipe_does(mode: str) -> None:
    """One can seek there, but it has no size that could be too small."""
    with open("/dev/null", mode) as target:
        copy_volume_data(io.BytesIO(DATA), target, len(DATA))
        with pytest.raises(ValueError, match="expected seekable files"):
            copy_volume_data(io.BytesIO(DATA), target, len(DATA), verify=True)
    with open("/dev/full", mode, 0) as target:
        exc = failure(copy_volume_data, io.BytesIO(DATA), target, len(DATA))
    assert exc.errno == errno.ENOSPC
    assert str(exc) == "copy stopped at offset 0: No space left on device"


def test_a_target_that_is_too_small_is_refused_before_a_byte_is_written() -> None:
    source, target = Raw(DATA), Raw(bytes(1000))
    target.seek(500)
    exc = failure(copy_volume_data, source, target, 501)
    assert (exc.errno, exc.offset) == (errno.ENOSPC, 0)
    assert str(exc) == "the target is too small: 1000 bytes, expected at least 1001"
    assert (target.data, source.calls, target.calls) == (bytes(1000), 0, 0)
    assert target.tell() == 500


def test_a_block_device_that_is_too_small_is_refused(loop_device: Callable[..., Path]) -> None:
    device = loop_device(MIB)
    with open(device, "r+b", 0) as target:
        exc = failure(copy_volume_data, io.BytesIO(bytes(2 * MIB)), target, MIB + 1)
    assert exc.errno == errno.ENOSPC
    with open(device, "r+b", 0) as target:
        copy_volume_data(io.BytesIO(DATA), target, MIB, verify=True)
    assert device.read_bytes() == DATA[:MIB]


@pytest.mark.parametrize("mode", ["wb", "r+b", "w+b"])
@pytest.mark.parametrize("at", [0, 7, 5000])
def test_an_ordinary_file_grows(tmp_path: Path, mode: str, at: int) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"0123456789")
    with open(path, mode) as target:
        target.seek(at)
        copy_volume_data(io.BytesIO(DATA), target, len(DATA))
    before = b"" if "w" in mode else b"0123456789"
    assert path.read_bytes() == before[:at].ljust(at, b"\0") + DATA


@pytest.mark.parametrize("mode", ["ab", "a+b"])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_an_ordinary_file_can_be_appended_to(tmp_path: Path, mode: str, buffering: int) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"0123456789")
    with open(path, mode, buffering) as target:
        copy_volume_data(io.BytesIO(DATA), target, len(DATA), verify="+" in mode)
    assert path.read_bytes() == b"0123456789" + DATA


@pytest.mark.parametrize("size", [0, 5, 10])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_target_that_is_not_open_for_writing(tmp_path: Path, size: int, buffering: int) -> None:
    path = tmp_path / "target"
    path.write_bytes(bytes(size))
    with (
        open(path, "rb", buffering) as target,
        pytest.raises(ValueError, match=r"expected a target opened for writing \(r\+b\)"),
    ):
        copy_volume_data(io.BytesIO(b"x" * 10), target, 10)
    assert path.read_bytes() == bytes(size)


def same_path(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    return open(path, "rb"), open(path, "r+b")


def same_object(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    file = open(path, "r+b")  # noqa: SIM115
    return file, file


def same_inode(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    path.with_name("link").hardlink_to(path)
    return open(path.with_name("link"), "rb"), open(path, "r+b")


def same_bytes(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    file = io.BytesIO(DATA)
    return file, file


@pytest.mark.parametrize("make", [same_path, same_object, same_inode, same_bytes])
def test_source_and_target_that_are_the_same_are_refused(
    tmp_path: Path, make: Callable[[Path], tuple[IO[bytes], IO[bytes]]]
) -> None:
    path = tmp_path / "volume"
    path.write_bytes(DATA)
    source, target = make(path)
    with source, target:
        with pytest.raises(VolfsError, match="source and target are the same volume") as caught:
            copy_volume_data(source, target, len(DATA))
        assert caught.value.errno == errno.EINVAL
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(("size", "block_size"), [(-1, 1), (1, 0), (1, -5)])
@pytest.mark.parametrize("call", [copy_volume_data, compare_volume_data])
def test_sizes_that_make_no_sense(call: Callable[..., None], size: int, block_size: int) -> None:
    target = io.BytesIO()
    with pytest.raises(
        ValueError, match=rf"expected size >= 0 and block_size > 0, not {size} and {block_size}"
    ):
        call(io.BytesIO(DATA), target, size, block_size=block_size)
    assert target.getvalue() == b""


# Ends, and calls that do nothing


def test_a_source_that_ends_too_early() -> None:
    target = io.BytesIO()
    exc = failure(copy_volume_data, io.BytesIO(DATA), target, len(DATA) + 1, block_size=65536)
    whole = len(DATA) - len(DATA) % 65536
    assert (exc.errno, exc.offset) == (errno.ENODATA, whole)
    assert str(exc) == f"copy stopped at offset {whole}: the source ends at {len(DATA)}"
    assert target.getvalue() == DATA[:whole]


@pytest.mark.parametrize("shorter", [0, 1])
def test_comparing_with_a_file_that_ends_too_early(shorter: int) -> None:
    files = [io.BytesIO(DATA), io.BytesIO(DATA)]
    files[shorter].truncate(70_000)
    exc = failure(compare_volume_data, *files, len(DATA), block_size=65536)
    assert (exc.errno, exc.offset) == (errno.ENODATA, 65536)
    which = ("first", "second")[shorter]
    assert str(exc) == f"comparison stopped at offset 65536: the {which} file ends at 70000"


@pytest.mark.parametrize("fails", [0, 1])
def test_comparing_with_a_file_that_fails(fails: int) -> None:
    files: list[Any] = [io.BytesIO(DATA), io.BytesIO(DATA)]
    files[fails] = Raw(DATA, fail_at=70_000, number=errno.EREMOTEIO)
    exc = failure(compare_volume_data, *files, len(DATA), block_size=65536)
    assert (exc.errno, exc.offset) == (errno.EREMOTEIO, 65536)


def test_a_write_that_would_block_is_not_taken_for_done() -> None:
    """Raw files answer None then, as os-brick's wrapper does when it has written all."""
    with pipe() as (into, out):
        os.set_blocking(into.fileno(), False)
        exc = failure(copy_volume_data, io.BytesIO(DATA), into, len(DATA), block_size=65536)
        into.close()
        assert len(out.read()) == exc.offset
    assert exc.errno == errno.EAGAIN


def test_a_read_that_would_block_is_an_error() -> None:
    with pipe() as (into, out):
        into.write(b"x" * 100)
        os.set_blocking(out.fileno(), False)
        exc = failure(copy_volume_data, out, io.BytesIO(), 200)
    assert exc.errno == errno.EAGAIN


class Full(Raw):
    """Takes nothing, and says so without an error."""

    def write(self, data: Any) -> int:
        return 0


def test_a_target_that_takes_nothing_is_an_error() -> None:
    exc = failure(copy_volume_data, io.BytesIO(DATA), Full(bytes(len(DATA))), len(DATA))
    assert (exc.errno, exc.offset) == (errno.EIO, 0)


# What runs at the same time


class Held(Raw):
    """Tells of each call, and does not return before it may."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.asked = threading.Semaphore(0)
        self.may = threading.Semaphore(0)

    def read(self, size: int = -1) -> bytes:
        self.asked.release()
        return super().read(size)

    def write(self, data: Any) -> int:
        self.asked.release()
        assert self.may.acquire(timeout=SECONDS)
        return super().write(data)


def test_the_next_blocks_are_read_while_one_is_written_and_not_more_of_them() -> None:
    blocks = 20
    source, target = Held(random_bytes(blocks * 100)), Held(bytes(blocks * 100))
    copying = threading.Thread(target=lambda: copy_volume_data(source, target, blocks * 100, block_size=100))
    copying.start()
    assert target.asked.acquire(timeout=SECONDS)  # the first write is under way, and stays so
    for _ in range(
        2 + BLOCKS_AHEAD
    ):  # the one being written, those in the queue, the one that has no room there
        assert source.asked.acquire(timeout=SECONDS), "reading waits for the writer"
    assert not source.asked.acquire(timeout=0.05), "the whole volume would be read into memory"
    assert source.position <= (2 + BLOCKS_AHEAD) * 100
    for _ in range(blocks):
        target.may.release()
    copying.join(SECONDS)
    assert target.data == source.data


def test_progress_is_called_in_the_callers_thread() -> None:
    threads = set()
    copy_volume_data(
        io.BytesIO(DATA),
        io.BytesIO(),
        len(DATA),
        block_size=65536,
        progress=lambda done: threads.add(threading.current_thread()),
    )
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("cls", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("call", [copy_volume_data, compare_volume_data])
def test_what_progress_raises_ends_the_copy_at_once(
    call: Callable[..., None], cls: type[BaseException]
) -> None:
    def progress(done: int) -> None:
        if done >= 3000:
            raise cls

    source, target = Raw(DATA), Raw(DATA)
    with pytest.raises(cls):
        call(source, target, len(DATA), block_size=1000, progress=progress)
    assert source.position <= 3000 + (BLOCKS_AHEAD + 2) * 1000


class Buggy(Raw):
    """Raises what no file should."""

    def read(self, size: int = -1) -> bytes:
        raise self.error

    error: BaseException


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), MemoryError(), SystemExit(3), KeyboardInterrupt()])
def test_what_else_a_reader_raises_comes_out_as_it_is(error: BaseException) -> None:
    source = Buggy(DATA)
    source.error = error
    with pytest.raises(type(error)) as caught:
        copy_volume_data(source, io.BytesIO(), 100)
    assert caught.value is error


# file_size


def test_file_size_leaves_the_position(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with open(tmp_path / "file", "rb") as file:
        file.seek(17)
        assert (file_size(file), file.tell()) == (len(DATA), 17)


# os-brick's handle on an RBD image: one position, a seek and a write that return nothing


@pytest.fixture
def brick(services: Services, new_image: Callable[..., Image]) -> Iterator[Callable[[Image], IO[bytes]]]:
    """Open an image as Cinder does for its copy loop. Closed before the images are removed."""
    linuxrbd = pytest.importorskip("os_brick.initiator.linuxrbd", exc_type=ImportError)
    files: list[Any] = []

    def make(image: Image) -> IO[bytes]:
        client = linuxrbd.RBDClient("admin", image.pool, conffile=str(services.ceph_conf))
        volume = linuxrbd.RBDVolume(client, image.name)
        metadata = linuxrbd.RBDImageMetadata(volume, image.pool, "admin", str(services.ceph_conf))
        file = linuxrbd.RBDVolumeIOWrapper(metadata)
        files.append(file)
        return file  # type: ignore[no-any-return]

    yield make
    for file in files:
        file.close()


@pytest.mark.slow
@pytest.mark.parametrize("verify", [False, True])
def test_with_os_bricks_file_objects(
    brick: Callable[[Image], IO[bytes]], new_image: Callable[..., Image], verify: bool
) -> None:
    source_image, target_image = new_image(8 * MIB), new_image(9 * MIB)
    data = random_bytes(3 * MIB) + bytes(3 * MIB) + random_bytes(2 * MIB, seed=1)
    source_image.write(data)
    source, target = brick(source_image), brick(target_image)
    copy_volume_data(source, target, 8 * MIB, block_size=MIB + 1, verify=verify)
    assert target_image.read() == data + bytes(MIB)


def test_with_os_bricks_file_objects_and_a_target_that_is_too_small(
    brick: Callable[[Image], IO[bytes]], new_image: Callable[..., Image]
) -> None:
    source_image, target_image = new_image(8 * MIB), new_image(4 * MIB)
    source_image.write(random_bytes(8 * MIB))
    exc = failure(copy_volume_data, brick(source_image), brick(target_image), 8 * MIB)
    assert exc.errno == errno.ENOSPC
    assert target_image.read() == bytes(4 * MIB)


@pytest.mark.slow
def test_between_os_brick_and_a_file(
    tmp_path: Path, brick: Callable[[Image], IO[bytes]], new_image: Callable[..., Image]
) -> None:
    image = new_image(8 * MIB)
    data = random_bytes(8 * MIB)
    with open(tmp_path / "raw", "w+b") as file:
        file.write(data)
        file.seek(0)
        copy_volume_data(file, brick(image), 8 * MIB, verify=True)
    assert image.read() == data
    with open(tmp_path / "back", "w+b") as file:
        copy_volume_data(brick(image), file, 8 * MIB, verify=True)
    assert (tmp_path / "back").read_bytes() == data
