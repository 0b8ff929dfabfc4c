"""Ways to migrate a volume to another, and what its content has to be like to tell them apart from wrong ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from mounts import Mount, wait_until
from services import MIB, SLOWER
from volumes import StoredVolume, random_bytes, sha256

from volfs import copy_volume_data, open_volume

GARBAGE = b"\xa5"  # what a used target holds: where the source has a hole, it must be gone
LIST_SECONDS = 10.0 * SLOWER


def sparse_content(size: int, seed: int) -> bytes:
    """Random data and holes of many sizes, aligned to nothing; ends with data."""
    content = bytearray(size)
    offset, length = 0, 1000
    while offset < size:
        end = min(offset + length, size)
        content[offset:end] = random_bytes(end - offset, seed + offset)
        offset, length = end + 3 * length + 17, length * 2
    content[-100:] = random_bytes(100, seed)
    return bytes(content)


def assert_holds(target: StoredVolume, content: bytes, tail: bytes = b"") -> None:
    assert target.sha256() == sha256(content + tail)


def path_of(mount: Mount, volume: StoredVolume) -> Path:
    """Its file on a mount of its storage, once that is listed."""
    path = mount.path.joinpath(volume.backend, *volume.place)
    wait_until(path.exists, f"{path} is listed", LIST_SECONDS)
    return path


Way = Callable[[Mount, StoredVolume, StoredVolume], None]


def by_python_calls(mount: Mount, source: StoredVolume, target: StoredVolume) -> None:
    """From this process, which has to be a client of the mount."""
    size, done = source.size, list[int]()
    with open_volume(source.url) as reader, open_volume(target.url, "r+b") as writer:
        copy_volume_data(reader, writer, size, progress=done.append, verify=True)
    assert done == sorted(done)
    assert done[-1] == size


def by_command(mount: Mount, source: StoredVolume, target: StoredVolume) -> None:
    copied = mount.volfs("copy", path_of(mount, source), path_of(mount, target), "--verify", "--json")
    assert copied.returncode == 0, copied.stderr


def by_cinders_dd(mount: Mount, source: StoredVolume, target: StoredVolume) -> None:
    """Probes that copy nothing and truncate, then the copy; both ends with O_DIRECT, no conv=notrunc.

    It never syncs. The close at its end is the last place where an error could be told, so all is stable afterwards.
    """
    path, before = path_of(mount, target), target.sha256()
    ends = [f"if={path_of(mount, source)}", f"of={path}"]
    for flag in ("iflag=direct", "oflag=direct"):
        dd("count=0", *ends, flag)
        assert target.sha256() == before
        assert path.stat().st_size == target.size
    dd(*ends, f"count={-(-source.size // MIB)}", "bs=1M", "iflag=direct", "oflag=direct")


def dd(*arguments: str) -> None:
    done = subprocess.run(
        ["dd", *arguments], capture_output=True, text=True, timeout=120 * SLOWER, check=False
    )
    assert done.returncode == 0, done.stderr


WAYS: Mapping[str, Way] = {"calls": by_python_calls, "command": by_command, "dd": by_cinders_dd}
