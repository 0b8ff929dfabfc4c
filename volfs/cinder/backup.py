"""cinder-backup with its volumes as files of volfs: `backup_manager = volfs.cinder.backup.BackupManager`."""

from __future__ import annotations

from typing import Any

from cinder.backup import manager
from oslo_config import cfg

from volfs.cinder import options
from volfs.cinder.attaching import AttachInfo, Attaching

CEPH = "cinder.backup.drivers.ceph"


class BackupManager(manager.BackupManager):  # type: ignore[misc]
    """Attaches volumes by volfs when [volfs] use_for has `backups`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attaching = Attaching(options.register(cfg.CONF))

    def _connect_device(self, conn: dict[str, Any]) -> AttachInfo:
        stock = super()._connect_device
        # Ceph to Ceph is incremental by librbd's own means, for which that driver wants librbd's handle.
        ceph_to_ceph = conn["driver_volume_type"] == "rbd" and cfg.CONF.backup_driver.startswith(CEPH)
        if self._attaching.is_for(options.BACKUPS) and not ceph_to_ceph:
            return self._attaching.connect(conn, stock)
        attached: AttachInfo = stock(conn)
        return attached
