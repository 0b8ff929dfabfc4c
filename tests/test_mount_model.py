"""Sequences of system calls on mounted volumes against bytearrays: what every handle reads, what is a hole, and what
the storage has, whichever way it was written.

Three volumes on one mount, two of a driver and one of another, since copy_file_range works between them. They are
the same for all sequences of a driver: each begins by punching them out. The steps are test_contract_model.py's and
the kernel's more; how many, see models.py.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from disks import ATTRIBUTE_SECONDS, Disk
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
from mounts import mounted, wait_until
from volumes import VARIANTS, Storage, assert_same, raises, random_bytes, variants

from volfs.extents import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate

pytestmark = pytest.mark.timeout(1800)  # a failure is made shorter for some minutes

# The driver of the third volume. RBD and iSCSI move bytes in ways of their own; the others are much the same.
OTHERS = {"rbd": "file", "iscsi-512": "rbd", "iscsi-4096": "block", "block": "file", "file": "block"}
TELLS_HOLES = ("rbd", "file")  # whatever the machine is: a volume that is punched out is one hole again
HANDLES = {
    "buffered": os.O_RDWR,
    "direct": os.O_RDWR | os.O_DIRECT,
    "synchronous": os.O_RDWR | os.O_SYNC,
    "direct and synchronous": os.O_RDWR | os.O_DIRECT | os.O_DSYNC,
}
MODES = {"punch": PUNCH_HOLE | KEEP_SIZE, "zero": ZERO_RANGE | KEEP_SIZE, "preallocate": KEEP_SIZE}
MAPPED = "mapped"  # another way to read

Change = Literal["write", "punch", "zero", "preallocate", "copy", "leave"]
CHANGES: tuple[Change, ...] = ("write", "punch", "zero", "preallocate", "copy")


class Place(NamedTuple):
    """A range begins here: a volume by its number, and the handle (of HANDLES) to reach it by."""

    volume: int
    handle: str
    offset: int


class Step(NamedTuple):
    """`action` is a change of the range at `place`, or

    read, walk: read it, or seek its data and holes;
    store: write it to a mapping, seek, and then msync;
    together: `parts`, changes of pieces of the range, each in a thread and by a handle of its own;
    rewrite: open with O_TRUNC, and do `parts`; "finish" extends the file to its size at the end;
    fsync, reopen: the volume.

    `source` is where to copy from.
    """

    action: str
    place: Place
    length: int
    source: Place
    parts: Sequence[Change] = ()
    finish: bool = False


PLACES = st.builds(Place, st.integers(0, 2), st.sampled_from(list(HANDLES)), OFFSETS)
ACTIONS = st.sampled_from(
    [*CHANGES, *CHANGES, "store", "together", "rewrite", "read", "walk", "fsync", "reopen"]
)
STEPS = st.builds(
    lambda action, place, length, source, parts, finish: Step(
        action,
        place,
        min(length, SIZE - place.offset),
        source,
        parts if action in ("together", "rewrite") else (),
        finish and action == "rewrite",
    ),
    ACTIONS,
    PLACES,
    LENGTHS,
    PLACES,
    st.lists(st.sampled_from([*CHANGES, "leave"]), min_size=2, max_size=5),
    st.booleans(),
)
START = st.tuples(STARTS, STARTS, STARTS)


class Volume:
    """One volume and what it should hold. Open by every handle of HANDLES, and mapped, until it is closed."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.content = bytearray(SIZE)
        self.handles: dict[str, int] = {}
        self.mapping: mmap.mmap | None = None

    def __str__(self) -> str:
        return self.disk.stored.driver

    def open(self) -> None:
        self.handles = {name: os.open(self.disk.path, flags) for name, flags in HANDLES.items()}
        self.mapping = mmap.mmap(self.handles["buffered"], SIZE)

    def close(self) -> None:
        """An error of close(2) is not lost."""
        handles, self.handles = self.handles, {}
        mapping, self.mapping = self.mapping, None
        with ExitStack() as stack:
            for descriptor in handles.values():
                stack.callback(os.close, descriptor)
            if mapping is not None:
                mapping.close()

    def begin(self, start: str) -> None:
        """Punched out, and then written past volfs. Nobody has it open."""
        descriptor = os.open(self.disk.path, os.O_RDWR)
        try:
            fallocate(descriptor, MODES["punch"], 0, SIZE)
        finally:
            os.close(descriptor)
        self.content = bytearray(SIZE)
        self.check_storage("punched out")
        if self.disk.stored.driver in TELLS_HOLES:
            descriptor = os.open(self.disk.path, os.O_RDONLY)
            try:
                with raises(errno.ENXIO):
                    os.lseek(descriptor, 0, os.SEEK_DATA)
            finally:
                os.close(descriptor)
        if start != "empty":
            self.content = start_content(start)
            self.disk.stored.write(bytes(self.content))
        self.open()

    def read(self, handle: str, offset: int, length: int) -> bytes:
        if handle == MAPPED:
            assert self.mapping is not None
            return self.mapping[offset : offset + length]
        return os.pread(self.handles[handle], length, offset)

    def check(self, handle: str, offset: int, length: int, when: str) -> None:
        """Seek first: a read might make a driver look better than it is."""
        if handle != MAPPED:
            self.walk(handle, offset, length, when)
        found = self.read(handle, offset, length)
        assert_same(found, self.content[offset : offset + length], offset, f"{self}, {handle}, {when}")

    def walk(self, handle: str, offset: int, length: int, when: str) -> None:
        """No hole of the range hides a byte, and data and holes take turns."""
        descriptor, end = self.handles[handle], offset + length
        while offset < end:
            try:
                data = os.lseek(descriptor, offset, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                data = SIZE
            assert offset <= data <= SIZE, f"{self}, {when}: data at {data}, looked for from {offset}"
            hidden = self.content[offset:data]
            assert_same(bytes(len(hidden)), hidden, offset, f"{self}, {handle}, {when}: hole up to {data}")
            if data < SIZE:
                offset = os.lseek(descriptor, data, os.SEEK_HOLE)
                assert data < offset <= SIZE, f"{self}, {when}: a hole at {offset}, looked for from {data}"
            else:
                offset = data

    def check_storage(self, when: str) -> None:
        assert_same(self.disk.stored.read(), self.content, 0, f"{self}: on the storage, {when}")


class Model:
    """The volumes of a mount. Each step is checked around its range as soon as it is done."""

    def __init__(self, mount: VolumesOnMount) -> None:
        self.mount = mount
        self.volumes = [Volume(disk) for disk in mount.disks]

    def run(self, starts: Sequence[str], *lives: Sequence[Step]) -> None:
        """`lives` are the steps of one mount after the other."""
        try:
            for volume, start in zip(self.volumes, starts, strict=True):
                volume.begin(start)
            number = 0
            for life, steps in enumerate(lives):
                if life:
                    self._end(f"unmounted at step {number}")
                    self.mount.remount()
                    self._open()
                for step in steps:
                    self.do(step, number)
                    number += 1
            self._end("at the end")
            self._open()  # nothing of it is the page cache's
        finally:
            for volume in self.volumes:
                volume.close()

    def _open(self) -> None:
        for volume in self.volumes:
            volume.open()
            volume.check("buffered", 0, SIZE, "opened anew")

    def _end(self, when: str) -> None:
        for volume in self.volumes:
            volume.check("direct", 0, SIZE, when)
            volume.close()
            volume.check_storage(f"closed {when}")

    def do(self, step: Step, number: int) -> None:
        action, place, length, source, parts, _ = step
        volume, offset = self.volumes[place.volume], place.offset
        when = f"after step {number}, {action} {place} {length} {source} {' '.join(parts)}"
        match action:
            case "read":
                volume.check(place.handle, offset, length, when)
            case "walk":
                volume.walk(place.handle, 0, SIZE, when)
            case "store":
                self.store(volume, offset, random_bytes(length, number), when)
            case "together":
                self.together(step, number)
            case "rewrite":
                self.rewrite(step, number)
                offset, length = 0, SIZE
            case "fsync":
                os.fsync(volume.handles[place.handle])
                volume.check_storage(when)
            case "reopen":
                volume.close()
                volume.check_storage(when)
                volume.open()
            case _:
                descriptor = volume.handles[place.handle]
                self.change(action, volume, descriptor, offset, length, source, number)
        begin, end = max(0, offset - PAGE), min(SIZE, offset + length + PAGE)
        ways = [*HANDLES, MAPPED]
        volume.check(ways[number % len(ways)], begin, end - begin, when)

    def change(
        self, action: str, volume: Volume, descriptor: int, offset: int, length: int, source: Place, seed: int
    ) -> None:
        if action == "copy":
            self.copy(volume, descriptor, offset, length, source)
        elif action == "write":
            data = random_bytes(length, seed)
            volume.content[offset : offset + length] = data
            assert os.pwrite(descriptor, data, offset) == length
        elif action != "leave":
            if action != "preallocate":
                volume.content[offset : offset + length] = bytes(length)
            fallocate(descriptor, MODES[action], offset, length)

    def copy(self, volume: Volume, descriptor: int, offset: int, length: int, source: Place) -> None:
        """All of it, in as many calls as it takes; EINVAL where the ranges overlap."""
        origin, begin = self.volumes[source.volume], source.offset
        length = min(length, SIZE - begin)
        if origin is volume and abs(begin - offset) < length:
            with raises(errno.EINVAL):
                os.copy_file_range(origin.handles[source.handle], descriptor, length, begin, offset)
            return
        volume.content[offset : offset + length] = origin.content[begin : begin + length]
        while length:
            copied = os.copy_file_range(origin.handles[source.handle], descriptor, length, begin, offset)
            assert 0 < copied <= length, copied
            begin, offset, length = begin + copied, offset + copied, length - copied

    def store(self, volume: Volume, offset: int, data: bytes, when: str) -> None:
        assert volume.mapping is not None
        volume.content[offset : offset + len(data)] = data
        volume.mapping[offset : offset + len(data)] = data
        volume.walk("buffered", offset, len(data), when)
        volume.mapping.flush()

    def together(self, step: Step, number: int) -> None:
        """Sources of copies are another volume's: what a thread reads, no other one changes."""
        place, source, count = step.place, step.source, len(step.parts)
        volume = self.volumes[place.volume]
        source = source._replace(volume=(place.volume + 1 + source.volume % 2) % 3)
        piece, names = -(-step.length // count), list(HANDLES)
        with ThreadPoolExecutor(count) as threads:
            tasks = []
            for index, action in enumerate(step.parts):
                begin, end = index * piece, min(step.length, (index + 1) * piece)
                if begin < end:
                    descriptor = volume.handles[names[index % len(names)]]
                    what = (volume, descriptor, place.offset + begin, end - begin, source)
                    tasks.append(threads.submit(self.change, action, *what, number * 10 + index))
            for task in tasks:
                task.result()

    def rewrite(self, step: Step, number: int) -> None:
        """From front to back in pieces, as cp does; what is left out is zeros, but not behind the last."""
        place, length, parts = step.place, step.length, step.parts
        volume = self.volumes[place.volume]
        source = step.source._replace(volume=(place.volume + 1) % 3)
        flags = HANDLES[place.handle] & ~os.O_ACCMODE | os.O_WRONLY
        descriptor = os.open(volume.disk.path, flags | os.O_TRUNC)
        try:
            written = 0
            for index, action in enumerate(parts):
                offset = index * length
                size = min(length, SIZE - offset)
                if action in ("leave", "preallocate") or size <= 0:
                    continue
                if action == "copy":
                    size = min(size, SIZE - source.offset)
                volume.content[written:offset] = bytes(offset - written)
                self.change(action, volume, descriptor, offset, size, source, number * 10 + index)
                written = offset + size
            if step.finish:
                os.ftruncate(descriptor, SIZE)
                volume.content[written:] = bytes(SIZE - written)
        finally:
            os.close(descriptor)


class VolumesOnMount:
    """Three volumes, whose mount can be made again."""

    def __init__(self, variant: Any, storage: Storage, directory: Path) -> None:
        _, driver, options = variant
        _, other, other_options = next(it for it in VARIANTS if it[0] == OTHERS[variant[0]])
        self._directory = directory
        self._prefixes = [storage.prefix(driver), storage.prefix(other)]
        self._environment = storage.environment(driver) | storage.environment(other)
        self._stored = [
            *(storage.make(driver, SIZE, **options, **small_objects(driver)) for _ in range(2)),
            storage.make(other, SIZE, **other_options, **small_objects(other)),
        ]
        self._stack = ExitStack()
        self.disks: list[Disk] = []
        self.mount()

    def mount(self) -> None:
        mount = self._stack.enter_context(mounted(self._directory, self._prefixes, env=self._environment))
        self.disks = [Disk(mount, stored) for stored in self._stored]
        for disk in self.disks:
            wait_until(disk.path.exists, "the volume is listed", ATTRIBUTE_SECONDS)

    def unmount(self) -> None:
        self._stack.close()

    def remount(self) -> None:
        self.unmount()
        self.mount()


@pytest.fixture(scope="module", params=variants(quick=("file",)))
def volumes_on_mount(
    request: pytest.FixtureRequest, module_storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VolumesOnMount]:
    made = VolumesOnMount(request.param, module_storage, tmp_path_factory.mktemp("m"))
    yield made
    made.unmount()


@given(starts=START, steps=st.lists(STEPS, max_size=20))
@settings(max_examples=5)
def test_a_short_sequence_does_what_bytearrays_do(
    volumes_on_mount: VolumesOnMount, starts: Sequence[str], steps: list[Step]
) -> None:
    Model(volumes_on_mount).run(starts, steps)


@pytest.mark.slow
@given(starts=START, steps=st.lists(STEPS, min_size=LONG_SEQUENCE, max_size=LONG_SEQUENCE))
@settings(
    max_examples=max(1, LONG_STEPS // 2 // LONG_SEQUENCE),  # one takes longer than on a driver alone
    suppress_health_check=[HealthCheck.too_slow],
)
def test_thousands_of_steps_do_what_bytearrays_do(
    volumes_on_mount: VolumesOnMount, starts: Sequence[str], steps: list[Step]
) -> None:
    Model(volumes_on_mount).run(starts, steps)


@pytest.mark.slow
@given(starts=START, lives=st.lists(st.lists(STEPS, min_size=5, max_size=10), min_size=2, max_size=3))
@settings(max_examples=max(2, LONG_STEPS // 1000), suppress_health_check=[HealthCheck.too_slow])
def test_a_new_mount_shows_what_the_old_one_left(
    volumes_on_mount: VolumesOnMount, starts: Sequence[str], lives: list[list[Step]]
) -> None:
    Model(volumes_on_mount).run(starts, *lives)
