"""scripts/bench --cinder: migrations by cinder-volume, through volfs and without, in scripts/openstack's Cinder.

Two volumes of 1 GiB, one full and one with data in an eighth of it, go from Ceph to a file, back, and to another pool
of Ceph by a copy. A figure is the time of the copy alone, as Cinder's log tells it; the wall time is that of the whole
migration as a user sees it. The rounds are interleaved: stock Cinder, then volfs with Cinder's dd, then volfs's copy.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from openstack import GIB, Openstack, fill, running_openstack
from rich.console import Console
from rich.table import Table
from services import running_services

from volfs import api

STOCK = "stock"
MANAGER = "volume_manager=volfs.cinder.manager.VolumeManager"
WAYS = {STOCK: (), "volfs, dd": (MANAGER,), "volfs copy": (MANAGER, "volfs.copy_method=volfs")}
ANY_TYPE = "__DEFAULT__"
# From where to where, and how many times as fast as stock Cinder it has to be.
JOURNEY = (("ceph", "local", 2.0), ("local", "ceph", 1.3), ("ceph", "ceph2", 1.5))
CONTENTS = {"full": GIB, "an eighth": GIB // 8}
SPARSE_BAR = 4.0
# What the log has when a copy is done: dd's command, the loop over handles, volfs's own.
DONE = (
    r'CMD "[^"]*\bdd if=[^"]* bs=[^"]*" returned: 0 in ([\d.]+)s',
    r"Volume copy completed \(([\d.]+) MB at ([\d.]+) MB/s\)",
    r"\d+ MiB in ([\d.]+) s,",
)

Samples = dict[tuple[str, str, str], list[tuple[float, float]]]  # way, job, content: seconds of copy, of all


def run(rounds: int, json_path: str | None, check: bool) -> int:
    """Measure and print; 1 when `check` and a bar is missed by the better of volfs's two ways."""
    samples: Samples = {}
    with (
        running_services() as services,
        running_openstack(services) as openstack,
        tempfile.TemporaryDirectory(prefix="volfs-") as directory,
    ):
        socket = str(Path(directory) / "control")
        try:
            for _ in range(rounds):
                for way, settings in WAYS.items():
                    with openstack.configured(*settings, *([f"volfs.socket={socket}"] if settings else [])):
                        for content, length in CONTENTS.items():
                            _travel(openstack, way, content, length, samples)
        finally:
            if Path(socket).exists():
                api.unmount(api.status(socket_path=socket).mountpoint)
    rows = [_row(samples, f"{a} to {b}", content, bar) for a, b, bar in JOURNEY for content in CONTENTS]
    _show(rows)
    if json_path:
        told = {", ".join(key): values for key, values in samples.items()}
        Path(json_path).write_text(json.dumps({"rows": rows, "samples": told}, indent=2) + "\n")
    missed = [
        f"{row['job']}, {row['content']}: {row['ratio']:.2f}" for row in rows if row["ratio"] < row["bar"]
    ]
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return 1 if check and missed else 0


def _travel(openstack: Openstack, way: str, content: str, length: int, samples: Samples) -> None:
    """A new volume each time: what stock Cinder has copied is full."""
    volume = openstack.create_volume(ANY_TYPE)
    try:
        if openstack.show(volume)["os-vol-host-attr:host"] != openstack.host("ceph"):
            openstack.migrate(volume, "ceph", force_host_copy=True)
            openstack.wait_moved(volume, "ceph")
        for number in range(8):
            fill(openstack.where(volume), length // 8, GIB * number // 8, seed=number)
        for source, target, _ in JOURNEY:
            mark, begin = openstack.mark(), time.monotonic()
            openstack.migrate(volume, target, force_host_copy=True)
            openstack.wait_moved(volume, target)
            wall = time.monotonic() - begin
            taken = _copy_seconds(openstack.since(mark))
            samples.setdefault((way, f"{source} to {target}", content), []).append((taken, wall))
            print(f"{way}: {source} to {target}, {content}: copy {taken:.2f} s, all {wall:.1f} s", flush=True)
    finally:
        openstack.delete(volume)


def _copy_seconds(log: str) -> float:
    for pattern in DONE:
        if found := re.findall(pattern, log):
            last = found[-1]
            return float(last[0]) / float(last[1]) if isinstance(last, tuple) else float(last)
    raise SystemExit(f"bench: no copy in Cinder's log:\n{log[-3000:]}")


def _row(samples: Samples, job: str, content: str, bar: float) -> dict[str, Any]:
    def ratio(way: str) -> float:
        pairs = zip(samples[STOCK, job, content], samples[way, job, content], strict=True)
        return median(stock[0] / ours[0] for stock, ours in pairs)

    ratios = {way: round(ratio(way), 2) for way in WAYS if way != STOCK}
    return {
        "job": job,
        "content": content,
        "rates": {way: round(1024 / median(s[0] for s in samples[way, job, content])) for way in WAYS},
        "walls": {way: round(median(s[1] for s in samples[way, job, content]), 1) for way in WAYS},
        "ratios": ratios,
        "ratio": max(ratios.values()),
        "bar": bar if content == "full" else SPARSE_BAR,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="MiB/s of the copy (seconds of the whole migration); times as fast as stock Cinder")
    for name in ("migration", "data", *WAYS, *(f"{way}: ratio" for way in WAYS if way != STOCK), "bar"):
        table.add_column(name, justify="left" if name in ("migration", "data") else "right")
    for row in rows:
        cells = [f"{row['rates'][way]} ({row['walls'][way]})" for way in WAYS]
        ratios = [f"{value:.2f}" for value in row["ratios"].values()]
        table.add_row(row["job"], row["content"], *cells, *ratios, f"{row['bar']:g}")
    console = Console(highlight=False)
    Console(width=max(console.width, 130), highlight=False).print(table)
