"""The interface that Cinder's Generic Volume Migration specification asks of a driver, for drivers of any transport.

    class MyDriver(volfs.cinder.driver.OpenVolume, cinder.volume.drivers.rbd.RBDDriver): ...

The specification has drivers that cannot be attached as block devices take part in migrations by a file object:
open_volume() returns one, close_volume() takes it back, and copy_volume_data() uses nothing else of a volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any
from weakref import WeakKeyDictionary

from cinder import utils
from cinder.volume import volume_utils
from cinder.volume.driver import BaseVD
from oslo_config import cfg

import volfs
from volfs.cinder import options

GIB = 1 << 30


class OpenVolume(BaseVD):  # type: ignore[misc]
    """To be put before a driver's own class. What else the driver does stays as it is."""

    def open_volume(self, context: Any, volume: Any, mode: str = "r+b", *, remote: bool = False) -> IO[bytes]:
        """Export a volume, attach it, and return a file object of it.

        `remote`: it is another host's, whose cinder-volume is asked to export it. Raises what the driver or
        volfs.open_volume raises; then nothing stays exported.
        """
        properties = volume_utils.brick_get_connector_properties()
        with _connecting(_Files(mode)):
            attach_info, volume = self._attach_volume(context, volume, properties, remote)
        file: IO[bytes] = attach_info["device"]["path"]
        _opened[file] = (attach_info, properties, remote)
        return file

    def close_volume(self, context: Any, volume: Any, file: IO[bytes]) -> None:
        """Close a file of `open_volume`, and return when all is stable, detached and not exported any more.

        What could not be written raises; the volume is detached all the same. ValueError for any other file.
        """
        try:
            attach_info, properties, remote = _opened.pop(file)
        except KeyError:
            raise ValueError(f"{file!r} was not opened by open_volume") from None
        self._detach_volume(context, attach_info, volume, properties, force=True, remote=remote)

    def copy_volume_data(self, context: Any, src_vol: Any, dest_vol: Any, remote: str | None = None) -> None:
        """Copy a volume to another of at least its size, whatever the drivers of both.

        `remote` tells which of them is another host's: "src", "dest", "both" or None.
        """
        target = self.open_volume(context, dest_vol, remote=remote in ("dest", "both"))
        try:
            source = self.open_volume(context, src_vol, "rb", remote=remote in ("src", "both"))
            try:
                size = src_vol["size"] * GIB
                # In a thread of the system: on the event loop it would keep all others waiting.
                utils.tpool_wrap(volfs.copy_volume_data)(source, target, size)
            finally:
                self.close_volume(context, src_vol, source)
        finally:
            self.close_volume(context, dest_vol, target)

    def _connect_device(self, conn: dict[str, Any]) -> dict[str, Any]:
        files = _files.get()
        if files is None:
            stock: dict[str, Any] = super()._connect_device(conn)
            return stock
        return {"conn": conn, "device": files.connect_volume(conn), "connector": files}


class _Files:
    """A connector whose device is an open file."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def connect_volume(self, conn: dict[str, Any]) -> dict[str, Any]:
        settings = options.register(cfg.CONF)
        return {"path": volfs.open_volume(conn, self._mode, 0, socket_path=settings.socket)}

    def disconnect_volume(self, data: Any, device: dict[str, Any], **how: Any) -> None:
        volfs.close_volume(device["path"])


# By the file, since that is all that close_volume gets.
_opened: WeakKeyDictionary[IO[bytes], tuple[dict[str, Any], dict[str, Any], bool]] = WeakKeyDictionary()
# What _attach_volume, which is Cinder's, is to connect with.
_files: ContextVar[_Files | None] = ContextVar("files", default=None)


@contextmanager
def _connecting(files: _Files) -> Iterator[None]:
    token = _files.set(files)
    try:
        yield
    finally:
        _files.reset(token)
