"""Two small Cinder drivers for scripts/openstack: volumes are sparse files in a directory.

`Local` hands out the path itself (connection info of type `local`); `San` offers the file as an iSCSI target, with a
CHAP account of its own, by Cinder's own helper for tgtd. cinder-volume loads this module, and no test does.
"""

import os
from pathlib import Path
from typing import Any

from cinder import context as cinder_context
from cinder.volume import configuration, driver
from cinder.volume.targets import tgt
from oslo_config import cfg

GIB = 1024**3

OPTIONS = [cfg.StrOpt("volfs_test_directory", help="Where the volumes are, a file each.")]
cfg.CONF.register_opts(OPTIONS, group=configuration.SHARED_CONF_GROUP)


class Files(driver.VolumeDriver):
    """What both have in common."""

    VERSION = "1.0"
    protocol: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(OPTIONS)

    def path(self, volume: Any) -> Path:
        return Path(self.configuration.volfs_test_directory) / volume["name"]

    def check_for_setup_error(self) -> None:
        if not os.access(self.configuration.volfs_test_directory, os.W_OK):
            raise RuntimeError(f"{self.configuration.volfs_test_directory} cannot be written to")

    def create_volume(self, volume: Any) -> None:
        with self.path(volume).open("xb") as file:
            file.truncate(volume["size"] * GIB)

    def delete_volume(self, volume: Any) -> None:
        self.path(volume).unlink(missing_ok=True)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        os.truncate(self.path(volume), new_size * GIB)

    def _update_volume_stats(self) -> None:
        self._stats = {
            "volume_backend_name": self.configuration.safe_get("volume_backend_name"),
            "vendor_name": "volfs",
            "driver_version": self.VERSION,
            "storage_protocol": self.protocol,
            "total_capacity_gb": "infinite",
            "free_capacity_gb": "infinite",
            # What nobody has written to reads as zeros, and need not be written to a new volume.
            "sparse_copy_volume": True,
            "thin_provisioning_support": True,
        }

    def ensure_export(self, context: Any, volume: Any) -> Any:
        pass

    def create_export(self, context: Any, volume: Any, connector: Any) -> Any:
        pass

    def remove_export(self, context: Any, volume: Any) -> None:
        pass

    def terminate_connection(self, volume: Any, connector: Any, **kwargs: Any) -> None:
        pass


class Local(Files):
    protocol = "local"

    def initialize_connection(self, volume: Any, connector: Any) -> dict[str, Any]:
        return {"driver_volume_type": "local", "data": {"device_path": str(self.path(volume))}}


class San(Files):
    protocol = "iSCSI"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.target = tgt.TgtAdm(
            configuration=self.configuration, db=self.db, executor=self._execute, context=cinder_context
        )

    def ensure_export(self, context: Any, volume: Any) -> Any:
        return self.target.ensure_export(context, volume, str(self.path(volume)))

    def create_export(self, context: Any, volume: Any, connector: Any) -> Any:
        export = self.target.create_export(context, volume, str(self.path(volume)))
        return {"provider_location": export["location"], "provider_auth": export["auth"]}

    def remove_export(self, context: Any, volume: Any) -> None:
        self.target.remove_export(context, volume)

    # That the initiator has a name is not asked for: a host without a kernel initiator has none.
    def initialize_connection(self, volume: Any, connector: Any) -> dict[str, Any]:
        return dict(self.target.initialize_connection(volume, connector))
