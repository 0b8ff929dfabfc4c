"""Sequences of requests on every driver against a bytearray: what is read, what is a hole, and what the storage has.

Hypothesis makes the sequences and shortens one that fails; each runs on a new volume, so that it fails again alone.
How many, see models.py; test_mount_model.py does the same a level higher, through the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    LENGTHS,
    LONG_SEQUENCE,
    LONG_STEPS,
    OFFSETS,
    PAGE,
    SIZE,
    STARTS,
    small_objects,
    start_content,
)
from volumes import Storage, StoredVolume, assert_holes_are_zero, assert_same, random_bytes, variants

from volfs.backends.base import Backend, BackendVolume

pytestmark = pytest.mark.timeout(1800)  # a failure is made shorter for some minutes

Operation = Literal["write", "discard", "write_zeroes", "leave"]


class Step(NamedTuple):
    """`action` is an operation on the range, or read, extents, flush, refresh, reopen, together.

    "together" does `parts`, operations on pieces of the range, at the same time.
    """

    action: str
    offset: int
    length: int
    parts: Sequence[Operation] = ()


OPERATIONS: tuple[Operation, ...] = ("write", "discard", "write_zeroes")
ACTIONS = st.sampled_from(
    [*OPERATIONS, *OPERATIONS, "together", "read", "extents", "flush", "refresh", "reopen"]
)
STEPS = st.builds(
    lambda action, offset, length, parts: Step(
        action, offset, min(length, SIZE - offset), parts if action == "together" else ()
    ),
    ACTIONS,
    OFFSETS,
    LENGTHS,
    st.lists(st.sampled_from([*OPERATIONS, "leave"]), min_size=2, max_size=5),
)


class Model:
    """A volume and what it should hold. Each step is checked around its range as soon as it is done."""

    def __init__(self, stored: StoredVolume, start: str) -> None:
        self.stored = stored
        self.content = start_content(start)
        if start != "empty":
            stored.write(bytes(self.content))

    async def run(self, steps: Sequence[Step]) -> None:
        backend = self.stored.make_backend()
        try:
            rest = list(enumerate(steps))[::-1]
            while True:  # once for each open
                async with await backend.open(self.stored.source, writable=True) as volume:
                    while rest:
                        number, step = rest.pop()
                        if step.action == "reopen":
                            break
                        await self.do(volume, step, number)
                    else:
                        await self.check(volume, 0, SIZE, "at the end")
                        break
                # Closed: nobody needs to have flushed.
                self.check_storage(f"when closed for step {number}")
            self.check_storage("at the end")
            await self.check_opened_anew(backend)
        finally:
            await backend.aclose()

    async def do(self, volume: BackendVolume, step: Step, number: int) -> None:
        action, offset, length, parts = step
        when = f"after step {number}, {action} {offset}+{length} {' '.join(parts)}"
        match action:
            case "write" | "discard" | "write_zeroes":
                await self.change(volume, action, offset, length, number)
            case "together":
                piece = -(-length // len(parts))
                async with trio.open_nursery() as nursery:
                    for index, operation in enumerate(parts):
                        begin, end = offset + index * piece, offset + min(length, (index + 1) * piece)
                        if operation != "leave" and begin < end:
                            seed = number * 10 + index
                            nursery.start_soon(self.change, volume, operation, begin, end - begin, seed)
            case "flush":
                await volume.flush()
                self.check_storage(when)
            case "refresh":
                assert (await volume.refresh()).size == SIZE
            case "read":
                found = await volume.pread(offset, length)
                assert_same(found, self.content[offset : offset + length], offset, when)
            case "extents":
                await assert_holes_are_zero(volume, self.content, offset, length, when)
        begin, end = max(0, offset - PAGE), min(SIZE, offset + length + PAGE)
        await self.check(volume, begin, end - begin, when)

    async def change(
        self, volume: BackendVolume, operation: Operation, offset: int, length: int, seed: int
    ) -> None:
        data = random_bytes(length, seed) if operation == "write" else bytes(length)
        self.content[offset : offset + length] = data
        match operation:
            case "write":
                await volume.pwrite(offset, data)
            case "discard":
                await volume.discard(offset, length)
            case "write_zeroes":
                await volume.write_zeroes(offset, length)

    async def check(self, volume: BackendVolume, offset: int, length: int, when: str) -> None:
        """Extents first: a read might make a driver look better than it is."""
        await assert_holes_are_zero(volume, self.content, offset, length, when)
        found = await volume.pread(offset, length)
        assert_same(found, self.content[offset : offset + length], offset, when)

    def check_storage(self, when: str) -> None:
        assert_same(self.stored.read(), self.content, 0, f"on the storage, {when}")

    async def check_opened_anew(self, backend: Backend) -> None:
        async with await backend.open(self.stored.source, writable=False) as volume:
            await self.check(volume, 0, SIZE, "opened anew")
        assert self.stored.users() == []


@pytest.fixture(params=variants(quick=("file",)))
def make(request: pytest.FixtureRequest, storage: Storage) -> Callable[[], StoredVolume]:
    """make(): a new volume of zeros, of each driver in turn."""
    _, driver, options = request.param
    return lambda: storage.make(driver, SIZE, **options, **small_objects(driver))


async def follow(make: Callable[[], StoredVolume], start: str, steps: Sequence[Step]) -> None:
    stored = make()
    try:
        await Model(stored, start).run(steps)
    finally:
        stored.remove()


@given(start=STARTS, steps=st.lists(STEPS, max_size=20))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_short_sequence_does_what_a_bytearray_does(
    make: Callable[[], StoredVolume], start: str, steps: list[Step]
) -> None:
    await follow(make, start, steps)


@pytest.mark.slow
@given(start=STARTS, steps=st.lists(STEPS, min_size=LONG_SEQUENCE, max_size=LONG_SEQUENCE))
@settings(
    max_examples=max(1, LONG_STEPS // LONG_SEQUENCE),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_thousands_of_steps_do_what_a_bytearray_does(
    make: Callable[[], StoredVolume], start: str, steps: list[Step]
) -> None:
    await follow(make, start, steps)
