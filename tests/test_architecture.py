"""The shape of the package: which module may import which, what importing volfs costs, and what it offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import volfs

PACKAGE = Path(volfs.__file__).parent

# From the top down. A module imports only what is further down; those of one line do not know each other.
LAYERS = """
    volfs.__main__
    volfs.cli volfs.cinder.manager volfs.cinder.backup volfs.cinder.driver
    volfs.cinder.images volfs.cinder.tempest_plugin.tests.test_migration
    volfs.cinder.attaching volfs.cinder.copying volfs.cinder.tempest_plugin.plugin volfs.cinder.tempest_plugin.tests
    volfs.cinder.connector volfs.cinder.options volfs.cinder.tempest_plugin.storage
    volfs.cinder.tempest_plugin
    volfs.cinder volfs.mounting volfs.progress volfs.report
    volfs.resuming
    volfs.catalog volfs.daemon volfs.endpoint
    volfs
    volfs.api volfs.copying volfs.copy_journal
    volfs.writing
    volfs.comparing volfs.block_sums
    volfs.reading
    volfs.descriptors
    volfs.config volfs.control_server
    volfs.control
    volfs.fuse.session
    volfs.fuse.requests
    volfs.fuse.filesystem
    volfs.fuse.refusals volfs.fuse.xattrs
    volfs.fuse.handles
    volfs.fuse.tree
    volfs.fuse
    volfs.copy_range
    volfs.data_ahead
    volfs.readahead volfs.rewriting
    volfs.attached volfs.recovery volfs.source volfs.volume
    volfs.known_extents
    volfs.backends.registry
    volfs.backends
    DRIVERS
    volfs.backends.brick_volume
    volfs.backends.brick_connection volfs.backends.block_device volfs.backends.raw_file
    volfs.backends.brick_target
    volfs.backends.brick_library volfs.backends.device_requests volfs.backends.local
    volfs.backends.block_ranges volfs.backends.brick_commands
    volfs.backends.base volfs.journal
    volfs.native.libiscsi volfs.native.fuse_session volfs.native.rbd_image
    volfs.native volfs.runtime
    volfs.errors volfs.extents volfs.identity
    volfs.version
"""
# The modules of a driver may know each other (without cycles), but not another driver's.
DRIVERS = {
    "rbd": "rbd rbd_cluster rbd_extents rbd_header rbd_image rbd_object_map rbd_writes rbd_zeroes",
    "iscsi": "iscsi iscsi_disk iscsi_login iscsi_provisioning iscsi_session iscsi_source iscsi_volume scsi",
    "block": "block lvm lvm_activation lvm_reports",
    "file": "file",
    "brick": "brick",
}

# What a program that only wants a file must not have to load.
HEAVY = {"trio", "asyncio", "pyfuse3", "rbd", "rados", "rich", "click", "os_brick", "cinder"}

DRIVER_OF = {
    f"volfs.backends.{module}": driver for driver, modules in DRIVERS.items() for module in modules.split()
}
RANK = {
    name: rank
    for rank, line in enumerate(LAYERS.split("\n"))
    for word in line.split()
    for name in (DRIVER_OF if word == "DRIVERS" else [word])
}


@cache
def modules() -> dict[str, Path]:
    """The package's modules by name, the compiled ones by their types."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


def imports(name: str) -> Iterator[tuple[str, int]]:
    """The modules that a module imports anywhere in it, also inside functions, and the lines."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules() else str(node.module)), node.lineno


def own_imports(name: str) -> Iterator[tuple[str, int]]:
    return ((other, line) for other, line in imports(name) if other.partition(".")[0] == "volfs")


def test_every_module_has_its_place_in_the_layers() -> None:
    assert RANK.keys() == modules().keys()


def test_imports_point_one_way() -> None:
    upwards = [
        f"{name}:{line} imports {other}, which is not below it"
        for name in modules()
        for other, line in own_imports(name)
        if RANK[other] <= RANK[name] and (name not in DRIVER_OF or DRIVER_OF.get(other) != DRIVER_OF[name])
    ]
    assert upwards == []


def test_there_are_no_import_cycles() -> None:
    graph = {name: {other for other, _ in own_imports(name)} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(exc.args[1])}")


@pytest.mark.parametrize(
    ("library", "importers"),
    [
        ("pyfuse3", "volfs.fuse."),
        ("rbd", "volfs.backends.rbd"),
        ("rados", "volfs.backends.rbd"),
        ("click", "volfs.cli"),
        ("tomllib", "volfs.config"),
        ("os_brick", ("volfs.backends.brick_library", "volfs.backends.brick_commands", "volfs.cinder.")),
        ("oslo_utils", ("volfs.backends.brick_library", "volfs.backends.brick_commands")),
        ("oslo_concurrency", ("volfs.backends.brick_library", "volfs.backends.brick_commands")),
    ],
)
def test_a_library_is_one_packages_business(library: str, importers: str | tuple[str, ...]) -> None:
    found = [name for name in modules() for other, _ in imports(name) if other.partition(".")[0] == library]
    assert found, f"nobody imports {library}"
    assert [name for name in found if not name.startswith(importers)] == []


@pytest.mark.parametrize("library", ["rbd", "rados", "os_brick"])
def test_vendor_libraries_are_imported_when_used(library: str) -> None:
    """At the top of a module they would be needed on machines that only serve files."""
    at_top = [
        name
        for name in modules()
        for node in tree(name).body
        if isinstance(node, ast.Import) and library in [alias.name for alias in node.names]
    ]
    assert at_top == []


def test_every_module_says_what_belongs_in_it() -> None:
    assert [name for name in modules() if not ast.get_docstring(tree(name))] == []


def loaded_by(script: str) -> set[str]:
    """The modules that a Python program has loaded when it ends."""
    script = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("statement", ["import volfs", "from volfs import *"])
def test_importing_volfs_loads_no_event_loop_and_no_storage_library(statement: str) -> None:
    assert {module.partition(".")[0] for module in loaded_by(statement)} & HEAVY == set()


def test_the_help_of_the_command_waits_for_nothing_that_it_does_not_need() -> None:
    loaded = loaded_by("from volfs import cli; sys.argv = ['volfs', 'copy', '--help']; cli.main()")
    assert {module for module in loaded if module.startswith("volfs.")} == {
        "volfs.backends",
        "volfs.cli",
        "volfs.errors",
        "volfs.version",
    }
    assert loaded & {*HEAVY, "msgspec"} == {"click"}


def test_the_public_names_are_these() -> None:
    """Whoever adds one promises to keep it; whoever removes one breaks programs."""
    assert sorted(volfs.__all__) == [
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
    assert [name for name in volfs.__all__ if not hasattr(volfs, name)] == []
    assert volfs.__all__ == sorted(volfs.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert volfs.__version__ == version("volfs")
