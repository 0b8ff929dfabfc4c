"""The mount: the only package that imports pyfuse3."""

from __future__ import annotations

from types import ModuleType

from volfs.native import load_first


def _load_helper() -> ModuleType | None:
    try:
        return load_first("fuse_session")
    except ImportError:
        return None  # session.py says so once the mount is up


helper = _load_helper()
