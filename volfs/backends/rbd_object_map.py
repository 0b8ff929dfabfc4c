"""Reading the object maps of RBD images: which of an image's objects exist, for one round trip an image.

With the feature object-map librbd keeps, in `rbd_object_map.<id>` and for a snapshot `rbd_object_map.<id>.<snapshot's
id>`, two bits for each object of 4 MiB or so (Ceph's include/rbd/object_map_types.h). It marks an object before it
writes it, so a map tells too much at times, and too little only when it is flagged as invalid.

librbd's own use of it, diff_iterate with whole_object, reads the maps of all snapshots, and for a clone the parent's,
where need be object by object; here it is the one map that counts.

`read_maps` blocks: call it in a thread.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from volfs.backends.base import BLOCK_UNIT
from volfs.backends.rbd_header import MIGRATING, OBJECT_MAP, OBJECT_MAP_INVALID, Header, SnapshotHeader

WINDOW = 64  # reads under way at once
NONEXISTENT = 0  # the state; all others exist, or may do

_MARKED = re.compile(rb"[^\0]")  # a byte with an object that exists


@dataclass(frozen=True, slots=True)
class ObjectMap:
    """The states of `count` objects, four to a byte, the first in its highest bits."""

    states: bytes
    count: int

    def covers(self, header: Header, snapshot: SnapshotHeader | None) -> bool:
        """Whether it tells of all objects of the image, or of its snapshot; not while somebody resizes that."""
        return self.count >= header.objects((snapshot or header).size)

    def exists(self, number: int) -> bool:
        return self.states[number // 4] >> (6 - number % 4 * 2) & 3 != NONEXISTENT

    def next_existing(self, number: int) -> int:
        """The first object from this one on that exists; `count` when there is none."""
        while number < self.count:
            if number % 4 == 0:
                found = _MARKED.search(self.states, number // 4)
                if found is None:
                    break
                number = found.start() * 4
            if self.exists(number):
                return number
            number += 1
        return self.count

    def existing(self) -> int:
        """How many exist."""
        states = int.from_bytes(self.states)
        low_bits = int.from_bytes(b"\x55" * len(self.states))
        return ((states | states >> 1) & low_bits).bit_count()


@dataclass(frozen=True, slots=True)
class MapName:
    """Where a map is, and the most objects that it is expected to have."""

    image_id: str
    snapshot_id: int | None
    count: int

    @property
    def object_name(self) -> str:
        suffix = "" if self.snapshot_id is None else f".{self.snapshot_id:016x}"
        return f"rbd_object_map.{self.image_id}{suffix}"

    @property
    def length(self) -> int:
        """Bytes that are enough for it: its states, a checksum for each 4 KiB of them, and two headers."""
        states = -(-self.count // 4)
        return states + states // 1024 + 4096


def can_be_trusted(header: Header, snapshot: SnapshotHeader | None) -> bool:
    """Whether an image, or its snapshot, has a map that tells of each object that exists.

    Not an image that is being migrated: what it has not copied yet is in another image, and not as in a parent.
    """
    flags = header.flags if snapshot is None else snapshot.flags
    return bool(header.features & OBJECT_MAP) and not (
        header.features & MIGRATING or flags & OBJECT_MAP_INVALID
    )


def map_name(image_id: str, header: Header, snapshot: SnapshotHeader | None) -> MapName:
    return MapName(image_id, snapshot.id if snapshot else None, header.objects((snapshot or header).size))


def read_maps(ioctx: Any, names: Iterable[MapName]) -> Iterator[ObjectMap | None]:
    """The maps, in order, several reads under way at once; None for one that is not there, or cannot be understood.

    The object class reads them, as for librbd: it looks at the checksums. Raises rados.TimedOut, whose callers would
    otherwise wait as long for the next thing they ask.
    """
    pending: list[_Read] = []
    for name in names:
        pending.append(_Read(ioctx, name))
        if len(pending) >= WINDOW:
            yield pending.pop(0).finish()
    while pending:
        yield pending.pop(0).finish()


def read_allocated(
    ioctx: Any, volumes: Sequence[tuple[str, Header, SnapshotHeader | None]]
) -> Iterator[int | None]:
    """Bytes of the objects that images, or snapshots of them, have; None where no map tells. Blocks, as `read_maps`.

    Each is named by its image's id and header. A clone's parent's objects are not the clone's; but one that has none
    yet has data all the same, and to 0 tar takes a file for empty: it is told to have a block at least.
    """
    maps = read_maps(ioctx, (map_name(*volume) for volume in volumes if can_be_trusted(*volume[1:])))
    for _, header, snapshot in volumes:
        objects = next(maps) if can_be_trusted(header, snapshot) else None
        if objects is None or not objects.covers(header, snapshot):
            yield None
        else:
            at = snapshot or header
            least = BLOCK_UNIT if at.parent_overlap else 0
            yield max(least, min(at.size, objects.existing() * header.object_size))


class _Read:
    """One read. librados owns its buffer until it is done, so that it may be forgotten."""

    def __init__(self, ioctx: Any, name: MapName) -> None:
        self._name = name
        self._status = -errno.EIO
        self._data = b""
        self._completion = ioctx.aio_execute(
            name.object_name, "rbd", "object_map_load", b"", name.length, oncomplete=self._arrived
        )

    def finish(self) -> ObjectMap | None:
        self._completion.wait_for_complete_and_cb()  # not longer than rados_osd_op_timeout
        if self._status == -errno.ETIMEDOUT:
            import rados

            raise rados.TimedOut(f"cannot read {self._name.object_name}", errno=errno.ETIMEDOUT)
        return _decode(self._data) if self._status > 0 else None

    def _arrived(self, completion: Any, data: bytes | None) -> None:  # on a thread of librados
        self._status, self._data = completion.get_return_value(), data or b""


def _decode(value: bytes) -> ObjectMap | None:
    """Decode a BitVector<2> of Ceph's common/bit_vector.hpp."""
    (length,) = struct.unpack_from("<I", value)
    compatible, begin = value[5], 4 + length
    (count,) = struct.unpack_from("<Q", value, 10)
    states = value[begin : begin + -(-count // 4)]
    if compatible > 1 or len(states) * 4 < count:
        return None
    return ObjectMap(states, count)
