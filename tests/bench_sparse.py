"""scripts/bench --sparse: copies of a terabyte with little data in it, and `cp` of a full volume, against dd.

Seconds of each copy, as a multiple of what `dd bs=4M` takes for a volume as long as the data and full of it. The
rounds are interleaved; each copy of the terabyte goes to a volume made for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench_subjects import ceph_environment
from mounts import VOLFS, Mount, mounted
from rich.console import Console
from rich.table import Table
from services import MIB, Image, Services, image, running_services

SIZE = 1 << 40
RUN = 4 * MIB  # of data, in one place


@dataclass(frozen=True)
class Copy:
    """`most` is what it may take, as a multiple of the reference."""

    name: str
    command: Callable[[Path, Path], Sequence[str | Path]]
    most: float | None = None


REFERENCE = Copy(
    "dd bs=4M", lambda a, b: ["dd", f"if={a}", f"of={b}", "bs=4M", "conv=notrunc,fsync", "status=none"]
)
SPARSE = (
    Copy("volfs copy", lambda a, b: [*VOLFS, "copy", "-q", a, b], 1.2),
    Copy("cp --sparse=auto", lambda a, b: ["cp", "--sparse=auto", a, b], 2),
    Copy(
        "qemu-img convert -n -O raw",
        lambda a, b: ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", a, b],
        2,
    ),
)
# qcow2 grows as it is written: it goes to a file beside the mount.
QCOW2 = Copy(
    "qemu-img convert -O qcow2", lambda a, b: ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", a, b], 2
)
DIRECT = Copy(
    "dd bs=4M direct",
    lambda a, b: [*REFERENCE.command(a, b), "iflag=direct", "oflag=direct"],
)
FULL = Copy("cp of a full volume", lambda a, b: ["cp", a, b], round(1 / 1.3, 2))  # of DIRECT


def run(rounds: int, data_mib: int, json_path: str | None, check: bool) -> int:
    """Measure and print; 1 when `check` and something took too long or left a target too large."""
    seconds: dict[str, list[float]] = {}
    too_large: set[str] = set()
    with running_services() as services, contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="volfs-bench-", dir="/var/tmp"))
        )
        files = directory / "files"
        files.mkdir()
        sparse = stack.enter_context(image(services, SIZE))
        full, full_target = (stack.enter_context(image(services, data_mib * MIB)) for _ in range(2))
        prefixes = [f"rbd:{sparse.pool}", f"file:{files}"]
        mount = stack.enter_context(mounted(directory, prefixes, env=ceph_environment(services)))
        _fill(_path(mount, full), range(0, data_mib * MIB, RUN))
        places = random.Random(1).sample(range(SIZE // RUN), data_mib * MIB // RUN)
        _fill(_path(mount, sparse), sorted(place * RUN for place in places))

        def time_copy(key: str, copy: Copy, source: Path, target: Path) -> None:
            begin = time.monotonic()
            subprocess.run(copy.command(source, target), check=True, stdout=subprocess.DEVNULL)
            with target.open("rb") as file:
                os.fsync(file.fileno())
            seconds.setdefault(key, []).append(time.monotonic() - begin)

        for _ in range(rounds):
            # Side by side with what they are compared with: a machine's disk is not the same from minute to minute,
            # and its file system is busy for seconds with giving up the space of a file that was removed.
            time_copy("rbd: " + REFERENCE.name, REFERENCE, _path(mount, full), _path(mount, full_target))
            for copy in SPARSE:
                with image(services, SIZE) as made:
                    time_copy("rbd: " + copy.name, copy, _path(mount, sparse), _path(mount, made))
                    if _used(services, made) > data_mib * MIB:
                        too_large.add("rbd: " + copy.name)
            for copy in (DIRECT, FULL):
                time_copy("rbd: " + copy.name, copy, _path(mount, full), _path(mount, full_target))
            with _fresh_file(files, mount, data_mib * MIB) as target:
                time_copy("file: " + REFERENCE.name, REFERENCE, _path(mount, full), target)
            for copy in SPARSE:
                with _fresh_file(files, mount, SIZE) as target:
                    time_copy("file: " + copy.name, copy, _path(mount, sparse), target)
                    if (files / target.name).stat().st_blocks * 512 > (data_mib + 1) * MIB:
                        too_large.add("file: " + copy.name)
            time_copy("file: " + QCOW2.name, QCOW2, _path(mount, sparse), directory / "disk.qcow2")
    rows = [_row(seconds, side, copy) for side in ("rbd", "file") for copy in (*SPARSE, QCOW2, FULL)]
    found = [row for row in rows if row is not None]
    _show(found, seconds, data_mib)
    if json_path:
        result = {"seconds": seconds, "rows": found, "too_large": sorted(too_large)}
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    slow = [str(row["copy"]) for row in found if row["ratio"] > row["most"]]
    for what, copies in (("too slow", slow), ("its target is larger than the data", sorted(too_large))):
        if copies:
            print(f"{what}: {', '.join(copies)}")
    return 1 if check and (slow or too_large) else 0


def _path(mount: Mount, made: Image) -> Path:
    return mount.path / "rbd" / made.pool / made.name


def _fill(path: Path, offsets: Sequence[int]) -> None:
    with path.open("r+b", buffering=0) as file:
        for offset in offsets:
            file.seek(offset)
            file.write(os.urandom(RUN))


@contextlib.contextmanager
def _fresh_file(files: Path, mount: Mount, size: int) -> Iterator[Path]:
    """A volume of the file driver."""
    backing = files / "target"
    with backing.open("wb") as file:
        file.truncate(size)
    try:
        yield mount.path / "file" / "target"
    finally:
        backing.unlink()


def _used(services: Services, made: Image) -> int:
    report = json.loads(services.run("rbd", "du", "--format", "json", made.spec))
    return int(report["images"][0]["used_size"])


def _row(seconds: dict[str, list[float]], side: str, copy: Copy) -> dict[str, Any] | None:
    ours = seconds.get(f"{side}: {copy.name}")
    if ours is None:
        return None
    reference = DIRECT if copy is FULL else REFERENCE
    ratio = median(a / b for a, b in zip(ours, seconds[f"{side}: {reference.name}"], strict=True))
    return {
        "copy": f"{side}: {copy.name}",
        "reference": reference.name,
        "ratio": round(ratio, 3),
        "most": copy.most,
    }


def _show(rows: Sequence[dict[str, Any]], seconds: dict[str, list[float]], data_mib: int) -> None:
    table = Table(title=f"a volume of 1 TiB with {data_mib} MiB of data, from RBD: medians")
    for column in ("copy", "seconds", "as a multiple of", "ratio", "at most"):
        table.add_column(column, justify="left" if column in ("copy", "as a multiple of") else "right")
    for row in rows:
        verdict = f"{row['most']} {'met' if row['ratio'] <= row['most'] else 'MISSED'}"
        took = median(seconds[row["copy"]])
        of = f"{row['reference']}, {median(seconds[row['copy'].split(':')[0] + ': ' + row['reference']]):.2f} s"
        table.add_row(row["copy"], f"{took:.2f}", of, f"{row['ratio']:.2f}", verdict)
    Console(width=max(Console().width, 110), highlight=False).print(table)
