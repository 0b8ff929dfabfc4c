"""Reading the headers of RBD images straight from RADOS: size, times and snapshots without opening the image.

An open, even a read-only one, costs a dozen round trips; a header read costs one, and leaves no watcher. The layout
is that of the on-disk format 2: object `rbd_id.<name>` holds the image's id, the omap of `rbd_header.<id>` its
metadata, encoded little-endian as in Ceph's include/encoding.h and cls/rbd/cls_rbd_types.h.

All functions here block: call them in a thread.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

WINDOW = 256  # header reads under way at once while listing; 64 leave the OSD idle at times
SHOWN = (
    "size",
    "order",
    "features",
    "create_timestamp",
    "modify_timestamp",
    "snap_seq",  # 0 until the first snapshot is taken
)
KEYS = (*SHOWN, "flags", "stripe_unit", "stripe_count", "parent")  # all of a `Header`, but for snapshots
OMAP_PAGE = 1024  # keys read at once; an image has about ten, and one more for each snapshot

FEATURES = {  # bit: name, as `rbd info` prints them (include/rbd/features.h)
    0: "layering",
    1: "striping",
    2: "exclusive-lock",
    3: "object-map",
    4: "fast-diff",
    5: "deep-flatten",
    6: "journaling",
    7: "data-pool",
    8: "operations",
    9: "migrating",
    10: "non-primary",
}
OBJECT_MAP = 1 << 3
MIGRATING = 1 << 9
OBJECT_MAP_INVALID = 1 << 0  # a flag of the image or of a snapshot


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """A snapshot that a user made. Sizes in bytes."""

    name: str
    id: int
    size: int
    created_ns: int
    flags: int = 0
    parent_overlap: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What an image's header tells. Sizes in bytes."""

    size: int
    features: int
    created_ns: int
    modified_ns: int
    snapshots: tuple[SnapshotHeader, ...]
    object_size: int
    stripe_unit: int  # with a stripe_count of 1 as long as the object
    stripe_count: int  # objects that a stripe goes over
    flags: int = 0
    # So much at the beginning is the parent's where the image has no object of its own.
    parent_overlap: int = 0

    @property
    def feature_names(self) -> str:
        return _feature_names(self.features)

    def objects(self, size: int) -> int:
        """How many objects an image of that many bytes has: `Striper::get_num_objects` of Ceph's osdc/Striper.cc."""
        periods, rest = divmod(size, self.object_size * self.stripe_count)
        units = -(-rest // self.stripe_unit)
        return (periods * self.stripe_count) + min(units, self.stripe_count)


@lru_cache
def _feature_names(features: int) -> str:
    return ", ".join(name for bit, name in FEATURES.items() if features >> bit & 1)


def read_directory(ioctx: Any) -> Iterator[dict[str, str]]:
    """Name and id of each image in the pool, by the omap of `rbd_directory`. Bytes that are no text are surrogates."""
    import rados

    after = ""
    while True:
        with rados.ReadOpCtx() as operation:
            values, _ = ioctx.get_omap_vals(operation, after, "id_", OMAP_PAGE)
            ioctx.operate_read_op(operation, "rbd_directory")
            page = dict(values)
        for key, value in page.items():
            yield {"id": key.removeprefix("id_"), "name": _text(value, 0)[0]}
        if len(page) < OMAP_PAGE:
            return
        after = max(page)


def read_image_id(ioctx: Any, name: str) -> str:
    """The id of the image of that name; raises rados.ObjectNotFound."""
    return _text(ioctx.read(f"rbd_id.{name}"), 0)[0]


def read_headers(ioctx: Any, ids: Iterable[str], keys: tuple[str, ...] = KEYS) -> Iterator[Header | None]:
    """The headers of many images, in order, several reads under way at once; None for one that is gone.

    Of many, these keys are read: a list of all costs the OSD nearly twice as much, and only what has had a snapshot
    needs it. With `SHOWN`, which costs still less, a header tells nothing of what is allocated.
    """
    images = list(ids)
    if len(images) == 1:
        keys = ()
    with (
        closing(_in_window(_Read(ioctx, image_id, keys) for image_id in images)) as found,
        closing(_in_window(_completed(ioctx, images, found))) as omaps,
    ):
        for omap in omaps:
            yield _decode(omap) if omap and "size" in omap else None


Omap = dict[str, bytes]


class _Read:
    """Reads these keys of a header, or all, or has them already. `finish` or `drop` it, once."""

    def __init__(
        self, ioctx: Any, image_id: str, keys: tuple[str, ...] = (), omap: Omap | None = None
    ) -> None:
        self._ioctx, self._id, self._keys, self._omap = ioctx, image_id, keys, omap
        if omap is None:
            self._operation = operation = ioctx.create_read_op()
            if keys:
                self._values, _ = ioctx.get_omap_vals_by_keys(operation, keys)
            else:
                self._values, _ = ioctx.get_omap_vals(operation, "", "", OMAP_PAGE)
            self._completion = ioctx.operate_aio_read_op(operation, f"rbd_header.{image_id}")

    def finish(self) -> Omap:
        """{} for an image that was removed since it was listed."""
        import rados

        if self._omap is not None:
            return self._omap
        try:
            self._completion.wait_for_complete()
            status = self._completion.get_return_value()
            if status == -errno.ENOENT:
                return {}
            if status < 0:
                raise rados.OSError(f"cannot read the header of image id {self._id}", errno=-status)
            omap: Omap = dict(self._values)
        finally:
            self._ioctx.release_read_op(self._operation)
        while not self._keys and len(omap) and len(omap) % OMAP_PAGE == 0:
            page = _read_page(self._ioctx, self._id, max(omap))
            if not page:
                break
            omap.update(page)
        return omap

    def drop(self) -> None:
        """After an error: librados still writes to the result, and freeing it beneath it would crash us."""
        if self._omap is None:
            self._completion.wait_for_complete()  # not longer than rados_osd_op_timeout
            self._ioctx.release_read_op(self._operation)


def _in_window(reads: Iterator[_Read]) -> Generator[Omap, None, None]:
    """Finish reads in their order; so many are begun."""
    pending: deque[_Read] = deque()
    try:
        for read in reads:
            pending.append(read)
            if len(pending) >= WINDOW:
                yield pending.popleft().finish()
        while pending:
            yield pending.popleft().finish()
    finally:
        for read in pending:
            read.drop()


def _completed(ioctx: Any, ids: Sequence[str], found: Iterator[Omap]) -> Iterator[_Read]:
    """What was found, with all keys of those that had a snapshot once."""
    for image_id, omap in zip(ids, found, strict=True):
        complete = len(ids) == 1 or not omap or not any(omap.get("snap_seq", b"?"))
        yield _Read(ioctx, image_id, omap=omap if complete else None)


def _read_page(ioctx: Any, image_id: str, after: str) -> dict[str, bytes]:
    import rados

    with rados.ReadOpCtx() as operation:
        values, _ = ioctx.get_omap_vals(operation, after, "", OMAP_PAGE)
        ioctx.operate_read_op(operation, f"rbd_header.{image_id}")
        return dict(values)


def _decode(omap: dict[str, bytes]) -> Header:
    snapshots = [_snapshot(value) for key, value in omap.items() if key.startswith("snapshot_")]
    object_size = 1 << omap["order"][0]
    return Header(
        size=_u64(omap["size"], 0),
        features=_u64(omap["features"], 0),
        created_ns=_time(omap.get("create_timestamp", b"")),
        modified_ns=_time(omap.get("modify_timestamp") or omap.get("create_timestamp", b"")),
        snapshots=tuple(snapshot for snapshot in snapshots if snapshot is not None),
        object_size=object_size,
        stripe_unit=_u64(omap["stripe_unit"], 0) if "stripe_unit" in omap else object_size,
        stripe_count=_u64(omap["stripe_count"], 0) if "stripe_count" in omap else 1,
        flags=_u64(omap["flags"], 0) if "flags" in omap else 0,
        parent_overlap=_overlap(omap["parent"]) if "parent" in omap else 0,
    )


def _snapshot(value: bytes) -> SnapshotHeader | None:
    """Decode a cls_rbd_snap; None for snapshots of groups, mirroring and the trash, which no user asked for."""
    version, compatible = value[0], value[1]
    at = 6  # the version header
    snapshot_id, at = _u64(value, at), at + 8
    name, at = _text(value, at)
    size, at = _u64(value, at), at + 8
    overlap = 0
    if compatible < 8:  # Mimic and before: features, and the parent as a versioned structure
        at += 8
        overlap = _overlap(value[at:])
        at += 6 + struct.unpack_from("<I", value, at + 2)[0]
    at += 1  # protection status
    flags, at = _u64(value, at), at + 8
    created_ns = 0
    if version >= 5:
        (length,) = struct.unpack_from("<I", value, at + 2)
        (kind,) = struct.unpack_from("<I", value, at + 6)
        if kind != 0:  # SNAPSHOT_NAMESPACE_TYPE_USER
            return None
        at += 6 + length
        created_ns = _time(value[at:])
    if compatible >= 8:
        overlap = _optional(value, at + 8 + 4)  # the time, the count of children
    return SnapshotHeader(name, snapshot_id, size, created_ns, flags, overlap)


def _overlap(value: bytes) -> int:
    """Of a cls_rbd_parent."""
    version, at = value[0], 6
    at += 8  # the pool
    if version >= 2:
        _, at = _text(value, at)  # the namespace
    _, at = _text(value, at)  # the image's id
    at += 8  # the snapshot's
    return _optional(value, at) if version >= 2 else _u64(value, at)


def _optional(value: bytes, at: int) -> int:
    """An optional u64, 0 when there is none."""
    return _u64(value, at + 1) if value[at] else 0


def _u64(value: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", value, at)[0])


def _text(value: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", value, at)
    return value[at + 4 : at + 4 + length].decode(errors="surrogateescape"), at + 4 + length


def _time(value: bytes) -> int:
    if len(value) < 8:
        return 0
    seconds, nanoseconds = struct.unpack_from("<II", value)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
