"""Checksums of a volume's blocks, of the pieces in which it is read or written, wherever those begin and end.

Blocks lie on a grid from offset 0, and what is zero has none, so that the same content has the same checksums,
however many holes there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from volfs.reading import Piece

ALGORITHM = "sha256"


class Block(NamedTuple):
    """One block; or, when all is zeros, any number of them, the last one perhaps cut off by the volume's end."""

    offset: int  # bytes
    length: int
    checksum: str  # hexadecimal; "" for zeros

    @property
    def end(self) -> int:
        return self.offset + self.length


class BlockSums:
    """Takes the pieces from `begin` (on the grid) to `end`, in order. One thread at a time."""

    def __init__(self, begin: int, end: int, block_size: int) -> None:
        self._begin = begin  # of the block that is not complete yet
        self._at = begin
        self._end = end
        self._block_size = block_size
        self._zeroes = bytes(block_size)
        self._hash: hashlib._Hash | None = None  # of that block, unless it is zeros so far

    def add(self, piece: Piece) -> Iterator[Block]:
        """Yields the blocks that are complete with it; to be consumed. ValueError past the end."""
        length = piece if isinstance(piece, int) else len(piece)
        if length > self._end - self._at:
            raise ValueError(f"expected at most {self._end - self._at} bytes at {self._at}, not {length}")
        if isinstance(piece, int) or self._zeroes.startswith(piece):
            yield from self._add_zeroes(length)
            return
        rest = memoryview(piece)
        while rest:
            part = rest[: self._block_end - self._at]
            if self._hash is None:
                self._hash = hashlib.sha256(memoryview(self._zeroes)[: self._at - self._begin])
            self._hash.update(part)
            rest = rest[len(part) :]
            yield from self._advance(self._at + len(part))

    @property
    def _block_end(self) -> int:
        return min(self._begin + self._block_size, self._end)

    def _add_zeroes(self, length: int) -> Iterator[Block]:
        end = self._at + length
        if self._hash is not None:
            part = min(end, self._block_end) - self._at
            self._hash.update(memoryview(self._zeroes)[:part])
            yield from self._advance(self._at + part)
        if self._at < end:
            whole = end if end == self._end else end // self._block_size * self._block_size
            if whole > self._begin:
                yield from self._advance(whole)
            self._at = end

    def _advance(self, at: int) -> Iterator[Block]:
        self._at = at
        if at < self._block_end:
            return
        length = at - self._begin
        checksum = self._hash.hexdigest() if self._hash is not None else ""
        # Zeros that were read together with other data.
        yield Block(self._begin, length, "" if checksum and checksum == _of_zeroes(length) else checksum)
        self._begin, self._hash = at, None


@lru_cache(maxsize=4)  # a whole block, and what is left at the end
def _of_zeroes(length: int) -> str:
    return hashlib.sha256(bytes(length)).hexdigest()


def one_by_one(blocks: Iterable[Block], block_size: int) -> Iterator[Block]:
    """The same, runs of zeros in their blocks: two lists of equal content are equal then."""
    for block in blocks:
        for offset in range(block.offset, block.end, block_size):
            yield Block(offset, min(block_size, block.end - offset), block.checksum)
