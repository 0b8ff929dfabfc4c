"""volfs: block volumes of Ceph RBD, iSCSI and local storage as regular files.

    with volfs.open_volume("rbd:volumes/disk-1") as source, open("disk-1.raw", "wb") as target:
        volfs.copy_volume_data(source, target, size)

Importing it loads no storage library and no event loop; the work is done by the daemon, see `volfs mount`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from volfs.version import VERSION as __version__

if TYPE_CHECKING:
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

_MODULES = {"close_volume": "volfs.api", "open_volume": "volfs.api", "copy_volume_data": "volfs.copying"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, then (PEP 562): `volfs --help` waits for none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES.get(name, "volfs.errors")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
