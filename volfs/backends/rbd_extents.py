"""Which parts of an RBD image are data, exactly as `rbd diff` tells it, at a cost that follows the data.

librbd's diff_iterate asks the storage about each object in turn, 19000 a second on a small cluster: some 14 s for a
terabyte of nothing. So the object map, where there is a valid one, tells first which objects exist, and only these
are asked for. Where none is, and where a clone's parent may have data, each is asked for. What an answer costs is
bounded by the number of objects that may be asked for; the caller asks again from where it ends.

Exact is: to the end of what was written in an object. A range that was zeroed inside one is data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from volfs.backends.base import Extent
from volfs.backends.rbd_header import MIGRATING, Header, SnapshotHeader, read_headers
from volfs.backends.rbd_object_map import ObjectMap, can_be_trusted, map_name, read_maps

ASKED = 1024  # objects for one answer: 4 GiB of data, or 0.05 s here
# Objects between two that exist that are asked for, too: librbd asks for ten at once (rbd_concurrent_management_ops),
# so that they cost less than another call.
GAP = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """What is known of an image, or of its snapshot, before an object is asked for. Sizes in bytes."""

    size: int
    parent_overlap: int  # so much at the beginning may be the parent's data
    period: int  # where an object and a stripe begin together
    stripe_count: int  # objects of a period
    objects: ObjectMap | None  # None: any may exist


def image_extents(image: Any, ioctx: Any, snapshot: str, offset: int, length: int) -> list[Extent]:
    """The extents of the range, in order, up to where asking for more would cost too much; at least one.

    `image` is open, at the `snapshot` if one is named. Blocks, for no object longer than librados' timeout: call it in
    a thread. Raises exceptions of rbd and rados.
    """
    end = offset + length
    layout = _layout(image, ioctx, snapshot, length)
    if layout is None or offset >= layout.size:  # gone, or shrunk: the caller meets the error when it reads
        return [Extent(offset, length, data=True)]
    known = min(end, layout.size)
    extents: list[Extent] = []
    asked = 0
    at = offset
    while at < known and asked < ASKED:
        begin, until = _next_run(layout, at, known, ASKED - asked)
        asked += (until - begin) // layout.period * layout.stripe_count
        _append(extents, at, min(begin, known), data=False)
        if begin < known:
            for run in _ask(image, begin, until - begin):
                _append(extents, max(at, run.offset), min(run.end, known), data=run.data)
        at = min(until, known)
    if at == known < end:
        _append(extents, known, end, data=True)
    return extents


def _layout(image: Any, ioctx: Any, snapshot: str, length: int) -> Layout | None:
    """For a range of that length; None when nothing is sure.

    The header is asked for: an image opened read-only is told of no change to it.
    """
    before = _header(image, ioctx, snapshot)
    if before is None:
        return None
    header, found = before
    objects = None
    # For a few objects the map is not worth its read: of a terabyte it is 64 KiB.
    if can_be_trusted(header, found) and length > GAP * header.object_size:
        (objects,) = read_maps(ioctx, [map_name(image.id(), header, found)])
        # Between turning the feature off and the end of a rebuild the map misses what is written: valid is what was so
        # before it was read and is so after that.
        after = _header(image, ioctx, snapshot)
        if after is None:
            return None
        header, found = after
        if objects and not (can_be_trusted(header, found) and objects.covers(header, found)):
            objects = None
    return Layout(
        size=min((found or header).size, image.size()),
        parent_overlap=(found or header).parent_overlap,
        period=header.object_size * header.stripe_count,
        stripe_count=header.stripe_count,
        objects=objects,
    )


def _header(image: Any, ioctx: Any, snapshot: str) -> tuple[Header, SnapshotHeader | None] | None:
    (header,) = read_headers(ioctx, [image.id()])
    if header is None or header.features & MIGRATING:
        return None
    found = next((it for it in header.snapshots if it.name == snapshot), None)
    return None if snapshot and found is None else (header, found)


def _next_run(layout: Layout, at: int, end: int, most: int) -> tuple[int, int]:
    """The first run of whole periods from `at` on that may be data, with `most` objects or some more; from `end` on
    when there is none.
    """
    count = layout.stripe_count
    first = last = _next_period(layout, at // layout.period)
    if first is None or first * layout.period >= end:
        return end, end
    while last is not None and (last - first) * count < most and last * layout.period < end:
        until = last + 1
        last = _next_period(layout, until)
        if last is not None and (last - until) * count > GAP:
            break
    return first * layout.period, until * layout.period


def _next_period(layout: Layout, number: int) -> int | None:
    """The first period from this one on that may have data."""
    if layout.objects is None or number * layout.period < layout.parent_overlap:
        return number
    found = layout.objects.next_existing(number * layout.stripe_count)
    return None if found == layout.objects.count else found // layout.stripe_count


def _ask(image: Any, offset: int, length: int) -> Iterator[Extent]:
    """What librbd knows of a range of whole periods: it has been wrong about others."""
    runs: list[tuple[int, int]] = []

    def collect(begin: int, size: int, exists: bool) -> None:
        if exists:  # else removed: a hole, as what is not told of
            runs.append((begin, begin + size))

    image.diff_iterate(offset, length, None, collect, include_parent=True, whole_object=False)
    at = offset
    for begin, end in sorted(runs):
        if at < begin:
            yield Extent(at, begin - at, data=False)
        if at < end:
            yield Extent(max(at, begin), end - max(at, begin), data=True)
            at = end
    if at < offset + length:
        yield Extent(at, offset + length - at, data=False)


def _append(extents: list[Extent], begin: int, end: int, *, data: bool) -> None:
    """Add a run, to the last one where both are of a kind. Nothing when it is empty."""
    if begin >= end:
        return
    if extents and extents[-1].data == data:
        begin = extents.pop().offset
    extents.append(Extent(begin, end - begin, data))
