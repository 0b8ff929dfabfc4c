"""volfs: block volumes of Ceph RBD, iSCSI and local storage as regular files.

    with volfs.open_volume("rbd:volumes/disk-1") as source, open("disk-1.raw", "wb") as target:
        volfs.copy_volume_data(source, target, size)

Importing it loads no storage library and no event loop; the work is done by the daemon, see `volfs mount`.
"""

from volfs.api import close_volume, open_volume
from volfs.copying import copy_volume_data
from volfs.errors import (
    BackendError,
    BackendTimeout,
    ConfigError,
    ControlError,
    CopyError,
    MountError,
    SourceError,
    VolfsError,
    VolumeNotFound,
)
from volfs.version import VERSION as __version__

__all__ = [
    "BackendError",
    "BackendTimeout",
    "ConfigError",
    "ControlError",
    "CopyError",
    "MountError",
    "SourceError",
    "VolfsError",
    "VolumeNotFound",
    "__version__",
    "close_volume",
    "copy_volume_data",
    "open_volume",
]
