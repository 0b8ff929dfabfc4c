"""Migrations between all storages that volfs has, in every direction and every way, and nothing left of them.

In the guest (marker vm), where a login to a target takes a second: few volumes, made once and copied over and over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from guest_volumes import GuestStorage, configuration
from kernel_targets import sessions
from migrations import GARBAGE, WAYS, assert_holds, sparse_content
from mounts import Mount, mounted, wait_until
from services import MIB
from volumes import StoredVolume

from volfs import api

pytestmark = pytest.mark.vm(seconds=5)

# Of the sizes that a storage can have. An extent of LVM is 4 MiB.
KINDS = {"rbd": 1, "iscsi": 512, "kernel": 512, "lvm": 4 * MIB, "file": 1}
CONTENT = sparse_content(5 * MIB + 77_777, seed=1)
TARGET_SIZE = 8 * MIB
CLOSE_SECONDS = 60.0  # what closed is let go in the background


@dataclass
class Prepared:
    """A daemon with all storages, and on each a volume to copy from and one to copy to."""

    mount: Mount
    sources: dict[str, StoredVolume]
    targets: dict[str, StoredVolume]


@pytest.fixture(scope="module")
def prepared(
    guest_storage: GuestStorage, iscsid: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prepared]:
    directory = tmp_path_factory.mktemp("m")
    config = configuration(directory / "volfs.toml", guest_storage.backends())
    sources = {
        kind: guest_storage.make(kind, -(-len(CONTENT) // unit) * unit, CONTENT)
        for kind, unit in KINDS.items()
    }
    targets = {kind: guest_storage.make(kind, TARGET_SIZE) for kind in KINDS}
    env = guest_storage.environment("rbd") | {"XDG_RUNTIME_DIR": str(directory)}
    with mounted(directory, [], ["--config", str(config)], env=env) as mount:
        yield Prepared(mount, sources, targets)


def pairs() -> Iterator[Any]:
    """Each pair by each way. Those that are not thorough have each storage as source once and as target once."""
    for (number, source), target, way in itertools.product(enumerate(KINDS), KINDS, WAYS):
        if source == target:
            continue
        is_next = list(KINDS).index(target) == (number + 1) % len(KINDS)
        its_turn = way == list(WAYS)[number % len(WAYS)]
        marks = [] if is_next and its_turn else [pytest.mark.thorough]
        yield pytest.param(source, target, way, marks=marks, id=f"{source}-to-{target}-by-{way}")


@pytest.mark.parametrize(("source_kind", "target_kind", "way"), list(pairs()))
def test_a_volume_is_migrated_block_for_block(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, source_kind: str, target_kind: str, way: str
) -> None:
    """Onto a used, larger target: the holes are zeros there, too, and what is behind the copy stays."""
    source, target = prepared.sources[source_kind], prepared.targets[target_kind]
    target.write(GARBAGE * TARGET_SIZE)
    monkeypatch.setenv("VOLFS_SOCKET", str(prepared.mount.socket))
    WAYS[way](prepared.mount, source, target)
    content = CONTENT + bytes(source.size - len(CONTENT))
    assert_holds(target, content, GARBAGE * (TARGET_SIZE - len(content)))
    try:
        wait_until(lambda: left(prepared, source, target) == [], "all is let go", CLOSE_SECONDS)
    finally:
        assert left(prepared, source, target) == []  # which tells what, when it is not


def left(prepared: Prepared, *volumes: StoredVolume) -> list[str]:
    """What a migration should have let go."""
    status = api.status(socket_path=str(prepared.mount.socket))
    found = [*map(str, status.attached), *map(str, status.open), *sessions()]
    for volume in volumes:
        found += volume.users()
    return found
