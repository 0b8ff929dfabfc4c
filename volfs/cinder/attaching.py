"""Attaching a volume for Cinder, as its managers and drivers do it in their _connect_device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from cinder import exception, utils

from volfs import api
from volfs.cinder import options
from volfs.cinder.connector import VolfsConnector
from volfs.errors import ControlError

log = logging.getLogger(__name__)

AttachInfo = dict[str, Any]
Connect = Callable[[dict[str, Any]], AttachInfo]


class Attaching:
    """How [volfs] has volumes attached. Several green or real threads may use it."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        if settings.config_file:
            # What a daemon that this process starts is told by. There is no other that it could mislead.
            os.environ["VOLFS_CONFIG"] = settings.config_file

    def is_for(self, use: str) -> bool:
        return use in self._settings.use_for

    def takes(self, protocol: str) -> bool:
        """Whether volumes of this driver_volume_type are volfs's to attach."""
        return protocol.lower() in (name.lower() for name in self._settings.protocols)

    def connect(
        self, conn: dict[str, Any], stock: Connect, *, as_root: bool = True, blank: bool = False
    ) -> AttachInfo:
        """What _connect_device returns: by volfs where the protocol is one of [volfs] protocols, else by `stock`.

        `blank`: it is new, and reads as zeros. DeviceUnavailable when the file cannot be read (`as_root`: by root, as
        dd runs); then nothing is attached.
        """
        protocol = conn["driver_volume_type"]
        if not self.takes(protocol):
            return stock(conn)
        try:
            self._find_daemon()
        except ControlError as exc:
            if self._settings.without_daemon == options.STOCK:
                log.warning("volfs: %s: attached without volfs", exc)
                return stock(conn)
            raise exception.DeviceUnavailable(path=None, reason=f"volfs: {exc}") from exc
        connector = VolfsConnector(
            utils.get_root_helper(),
            protocol=protocol,
            socket_path=self._settings.socket,
            detach_seconds=self._settings.detach_timeout,
            blank=blank,
        )
        device = connector.connect_volume(conn["data"])
        try:
            if not connector.check_valid_device(device["path"], as_root):
                reason = "volfs: cannot be read there; does the daemon's mount have allow_other?"
                raise exception.DeviceUnavailable(path=device["path"], reason=reason)
        except BaseException:
            connector.disconnect_volume(conn["data"], device, force=True, ignore_errors=True)
            raise
        log.info("volfs: %s volume %s is %s", protocol, conn["data"].get("volume_id", ""), device["path"])
        return {"conn": conn, "device": device, "connector": connector}

    def is_left_to_stock(self) -> bool:
        """Whether volumes are attached as ever now: there is no daemon, and [volfs] without_daemon says so."""
        if self._settings.without_daemon != options.STOCK:
            return False
        try:
            self._find_daemon()
        except ControlError as exc:
            log.warning("volfs: %s: moved without volfs", exc)
            return True
        return False

    def _find_daemon(self) -> None:
        """Have one that answers. ControlError."""
        if self._settings.start_daemon:
            api.connect(self._settings.socket).close()
        else:
            api.status(socket_path=self._settings.socket)
