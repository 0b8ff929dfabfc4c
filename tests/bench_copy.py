"""scripts/bench --copy: whole volumes from one storage to another, by volfs, qemu-img, dd and a loop as Cinder's.

A volume with data in each other 16 MiB, between RBD and iSCSI and from RBD to RBD, each time to a volume made for it
and with cold caches, as far as root can have them cold. The rounds are interleaved; a ratio is the median of theirs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import bench_subjects
from bench_subjects import Volume
from mounts import VOLFS, Mount, mounted
from rich.console import Console
from rich.table import Table
from services import MIB, Lun, Services, image, lun, running_services
from volumes import ceph_environment

RUN = 16 * MIB  # of data, and of hole
BLOCK = 4 * MIB  # of the loop, as in Cinder
FULL_MIB = 1024  # most of the volume that is full of data
QEMU = "qemu-img"
LOOP = "loop of 4 MiB"
DD = "dd, both direct"

Samples = dict[str, dict[str, list[float]]]  # of each job, of each way: seconds


@dataclass(frozen=True)
class Job:
    """From one storage to another. `floors`: how many times as fast as another way volfs has to be."""

    source: str
    target: str
    ours: str
    floors: Mapping[str, float]
    full: bool = False

    @property
    def name(self) -> str:
        return f"{self.source} to {self.target}, {'full' if self.full else 'half of it data'}"


JOBS = (
    Job("rbd", "iscsi", "volfs copy", {QEMU: 1.3, LOOP: 2.0}),
    Job("iscsi", "rbd", "volfs copy", {QEMU: 1.3, LOOP: 2.0}),
    Job("rbd", "rbd", "volfs copy", {QEMU: 1.0, LOOP: 2.0}),
    *(
        Job(source, target, DD, {LOOP: 1.2}, full=True)
        for source, target in (("rbd", "iscsi"), ("iscsi", "rbd"), ("rbd", "rbd"))
    ),
)


@dataclass(frozen=True)
class Bed:
    services: Services
    mount: Mount

    def run_volfs(self, command: str, source: Volume, target: Volume) -> None:
        paths = [self.path(source), self.path(target)]
        subprocess.run([*VOLFS, command, "--quiet", *paths], check=True, stdout=subprocess.DEVNULL)

    def path(self, volume: Volume) -> Path:
        return self.mount.path.joinpath(*bench_subjects.place(volume))


Way = Callable[[Bed, Volume, Volume], None]


def volfs_copy(bed: Bed, source: Volume, target: Volume) -> None:
    bed.run_volfs("copy", source, target)


def dd(bed: Bed, source: Volume, target: Volume) -> None:
    """Through the mount, as Cinder calls it, a full one."""
    paths = [f"if={bed.path(source)}", f"of={bed.path(target)}"]
    flags = ["bs=4M", "iflag=direct", "oflag=direct", "conv=notrunc,fsync", "status=none"]
    subprocess.run(["dd", *paths, *flags], check=True)


def qemu_img(cache: str) -> Way:
    """Its eight requests at once, each written when it is read."""

    def convert(bed: Bed, source: Volume, target: Volume) -> None:
        urls = [bench_subjects.qemu_url(bed.services, volume) for volume in (source, target)]
        options = ["-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", "-t", cache, "-T", cache]
        subprocess.run(["qemu-img", "convert", *options, *urls], check=True, env=bed.services.environment)

    return convert


def loop(bed: Bed, source: Volume, target: Volume) -> None:
    """As Cinder copies between os-brick's handles: a block is read, then it is written.

    That of an iSCSI volume is the kernel's block device, which a host may not have; the target's own file stands for
    it, and flatters the loop by the network and all that is behind it.
    """
    with contextlib.ExitStack() as stack:
        reader, writer = (stack.enter_context(handle(bed, volume)) for volume in (source, target))
        while block := reader.read(BLOCK):
            writer.write(block)
        writer.flush()
        if isinstance(target, Lun):
            os.fsync(writer.fileno())


@contextlib.contextmanager
def handle(bed: Bed, volume: Volume) -> Iterator[IO[bytes]]:
    if isinstance(volume, Lun):
        with volume.backing.open("r+b", buffering=0) as file:
            yield file  # type: ignore[misc]
        return
    from os_brick.initiator import linuxrbd

    conf = str(bed.services.ceph_conf)
    client = linuxrbd.RBDClient("admin", volume.pool, conffile=conf)
    metadata = linuxrbd.RBDImageMetadata(linuxrbd.RBDVolume(client, volume.name), volume.pool, "admin", conf)
    with linuxrbd.RBDVolumeIOWrapper(metadata) as file:
        yield file


# The loop and qemu-img do not look at what the other ways left in caches: each of them is run cold.
WAYS: Mapping[str, Way] = {
    "volfs copy": volfs_copy,
    f"{QEMU} -t none": qemu_img("none"),
    f"{QEMU} -t writeback": qemu_img("writeback"),
    LOOP: loop,
    DD: dd,
}


def ways(job: Job) -> Sequence[str]:
    return [name for name in WAYS if name == job.ours or any(name.startswith(other) for other in job.floors)]


def run(jobs: Sequence[Job], rounds: int, size_mib: int, json_path: str | None, check: bool) -> int:
    """Measure and print; 1 when `check` and a bar is missed."""
    samples: Samples = {job.name: {} for job in jobs}
    with running_services() as services, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # the daemon's log
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="volfs-bench-")))
        prefixes = ["rbd:volumes", f"iscsi://{services.portal}"]
        bed = Bed(services, stack.enter_context(mounted(directory, prefixes, env=ceph_environment(services))))
        sources: dict[tuple[str, bool], Volume] = {}
        for job in jobs:
            key = (job.source, job.full)
            if key not in sources:
                size = min(size_mib, FULL_MIB) if job.full else size_mib
                sources[key] = stack.enter_context(new_volume(services, job.source, size * MIB))
                fill(bed.path(sources[key]), size * MIB, RUN if job.full else 2 * RUN)
        for number in range(rounds):
            for job in jobs:
                for name in ways(job):
                    source = sources[job.source, job.full]
                    with new_volume(services, job.target, source.size) as target:
                        chill(bed)
                        begin = time.monotonic()
                        WAYS[name](bed, source, target)
                        samples[job.name].setdefault(name, []).append(time.monotonic() - begin)
                        if not number:
                            verify(bed, source, target)
    rows = [row(job, samples[job.name], size_mib) for job in jobs]
    show(rows, size_mib)
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "seconds": samples}, indent=2) + "\n")
    missed = [f"{each['job']}: {miss}" for each in rows for miss in each["missed"]]
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return 1 if check and missed else 0


@contextlib.contextmanager
def new_volume(services: Services, driver: str, size: int) -> Iterator[Volume]:
    with image(services, size) if driver == "rbd" else lun(services, size) as made:
        yield made


def fill(path: Path, size: int, step: int) -> None:
    with path.open("r+b", buffering=0) as file:
        for offset in range(0, size, step):
            file.seek(offset)
            file.write(os.urandom(min(RUN, size - offset)))
        os.fsync(file.fileno())


def chill(bed: Bed) -> None:
    os.sync()
    bed.services.run("ceph", "tell", "osd.0", "cache", "drop")
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def verify(bed: Bed, source: Volume, target: Volume) -> None:
    bed.run_volfs("verify", source, target)


def row(job: Job, samples: Mapping[str, Sequence[float]], size_mib: int) -> dict[str, Any]:
    """The ratio to qemu-img is that to the better of its ways of caching."""
    ratios: dict[str, float] = {}
    for other in job.floors:
        ratios[other] = min(
            median(theirs / ours for theirs, ours in zip(taken, samples[job.ours], strict=True))
            for name, taken in samples.items()
            if name.startswith(other)
        )
    return {
        "job": job.name,
        "ours": job.ours,
        "medians": {name: round(median(taken), 3) for name, taken in samples.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "floors": dict(job.floors),
        "missed": [
            f"{ratios[name]:.2f} times {name}, not {floor:g}"
            for name, floor in job.floors.items()
            if ratios[name] < floor
        ],
    }


def show(rows: Sequence[Mapping[str, Any]], size_mib: int) -> None:
    table = Table(title=f"seconds, of a volume of {size_mib} MiB (a full one: {min(size_mib, FULL_MIB)})")
    table.add_column("copy")
    for name in (*WAYS, "times as fast (floor)"):
        table.add_column(name, justify="right")
    for each in rows:
        cells = [f"{each['medians'][name]:.2f}" if name in each["medians"] else "" for name in WAYS]
        verdicts = [
            f"{ratio:.2f} ({floor:g} {'met' if ratio >= floor else 'MISSED'}) {name.split()[0]}"
            for name, ratio in each["ratios"].items()
            for floor in (each["floors"][name],)
        ]
        table.add_row(each["job"], *cells, "\n".join(verdicts))
    Console(width=max(Console().width, 140), highlight=False).print(table)
