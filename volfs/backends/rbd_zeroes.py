"""Zeroing long ranges of an RBD image in steps, each with a deadline of its own.

librbd's aio_write_zeroes removes the objects that are all within the range, and zeroes the ends of the range in the
others, whatever their alignment; what a clone's parent has there is hidden. With an object map librbd skips what does
not exist (a terabyte of nothing: 1.3 s here), without one it asks for each object.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import trio

from volfs.errors import VolfsError

STEP = 1 << 30  # bytes, about, for which one deadline is enough
STEPS = 4  # under way at once, so that a slow object does not hold up the rest


def stripe_period(image: Any) -> int:
    """Bytes after which an object and a stripe of the open image begin together. May block; call it in a thread."""
    return int(image.stat()["obj_size"]) * int(image.stripe_count())


def zero_steps(offset: int, length: int, period: int) -> Iterator[tuple[int, int]]:
    """The range in steps of (offset, length) that meet where a period begins, so that no object is parted."""
    step = max(1, STEP // period) * period
    end = offset + length
    while offset < end:
        until = min(end, (offset // step + 1) * step)
        yield offset, until - offset
        offset = until


async def in_parallel(
    steps: Iterable[tuple[int, int]], call: Callable[[int, int], Awaitable[object]]
) -> None:
    """Await `call` for each step, STEPS at once. No more begin after an error, the first of which is raised."""
    waiting = iter(steps)
    errors: list[VolfsError] = []

    async def work() -> None:
        for step in waiting:  # shared by all
            if errors:
                break
            try:
                await call(*step)
            except VolfsError as exc:
                errors.append(exc)

    async with trio.open_nursery() as nursery:
        for _ in range(STEPS):
            nursery.start_soon(work)
    if errors:
        raise errors[0]
