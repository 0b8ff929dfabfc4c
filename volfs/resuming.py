"""Copying between two named sides so that a copy which was killed goes on where it was: `volfs copy --resume`.

The order that nothing is lost by: a range is written, made stable on the target (fsync), and then noted in the
journal. Only a range that is written, stable and noted is not copied again; that is all but the last
CHECKPOINT_SECONDS of work. The fsync is made by the thread that writes: an error of an earlier write that the target
tells late is then always found before anything is noted that it may concern. Nothing more is noted after an error.

What is noted is believed only after a look at both sides. All of it is read back from the target, and compared with
the checksums: only that finds what somebody else wrote, or what a disk has lost, and storages have no times that
could be trusted instead. (Reading is most often quicker than copying; a sample would miss what changed in one place.)
Of the source likewise, so that the result is the source as it is now; but of an ordinary file its inode, size and
times (mtime, which tools set back, and ctime, which they cannot) suffice. What was not copied yet is copied as it is
now, and has no history here: who needs one moment in time copies a snapshot.
"""

from __future__ import annotations

import enum
import errno
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from volfs import copy_journal
from volfs.api import Lease, mount_attribute
from volfs.backends import is_url
from volfs.block_sums import Block, BlockSums, one_by_one
from volfs.comparing import BLOCK_SIZE
from volfs.copy_journal import Header, Journal
from volfs.copying import check_sides, copy_pieces
from volfs.descriptors import Place, uncached
from volfs.endpoint import CopySummary, Endpoint, Shown, cut, open_endpoint
from volfs.errors import CopyError, MountError, error_text
from volfs.extents import extents
from volfs.reading import Piece, pieces_at

CHECKPOINT_SECONDS = 2.0
PIECES_TO_SUM = 4  # written but not yet summed; bounds the memory


def copy(
    source: str,
    target: str,
    *,
    journal_path: str | None = None,
    progress: Shown | None = None,
    block_size: int = BLOCK_SIZE,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> CopySummary:
    """As endpoint.copy, noting in a journal what is done; goes on where such a copy of the two was interrupted.

    The journal is the file that is named, else one for these two sides in the user's state directory. It is removed
    when the copy is done. `progress` counts what was done before as it is checked. A journal keeps its `block_size`.

    Raises CopyError, besides what endpoint.copy does: ESTALE when a side has changed since (its `offset` tells where,
    if that is known), EBUSY when this copy is under way elsewhere, EINVAL for a journal of another copy or version,
    or a file that is none. Nothing is written then, and the journal stays.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        source_path, target_path = (stack.enter_context(_attached(side)) for side in (source, target))
        names = _name(source_path), _name(target_path)
        from_side = stack.enter_context(open_endpoint(source_path))
        path = journal_path or copy_journal.default_path(*names)
        journal = copy_journal.find(path)
        if journal is not None:
            stack.callback(journal.close)
            _check_header(journal, names, from_side)
            if journal.done:
                with _open_again(journal, target_path) as written:
                    _check_done(journal, from_side, written, progress)
        to_side = stack.enter_context(open_endpoint(target_path, writable=True))
        if journal is not None and not to_side.ordinary and to_side.size != journal.header.target_size:
            was = journal.header.target_size
            raise _changed(journal, "target", f"it has {to_side.size} bytes, and had {was}")
        check_sides(from_side.file, to_side.file, from_side.size)
        if journal is None:
            header = Header(*names, from_side.size, to_side.size, _state(from_side), block_size)
            journal = copy_journal.begin(path, header)
            stack.callback(journal.close)
        resumed_at = journal.done
        data = _copy(journal, from_side, to_side, progress, checkpoint_seconds)
        cut(to_side, from_side.size)
        _check_state(journal, from_side)
        journal.remove()
    seconds = time.monotonic() - start
    return CopySummary(
        source, target, from_side.size, seconds, verified=False, data=data, resumed_at=resumed_at
    )


@contextmanager
def _attached(text: str) -> Iterator[str]:
    """The path of a side; a volume that a URL names is attached meanwhile.

    By a lease, and not by open_volume, whose file would be truncated: what such a handle then skips becomes zeros.
    """
    if not is_url(text):
        yield text
        return
    lease = Lease(text)
    try:
        mount_attribute(lease.attached.path, "source")  # else writing there would fill the local disk
        yield lease.attached.path
    finally:
        lease.release()


def _name(path: str) -> str:
    """What the journal calls a side: the volume's URL, without an account that the caller's may have had."""
    try:
        return mount_attribute(path, "source")
    except MountError:  # not on a mount; or not there, which opening it will tell
        return os.path.abspath(path)


def _state(side: Endpoint) -> str:
    """What changes when somebody writes to an ordinary file, or puts another in its place."""
    if not side.ordinary:
        return ""
    found = os.fstat(side.file.fileno())
    return f"inode {found.st_ino} mtime {found.st_mtime_ns} ctime {found.st_ctime_ns}"


def _check_header(journal: Journal, names: tuple[str, str], source: Endpoint) -> None:
    header = journal.header
    if names != (header.source, header.target):
        raise CopyError(
            f"journal {journal.path}: of another copy: {header.source} -> {header.target}", errno.EINVAL
        )
    if source.size != header.size:
        raise _changed(journal, "source", f"it has {source.size} bytes, and had {header.size}")
    _check_state(journal, source)


def _check_state(journal: Journal, source: Endpoint) -> None:
    if _state(source) != journal.header.source_state:
        raise _changed(journal, "source", "its inode, mtime or ctime is another")


@contextmanager
def _open_again(journal: Journal, path: str) -> Iterator[Endpoint]:
    """The target, for reading: a handle that could do both might be mapped, and is slower to ask for holes."""
    if not os.path.exists(path):
        raise _changed(journal, "target", "it is not there")
    with open_endpoint(path) as side:
        yield side


def _changed(journal: Journal, side: str, reason: str, offset: int = 0) -> CopyError:
    return CopyError(
        f"the {side} has changed since the copy began: {reason}; to copy anew remove {journal.path}",
        errno.ESTALE,
        offset=offset,
    )


def _check_done(journal: Journal, source: Endpoint, target: Endpoint, progress: Shown | None) -> None:
    """Compare what is noted with what the sides hold."""
    block_size = journal.header.block_size
    with ExitStack() as stack:
        sides = [("target", _sums(stack, target, journal.done, block_size))]
        if not source.ordinary:
            sides.append(("source", _sums(stack, source, journal.done, block_size)))
        for expected in one_by_one(journal.blocks(), block_size):
            for name, found in sides:
                _check_block(journal, name, expected, found)
            if progress is not None:
                progress(expected.end, journal.header.size)


def _check_block(journal: Journal, side: str, expected: Block, found: Iterator[Block]) -> None:
    offset = expected.offset
    try:
        block = next(found, None)
    except OSError as exc:
        if exc.errno == errno.ENODATA:  # a file that was cut off
            raise _changed(journal, side, error_text(exc), offset) from exc
        raise CopyError(
            f"reading the {side} again stopped at offset {offset}: {error_text(exc)}",
            exc.errno,
            offset=offset,
        ) from exc
    if block != expected:
        raise _changed(journal, side, f"contents differ in the block at offset {offset}", offset)


def _sums(stack: ExitStack, side: Endpoint, end: int, block_size: int) -> Iterator[Block]:
    """The blocks of a side up to there, as the storage has them."""
    number = uncached(side.file, 0).fileno()
    pieces = pieces_at(Place(number, 0), extents(number, 0, end), block_size, "file")
    stack.enter_context(closing(pieces))
    sums = BlockSums(0, end, block_size)
    return one_by_one((block for piece in pieces for block in sums.add(piece)), block_size)


def _copy(
    journal: Journal, source: Endpoint, target: Endpoint, progress: Shown | None, checkpoint_seconds: float
) -> int:
    """Copy what is not done; returns how much of it was data."""
    size = journal.header.size
    with _Notes(journal, target, checkpoint_seconds) as notes:
        data = copy_pieces(
            source.file,
            target.file,
            journal.done,
            size,
            written=notes.written,
            block_size=journal.header.block_size,
            progress=None if progress is None else lambda done: progress(done, size),
        )
        notes.finish()
    return data


class _Notes:
    """Sums up, in a thread of its own, what was written, and notes it once it is stable. `with` ends the thread.

    All calls are of the thread that writes. They raise what the journal or the target's fsync raised.
    """

    def __init__(self, journal: Journal, target: Endpoint, seconds: float) -> None:
        self._journal = journal
        self._target = target.file.fileno()
        self._seconds = seconds
        self._last = time.monotonic()
        self._sums = BlockSums(journal.done, journal.header.size, journal.header.block_size)
        self._queue: queue.Queue[Piece | _Mark] = queue.Queue(PIECES_TO_SUM)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="volfs-journal", daemon=True)

    def __enter__(self) -> _Notes:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._thread.is_alive():  # after an error, or an interrupt: what was not marked is not noted
            self._queue.put(_Mark.END)
            self._thread.join()

    def written(self, piece: Piece) -> None:
        """The target has taken the next piece; all up to it becomes stable when it is time."""
        self._raise()
        self._queue.put(piece)
        if time.monotonic() - self._last >= self._seconds:
            os.fsync(self._target)
            self._queue.put(_Mark.STABLE)
            self._last = time.monotonic()

    def finish(self) -> None:
        """All of it is stable; returns when that is noted."""
        self._queue.put(_Mark.STABLE)
        self._queue.put(_Mark.END)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        blocks: list[Block] = []
        try:
            while (item := self._queue.get()) is not _Mark.END:
                if item is not _Mark.STABLE:
                    blocks.extend(self._sums.add(item))
                elif blocks:
                    self._journal.note(blocks, blocks[-1].end)
                    blocks = []
        except BaseException as exc:
            self._failure = exc
            # Who writes shall not wait for room, but find the failure.
            while self._queue.get() is not _Mark.END:
                pass


class _Mark(enum.Enum):
    STABLE = enum.auto()  # all that came before is
    END = enum.auto()
