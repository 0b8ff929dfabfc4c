"""scripts/services as a module: what it does to processes, files and ports is done here alike."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent.parent
SERVICES = TOP / "scripts" / "services"


def load_services() -> Any:
    """Loaded once, also where the tests have loaded it before."""
    name = "volfs_services_script"
    if name not in sys.modules:
        loader = SourceFileLoader(name, str(SERVICES))
        spec = spec_from_loader(name, loader)
        assert spec is not None
        sys.modules[name] = module_from_spec(spec)
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            loader.exec_module(sys.modules[name])
        finally:
            sys.dont_write_bytecode = before
    return sys.modules[name]


services = load_services()
Failure = services.Failure
