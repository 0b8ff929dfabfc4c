"""Volumes by the hundred and by the thousand, made in seconds.

librbd takes some 15 ms to make an image, and as long to remove one. Here one image is made by it, and the others are
copies of its objects under other names and ids, many writes under way at once; librbd opens them like its own.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from services import MIB, Image, Lun, Services, image, namespace, script

WINDOW = 128  # writes under way at once


@dataclass(frozen=True)
class Images:
    """In a namespace of their own."""

    services: Services
    pool: str
    namespace: str
    sizes: dict[str, int]  # by name

    @property
    def place(self) -> tuple[str, str]:
        return self.pool, self.namespace

    def image(self, name: str) -> Image:
        return Image(self.services, self.pool, name, self.sizes[name], self.namespace)


@contextlib.contextmanager
def many_images(
    services: Services, count: int, size: int = 64 * MIB, pool: str = "volumes", shrink: int = MIB
) -> Iterator[Images]:
    """So many images. The first has `size` bytes, each of the next seven `shrink` less than the one before."""
    with (
        namespace(services, pool) as name,
        image(services, size, pool=pool, namespace=name) as template,
        services.open_pool(pool, name) as ioctx,
    ):
        sizes = {f"disk-{number:05}": size - number % 8 * shrink for number in range(count)}
        try:
            _copy(ioctx, template.name, sizes)
            yield Images(services, pool, name, sizes)
        finally:
            ids = {_read_id(ioctx, template.name), template.name}
            keep = {"rbd_directory"} | {
                f"rbd_{kind}{part}" for kind in ("id.", "header.", "object_map.") for part in ids
            }
            with _window() as start:
                for found in ioctx.list_objects():
                    if found.key not in keep:
                        start(ioctx.aio_remove(found.key))
            _forget_names(ioctx, template.name)


@contextlib.contextmanager
def many_luns(services: Services, count: int, size: int) -> Iterator[list[Lun]]:
    """So many LUNs of one target."""
    name = f"test-{secrets.token_hex(4)}"
    tid = str(1000 + secrets.randbelow(30000))
    new = script.Lun(name, size)
    place = script.Place(services.var)
    backings = [place.luns / f"{name}-{number}" for number in range(1, count + 1)]

    def tgtadm(mode: str, op: str, *arguments: str) -> None:
        services.run("tgtadm", "--lld", "iscsi", "--mode", mode, "--op", op, "--tid", tid, *arguments)

    try:
        tgtadm("target", "new", "--targetname", new.iqn)
        for number, backing in enumerate(backings, 1):
            with backing.open("xb") as file:
                file.truncate(size)
            tgtadm("logicalunit", "new", "--lun", str(number), "--backing-store", str(backing))
        tgtadm("target", "bind", "--initiator-address", "127.0.0.1")
        yield [
            Lun(services.portal, new.iqn, size, 512, False, backing, number=number)
            for number, backing in enumerate(backings, 1)
        ]
    finally:
        tgtadm("target", "delete", "--force")
        for backing in backings:
            backing.unlink(missing_ok=True)


def _copy(ioctx: Any, template: str, sizes: dict[str, int]) -> None:
    own_id = _read_id(ioctx, template)
    header = _omap(ioctx, f"rbd_header.{own_id}")
    object_map = ioctx.read(f"rbd_object_map.{own_id}", 1 << 20)
    names = {}
    with _window() as start:
        for number, (name, size) in enumerate(sizes.items()):
            image_id = f"{own_id}{number:08x}"
            names |= {f"name_{name}": _text(image_id), f"id_{image_id}": _text(name)}
            changed = {"size": struct.pack("<Q", size), "object_prefix": _text(f"rbd_data.{image_id}")}
            start(ioctx.aio_write_full(f"rbd_id.{name}", _text(image_id)))
            start(ioctx.aio_write_full(f"rbd_object_map.{image_id}", object_map))
            _set_omap(ioctx, f"rbd_header.{image_id}", header | changed, start)
        keys = list(names)
        for begin in range(0, len(keys), 1000):
            some = keys[begin : begin + 1000]
            _set_omap(ioctx, "rbd_directory", {key: names[key] for key in some}, start)


def _forget_names(ioctx: Any, kept: str) -> None:
    import rados

    own = {f"name_{kept}", f"id_{_read_id(ioctx, kept)}"}
    keys = [key for key in _omap(ioctx, "rbd_directory") if key not in own]
    for begin in range(0, len(keys), 1000):
        with rados.WriteOpCtx() as operation:
            ioctx.remove_omap_keys(operation, tuple(keys[begin : begin + 1000]))
            ioctx.operate_write_op(operation, "rbd_directory")


@contextlib.contextmanager
def _window() -> Iterator[Callable[..., None]]:
    """start(completion, operation=None): no more than WINDOW under way; all are done at the end."""
    pending: deque[tuple[Any, Callable[[], None]]] = deque()

    def finish() -> None:
        completion, done = pending.popleft()
        completion.wait_for_complete()
        done()
        assert completion.get_return_value() == 0

    def start(completion: Any, done: Callable[[], None] = lambda: None) -> None:
        pending.append((completion, done))
        if len(pending) >= WINDOW:
            finish()

    try:
        yield start
    finally:
        while pending:
            finish()


def _set_omap(ioctx: Any, name: str, values: dict[str, bytes], start: Callable[..., None]) -> None:
    operation = ioctx.create_write_op()
    ioctx.set_omap(operation, tuple(values), tuple(values.values()))
    completion = ioctx.operate_aio_write_op(operation, name)
    start(completion, lambda: ioctx.release_write_op(operation))


def _omap(ioctx: Any, name: str) -> dict[str, bytes]:
    import rados

    found: dict[str, bytes] = {}
    while True:
        with rados.ReadOpCtx() as operation:
            values, _ = ioctx.get_omap_vals(operation, max(found, default=""), "", 1000)
            ioctx.operate_read_op(operation, name)
            page = dict(values)
        if not page:
            return found
        found |= page


def _read_id(ioctx: Any, name: str) -> str:
    return str(ioctx.read(f"rbd_id.{name}")[4:].decode())


def _text(value: str) -> bytes:
    """As Ceph encodes a string."""
    return struct.pack("<I", len(value)) + value.encode()
