"""Migrations between storages, each way, judged by what the two storages themselves hold afterwards."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from migrations import (
    GARBAGE,
    assert_holds,
    by_cinders_dd,
    by_command,
    by_python_calls,
    dd,
    path_of,
    sparse_content,
)
from mounts import Mount, is_mounted, mounted, require_fuse, run_volfs
from services import MIB
from volumes import Storage, StoredVolume, random_bytes, sha256

from volfs import CopyError, api, close_volume, copy_volume_data, open_volume

SIZE = 24 * MIB

# Source and target; the sectors of iSCSI differ, so that both kinds are read and written.
PAIRS = [
    ("rbd", "iscsi-4096"),
    ("iscsi-4096", "rbd"),
    ("rbd", "file"),
    ("file", "rbd"),
    ("rbd", "block"),
    ("block", "rbd"),
    ("iscsi-512", "file"),
    ("file", "iscsi-512"),
]
DD_PAIRS = [("rbd", "iscsi-512"), ("iscsi-512", "rbd"), ("rbd", "rbd"), ("block", "file")]


def ways(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """The first of them is enough while writing code."""
    parameters = [
        pytest.param(*pair, id="-to-".join(pair), marks=[pytest.mark.slow] if number else [])
        for number, pair in enumerate(pairs)
    ]
    return pytest.mark.parametrize(("source_kind", "target_kind"), parameters)


def make(storage: Storage, kind: str, size: int, content: bytes) -> StoredVolume:
    driver, _, sector = kind.partition("-")
    return storage.make(driver, size, content, **({"sector_size": int(sector)} if sector else {}))


def granularity(kind: str) -> int:
    """Of the sizes that a storage can have."""
    return {"rbd": 1, "file": 1, "block": 512, "iscsi-512": 512, "iscsi-4096": 4096}[kind]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One that serves nothing but what is attached."""
    with mounted(tmp_path_factory.mktemp("d"), []) as mount:
        yield mount


@pytest.fixture
def client(daemon: Mount, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """This process is a client of it, and may use the private Ceph."""
    monkeypatch.setenv("VOLFS_SOCKET", str(daemon.socket))
    for name, value in storage.environment("rbd").items():
        monkeypatch.setenv(name, value)
    return daemon


def assert_nothing_attached(daemon: Mount, *volumes: StoredVolume) -> None:
    status = api.status(socket_path=str(daemon.socket))
    assert (status.attached, status.open) == ([], [])
    for volume in volumes:
        assert volume.users() == []


@ways(PAIRS)
def test_a_migration_by_the_python_calls(
    client: Mount, storage: Storage, source_kind: str, target_kind: str
) -> None:
    """Onto a used, larger target: the holes are zeros there, too, and what is behind the copy stays."""
    odd = -777_777 // granularity(source_kind) * granularity(source_kind)
    content = sparse_content(SIZE + odd, seed=1)
    source = make(storage, source_kind, len(content), content)
    target = make(storage, target_kind, SIZE + MIB, GARBAGE * (SIZE + MIB))
    by_python_calls(client, source, target)
    assert_holds(source, content)
    assert_holds(target, content, GARBAGE * (SIZE + MIB - len(content)))
    assert_nothing_attached(client, source, target)


@pytest.mark.slow
def test_there_and_back_again(client: Mount, storage: Storage) -> None:
    """RBD to iSCSI to another RBD image, as the demonstration does."""
    content = sparse_content(64 * MIB, seed=2)
    volumes = [make(storage, "rbd", len(content), content)]
    volumes += [make(storage, kind, len(content), b"") for kind in ("iscsi-512", "rbd")]
    for source, target in pairwise(volumes):
        reader, writer = open_volume(source.url, "rb", 0), open_volume(target.url, "wb", 0)
        copy_volume_data(reader, writer, len(content), block_size=MIB)
        close_volume(reader)
        close_volume(writer)
        assert_nothing_attached(client, source, target)
    assert {volume.sha256() for volume in volumes} == {sha256(content)}


@ways([("rbd", "iscsi-512"), ("block", "rbd")])
def test_a_target_that_is_too_small_is_not_touched(
    client: Mount, storage: Storage, source_kind: str, target_kind: str
) -> None:
    source = make(storage, source_kind, 2 * MIB, random_bytes(2 * MIB))
    target = make(storage, target_kind, MIB, GARBAGE * MIB)
    with (
        open_volume(source.url) as reader,
        open_volume(target.url, "r+b") as writer,
        pytest.raises(CopyError) as caught,
    ):
        copy_volume_data(reader, writer, 2 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.offset == 0
    assert_holds(target, GARBAGE * MIB)
    assert_nothing_attached(client, source, target)


@pytest.mark.slow
def test_a_daemon_started_on_demand_migrates(
    tmp_path_factory: pytest.TempPathFactory, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_fuse()
    socket = tmp_path_factory.mktemp("d") / "run" / "control"
    monkeypatch.setenv("VOLFS_SOCKET", str(socket))
    for name, value in storage.environment("rbd").items():
        monkeypatch.setenv(name, value)
    content = sparse_content(8 * MIB, seed=3)
    source, target = make(storage, "rbd", len(content), content), make(storage, "file", len(content), b"")
    try:
        with open_volume(source.url) as reader, open_volume(target.url, "r+b") as writer:
            copy_volume_data(reader, writer, len(content))
        assert_holds(target, content)
        status = api.status()
        assert (status.attached, status.open) == ([], [])
    finally:
        mountpoint = Path(f"{socket}.mnt")
        if is_mounted(mountpoint):
            assert run_volfs("umount", mountpoint, "--force").returncode == 0


# ---- between files of one mount --------------------------------------------------------------------------------


@ways([("rbd", "iscsi-512"), ("iscsi-512", "rbd")])
def test_a_migration_by_the_command_on_paths(
    everything: Mount, module_storage: Storage, source_kind: str, target_kind: str
) -> None:
    content = sparse_content(SIZE, seed=4)
    source = make(module_storage, source_kind, SIZE, content)
    target = make(module_storage, target_kind, SIZE + 4096, GARBAGE * (SIZE + 4096))
    by_command(everything, source, target)
    assert_holds(target, content, GARBAGE * 4096)
    paths = path_of(everything, source), path_of(everything, target)
    assert run_volfs("verify", *paths, "-q").returncode == 0
    source.write(b"changed", 12345)
    differs = run_volfs("verify", *paths, "-q")
    assert differs.returncode == 1
    assert "12345" in differs.stderr


@ways(DD_PAIRS)
def test_dd_as_cinder_calls_it(
    everything: Mount, module_storage: Storage, source_kind: str, target_kind: str
) -> None:
    content = sparse_content(SIZE, seed=5)
    source = make(module_storage, source_kind, SIZE, content)
    target = make(module_storage, target_kind, SIZE, GARBAGE * SIZE)
    by_cinders_dd(everything, source, target)
    assert_holds(target, content)
    assert stat.S_ISREG(os.stat(path_of(everything, target)).st_mode)


@pytest.mark.slow
@pytest.mark.parametrize("target_kind", ["rbd", "iscsi-512"])
def test_dd_with_sparse_onto_a_new_volume(
    everything: Mount, module_storage: Storage, target_kind: str
) -> None:
    """It seeks over zeros, and ends with a truncation to the full size, which is the size already."""
    content = sparse_content(SIZE - MIB, seed=6) + bytes(MIB)
    source = make(module_storage, "file", SIZE, content)
    target = make(module_storage, target_kind, SIZE, b"")
    ends = [f"if={path_of(everything, source)}", f"of={path_of(everything, target)}"]
    dd(*ends, "bs=1M", "conv=sparse", "status=none")
    assert_holds(target, content)


@pytest.mark.slow
def test_cp_between_two_storages(everything: Mount, module_storage: Storage) -> None:
    content = sparse_content(SIZE, seed=7)
    source = make(module_storage, "rbd", SIZE, content)
    target = make(module_storage, "block", SIZE, GARBAGE * SIZE)
    paths = path_of(everything, source), path_of(everything, target)
    subprocess.run(["cp", "--sparse=never", *paths], check=True, timeout=120)
    assert_holds(target, content)
