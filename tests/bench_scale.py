"""scripts/bench --scale: ten thousand images, two hundred open volumes, many copies, an idle daemon, and what it costs.

Each figure has its bar beside it, or none where it is only reported. Everything is on real services: images are made by
copies of one that librbd made (many.py), in a namespace of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import bench_subjects
from bench_subjects import ceph_environment
from many import Images, many_images, many_luns
from mounts import VOLFS, Mount, mounted, wait_until
from processes import usage
from rich.console import Console
from rich.table import Table
from services import MIB, Image, Services, image, running_services

GIB = 1 << 30
VOLUME = 16 * MIB  # of each that is open at once
WINDOW = 32 * MIB  # a volume's, of requests
COPIES = 8


@dataclass(frozen=True)
class Row:
    """A figure and what it has to be."""

    what: str
    figure: float
    unit: str
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.figure >= self.least) and (
            self.most is None or self.figure <= self.most
        )

    @property
    def bar(self) -> str:
        if self.least is not None:
            return f">= {self.least:g}"
        return "" if self.most is None else f"<= {self.most:g}"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    images: int
    volumes: int
    seconds: float  # of I/O on the open volumes
    idle_seconds: float
    copy_mib: int  # of each volume that is copied
    rounds: int


FULL = Size(images=10_000, volumes=200, seconds=15, idle_seconds=10, copy_mib=128, rounds=3)
QUICK = Size(images=500, volumes=20, seconds=2, idle_seconds=3, copy_mib=32, rounds=1)


def run(quick: bool, only: str, json_path: str | None, check: bool) -> int:
    """Measure and print; 1 when `check` and a bar is missed."""
    size = QUICK if quick else FULL
    rows: list[Row] = []
    with (
        running_services() as services,
        tempfile.TemporaryDirectory(prefix="volfs-bench-", dir="/var/tmp") as directory,
    ):
        for name, part in PARTS.items():
            if only in name:
                place = Path(directory, name)
                place.mkdir()
                begin = time.monotonic()
                with contextlib.redirect_stdout(sys.stderr):  # the logs of volfs
                    rows += part(services, place, size)
                print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    _show(rows)
    if json_path:
        told = [asdict(row) | {"met": row.met} for row in rows]
        Path(json_path).write_text(json.dumps({"size": asdict(size), "rows": told}, indent=2) + "\n")
    missed = [row.what for row in rows if row.met is False]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if check and missed else 0


def measure_listing(services: Services, directory: Path, size: Size) -> Iterator[Row]:
    """`ls -l` of a pool by a new daemon, and again; stat of one of its names."""
    begin = time.monotonic()
    cold, warm, one, operations = [], [], [], []
    with many_images(services, size.images) as images:
        making = time.monotonic() - begin
        for number in range(size.rounds):
            with pool_mount(services, directory / str(number), images) as (mount, path):
                cold.append(_seconds(lambda: _list(path, images)))
                warm.append(_seconds(lambda: _list(path, images)))
                opened = len(json.loads(mount.volfs("status", "--json").stdout)["open"])
                rss = usage(mount.process.pid).rss
            with pool_mount(services, directory / f"{number}-one", images) as (mount, path):
                (path / "disk-00000").stat()  # it connects
                before = osd_operations(services)
                one.append(_seconds(lambda: (path / "disk-00123").stat()))
                operations.append(osd_operations(services) - before)
    many = f"{size.images} images"
    yield Row(f"making {many}", making, "s")
    yield Row(f"ls -l of {many}, cold", median(cold), "s", most=2)
    yield Row(f"ls -l of {many}, again", median(warm), "s", most=0.2)
    yield Row("images open after it", opened, "", most=0)
    yield Row("daemon's memory after it", rss / MIB, "MiB", most=400)
    yield Row("stat of one of them", median(one) * 1000, "ms")
    yield Row("requests to the OSD for it", median(operations), "", most=STAT_REQUESTS)


# A lookup of the name and a stat for its attributes: the image's id, header and object map each.
STAT_REQUESTS = 10


def measure_open_volumes(services: Services, directory: Path, size: Size) -> Iterator[Row]:
    """Many volumes with I/O on all of them at once."""
    with (
        many_images(services, size.volumes, VOLUME, shrink=0) as images,
        pool_mount(services, directory / "rbd", images) as (mount, path),
    ):
        yield from _open_at_once("RBD", mount, [path / name for name in images.sizes], size)
    with (
        many_luns(services, size.volumes, VOLUME) as luns,
        mounted(directory / "iscsi", [f"iscsi://{services.portal}"]) as mount,
    ):
        path = mount.path / "iscsi" / luns[0].iqn
        yield from _open_at_once("iSCSI", mount, [path / str(lun.number) for lun in luns], size)


def _open_at_once(kind: str, mount: Mount, paths: Sequence[Path], size: Size) -> Iterator[Row]:
    with paths[0].open("rb"):
        before = usage(mount.process.pid)
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(path.open("r+b"))
        opened = usage(mount.process.pid)
        write_each(paths)
        operations, errors = mixed_io(paths, size.seconds)
        after = usage(mount.process.pid)
    many = f"{len(paths)} {kind} volumes"
    share = min(operations) / median(operations)
    yield Row(f"{many} with mixed I/O: errors", errors, "", most=0)
    yield Row(f"{many}: requests", sum(operations) / size.seconds, "/s")
    yield Row(f"{many}: slowest to median", share, "", least=0.5)
    yield Row(f"{many}: daemon's memory at most", after.peak_rss / MIB, "MiB", most=400)
    growth = (after.peak_rss - opened.rss) / len(paths) / MIB
    yield Row(f"{many}: of it, for the requests of each", growth, "MiB", most=WINDOW / MIB)
    grown = (opened.rss - before.rss) / len(paths) / MIB
    yield Row(f"{many}: of it, for each that is open", grown, "MiB")
    yield Row(f"{many}: threads", after.threads, "")


def measure_start(services: Services, directory: Path, size: Size) -> Iterator[Row]:
    """From the command to the line that it is ready, and to a volume's first byte but for the connection."""
    ready, first, connecting = [], [], []
    with image(services, VOLUME) as made:
        for number in range(max(size.rounds, 5)):
            begin = time.monotonic()
            with pool_mount(services, directory / str(number), made) as (_, path):
                ready.append(time.monotonic() - begin)
                with (path / made.name).open("rb", buffering=0) as file:
                    file.read(4096)
                first.append(time.monotonic() - begin)
            connecting.append(_connection_seconds(services))
    yield Row("volfs mount: ready", median(ready), "s", most=0.7)
    beyond = median(a - b for a, b in zip(first, connecting, strict=True))
    yield Row("volfs mount: to the first byte, beyond the connection", beyond, "s", most=0.7)
    yield Row("a connection to the cluster alone", median(connecting), "s")
    yield Row("volfs --help", median(_command_seconds("--help") for _ in range(5)), "s", most=0.15)


def measure_idle(services: Services, directory: Path, size: Size) -> Iterator[Row]:
    """A daemon that has never been used, one that is connected, and one with a volume open."""
    with image(services, VOLUME) as made, pool_mount(services, directory, made) as (mount, path):
        wait_until(lambda: usage(mount.process.pid).threads == 1, "the threads of its start end", 30)
        yield from _idle("idle daemon", mount, size.idle_seconds, 0.0)
        os.stat(path / made.name)
        yield from _idle("idle daemon that is connected to Ceph", mount, size.idle_seconds, None)
        with (path / made.name).open("rb"):
            yield from _idle("idle daemon with a volume open", mount, size.idle_seconds, None)


def _idle(what: str, mount: Mount, seconds: float, most: float | None) -> Iterator[Row]:
    before = usage(mount.process.pid)
    time.sleep(seconds)
    after = usage(mount.process.pid)
    yield Row(f"{what}: processor time", (after.cpu - before.cpu) / seconds * 100, "%", most=most)
    yield Row(f"{what}: wake-ups", after.wakeups_since(before) / seconds, "/s", most=most)


def measure_copies(services: Services, directory: Path, size: Size) -> Iterator[Row]:
    """`volfs copy` from RBD to RBD, one alone and eight side by side, by one daemon."""
    length = size.copy_mib * MIB
    alone, together = [], []
    with contextlib.ExitStack() as stack:
        images = [stack.enter_context(image(services, length)) for _ in range(2 * COPIES)]
        _, path = stack.enter_context(pool_mount(services, directory, images[0]))
        sources, targets = (
            [path / made.name for made in half] for half in (images[:COPIES], images[COPIES:])
        )
        for source in sources:
            _fill(source, length)
        for target in targets:  # once before, so that none of the figures is of new objects
            _fill(target, length)
        for _ in range(size.rounds):
            alone.append(length / MIB / _seconds(lambda: _copy(sources[:1], targets[:1])))
            together.append(COPIES * length / MIB / _seconds(lambda: _copy(sources, targets)))
    yield Row("one volfs copy", median(alone), "MiB/s")
    yield Row("eight at once, in all", median(together), "MiB/s")
    ratio = median(b / a for a, b in zip(alone, together, strict=True))
    yield Row("eight to one", ratio, "", least=1)


def measure_cost(services: Services, directory: Path, size: Size) -> Iterator[Row]:
    """Processor seconds of the daemon for each GiB that dd reads or writes."""
    length = 2 * size.copy_mib * MIB
    costs: dict[tuple[str, str], list[float]] = {}
    for name, subject in (
        ("volfs", bench_subjects.volfs),
        ("qemu-storage-daemon", bench_subjects.qemu_storage_daemon),
    ):
        place = directory / name
        place.mkdir()
        with image(services, length) as made, subject(services, made, place) as path:
            _fill(path, length)
            pid = _serving(place)
            for _ in range(size.rounds):
                for job, command in JOBS.items():
                    before = usage(pid).cpu
                    subprocess.run([*command(path), "bs=1M", f"count={length // MIB}"], check=True)
                    costs.setdefault((job, name), []).append((usage(pid).cpu - before) * GIB / length)
    for (job, name), values in sorted(costs.items()):
        yield Row(f"{name}: {job}", median(values), "s/GiB")


JOBS: Mapping[str, Callable[[Path], list[str]]] = {
    "read": lambda path: ["dd", f"if={path}", "of=/dev/null", "status=none"],
    "read, direct": lambda path: ["dd", f"if={path}", "of=/dev/null", "iflag=direct", "status=none"],
    "write": lambda path: ["dd", "if=/dev/zero", f"of={path}", "conv=notrunc,fsync", "status=none"],
    "write, direct": lambda path: [
        *("dd", "if=/dev/zero", f"of={path}"),
        *("conv=notrunc,fsync", "oflag=direct", "status=none"),
    ],
}

PARTS: Mapping[str, Callable[[Services, Path, Size], Iterator[Row]]] = {
    "listing": measure_listing,
    "start": measure_start,
    "idle": measure_idle,
    "open": measure_open_volumes,
    "copies": measure_copies,
    "cost": measure_cost,
}


@contextlib.contextmanager
def pool_mount(services: Services, directory: Path, shown: Images | Image) -> Iterator[tuple[Mount, Path]]:
    """A new daemon, and the directory of a pool, or namespace, on its mount."""
    directory.mkdir(exist_ok=True)
    place = [shown.pool, shown.namespace] if shown.namespace else [shown.pool]
    with mounted(directory, [f"rbd:{'/'.join(place)}"], env=ceph_environment(services)) as mount:
        yield mount, mount.path.joinpath("rbd", *place)


def mixed_io(paths: Sequence[Path], seconds: float) -> tuple[list[int], int]:
    """Reads and writes of 4 and 64 KiB at random, one at a time on each; how many on each, and how many failed."""
    jobs = [
        option
        for number, path in enumerate(paths)
        for option in (f"--name=volume{number}", "--filename=" + str(path).replace(":", r"\:"))
    ]
    how = ["--rw=randrw", "--rwmixread=70", "--bssplit=4k/70:64k/30", "--direct=1", "--ioengine=psync"]
    how += ["--thread", "--time_based", f"--runtime={int(seconds * 1000)}ms", "--allow_file_create=0"]
    how += ["--continue_on_error=io", "--output-format=json", f"--size={VOLUME}", "--randrepeat=0"]
    done = subprocess.run(["fio", *how, *jobs], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise SystemExit(f"bench: fio: {done.stderr.strip()}")
    report = json.loads(done.stdout[done.stdout.index("{\n") :])["jobs"]
    assert len(report) == len(paths), done.stderr
    operations = [job["read"]["total_ios"] + job["write"]["total_ios"] for job in report]
    return operations, sum(job["total_err"] + bool(job["error"]) for job in report)


def write_each(paths: Sequence[Path]) -> None:
    """All of each volume: of an RBD image, the first write takes a lock and the first to each object makes it."""
    for path in paths:
        with path.open("r+b", buffering=0) as file:
            for _ in range(VOLUME // (4 * MIB)):
                file.write(bytes(4 * MIB))


def osd_operations(services: Services) -> int:
    """How many requests of clients the one OSD has answered."""
    asok = script_sockets(services) / "ceph-osd.0.asok"
    return int(services.json("ceph", "daemon", str(asok), "perf", "dump")["osd"]["op"])


def script_sockets(services: Services) -> Path:
    return services.var / "services" / "run"


def _list(path: Path, images: Images) -> None:
    """ls -l, and that it is right."""
    shown = subprocess.run(["ls", "-l", path], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in shown.splitlines()[1:]]
    found = {line[8]: int(line[4]) for line in lines if line[8].startswith("disk-")}
    assert found == images.sizes, f"{len(found)} images instead of {len(images.sizes)}"


def _copy(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    processes = [
        subprocess.Popen([*VOLFS, "copy", "-q", source, target], stdout=subprocess.DEVNULL)
        for source, target in zip(sources, targets, strict=True)
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)


def _fill(path: Path, length: int) -> None:
    """With what does not repeat."""
    block = os.urandom(4 * MIB)
    with path.open("r+b", buffering=0) as file:
        for number in range(length // len(block)):
            file.write(number.to_bytes(8) + block[8:])
        os.fsync(file.fileno())


def _serving(place: Path) -> int:
    """The process that has been started with a path in this directory among its arguments."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(place).encode() in (entry / "cmdline").read_bytes():
                    return int(entry.name)
    raise SystemExit(f"bench: no process serves {place}")


def _connection_seconds(services: Services) -> float:
    """In this process, whose librados is loaded already."""
    import rados

    begin = time.monotonic()
    cluster = rados.Rados(conffile=str(services.ceph_conf), rados_id=services.user)
    cluster.connect()
    taken = time.monotonic() - begin
    cluster.shutdown()
    return taken


def _command_seconds(*arguments: str) -> float:
    return _seconds(lambda: subprocess.run([*VOLFS, *arguments], stdout=subprocess.DEVNULL, check=True))


def _seconds(call: Callable[[], object]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def _show(rows: Sequence[Row]) -> None:
    table = Table(title="scale: medians")
    for name in ("what", "figure", "bar", ""):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        judged = {None: "", True: "met", False: "MISSED"}[row.met]
        table.add_row(row.what, f"{row.figure:.3g} {row.unit}".strip(), row.bar, judged)
    Console(width=max(Console().width, 110), highlight=False).print(table)
