"""Comparing what two files hold; what both know to be a hole is not read."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from itertools import tee
from typing import IO

from volfs.descriptors import Place, placed
from volfs.errors import CopyError, error_text
from volfs.extents import Extent, common_extents
from volfs.reading import Piece, blocks_ahead, pieces_at

BLOCK_SIZE = 4 << 20

Progress = Callable[[int], None]
Pieces = Generator[Piece, None, None]


def compare_volume_data(
    first_file: IO[bytes],
    second_file: IO[bytes],
    size: int,
    *,
    block_size: int = BLOCK_SIZE,
    progress: Progress | None = None,
) -> None:
    """Compare `size` bytes of two files from where they stand. CopyError (EILSEQ) at the first offset that differs."""
    check_sizes(size, block_size)
    offset = 0
    try:
        with ExitStack() as stack:
            first, second = _both(stack, first_file, second_file, size, block_size)
            for one, other in zip(first, second, strict=True):
                if isinstance(one, int) or isinstance(other, int):
                    offset += one if isinstance(one, int) else len(one)  # a hole of both
                elif one != other:
                    offset += next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
                    raise CopyError(f"contents differ at offset {offset}", errno.EILSEQ, offset=offset)
                else:
                    offset += len(one)
                if progress is not None:
                    progress(offset)
    except CopyError:
        raise
    except OSError as exc:
        raise CopyError(
            f"comparison stopped at offset {offset}: {error_text(exc)}", exc.errno, offset=offset
        ) from exc


def check_sizes(size: int, block_size: int) -> None:
    """ValueError for what makes no sense."""
    if size < 0 or block_size <= 0:
        raise ValueError(f"expected size >= 0 and block_size > 0, not {size} and {block_size}")


def _both(
    stack: ExitStack, first_file: IO[bytes], second_file: IO[bytes], size: int, block_size: int
) -> tuple[Pieces, Pieces]:
    """The pieces of both, of the same lengths: a hole in the one where there is one in the other."""
    first, second = (stack.enter_context(placed(file, size)) for file in (first_file, second_file))
    if first is not None and second is not None:
        shift = second.start - first.start
        one, other = tee(common_extents(first.number, second.number, shift, first.start, first.start + size))
        shifted = (Extent(it.offset + shift, it.length, it.data) for it in other)
        pieces = (
            pieces_at(first, one, block_size, "first file"),
            pieces_at(second, shifted, block_size, "second file"),
        )
    else:
        pieces = (
            _all_data(first_file, first, size, block_size, "first file"),
            _all_data(second_file, second, size, block_size, "second file"),
        )
    stack.enter_context(closing(pieces[0]))
    stack.enter_context(closing(pieces[1]))
    return pieces


def _all_data(file: IO[bytes], place: Place | None, size: int, block_size: int, what: str) -> Pieces:
    """The file in blocks of one size: with a file that is not known to have holes, none can be skipped."""
    if place is None:
        return blocks_ahead(file, size, block_size, what)
    return pieces_at(place, [Extent(place.start, size, data=True)], block_size, what)
