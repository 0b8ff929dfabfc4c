"""The mount: the only package that imports pyfuse3."""

from __future__ import annotations

import os
import sys


def _load_helper() -> None:
    """Load volfs.native.fuse_session before pyfuse3, which then finds its fuse_session_new first."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        import volfs.native.fuse_session  # noqa: F401
    except ImportError:
        pass  # session.py says so once the mount is up
    finally:
        sys.setdlopenflags(flags)


_load_helper()
