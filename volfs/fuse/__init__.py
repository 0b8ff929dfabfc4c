"""The mount: the only package that imports pyfuse3."""

from __future__ import annotations

import os
import sys
from types import ModuleType


def _load_helper() -> ModuleType | None:
    """Load volfs.native.fuse_session before pyfuse3, which then finds its fuse_session_new first."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        from volfs.native import fuse_session
    except ImportError:
        return None  # session.py says so once the mount is up
    finally:
        sys.setdlopenflags(flags)
    return fuse_session


helper = _load_helper()
