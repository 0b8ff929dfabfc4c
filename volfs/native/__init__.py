"""Compiled helpers: they move bytes and decide nothing. Each says why it exists."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


def load_first(name: str) -> ModuleType:
    """Import a helper that defines functions of a C library anew, before the library's Python module binds to them."""
    if loaded := sys.modules.get(f"{__name__}.{name}"):
        return loaded
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    finally:
        sys.setdlopenflags(flags)
