"""scripts/bench: fio and dd against volfs and its peers, in one run, so that the ratios mean something.

Every subject shows a volume of its own on the same storage. The rounds are interleaved: each job runs on one subject
after the other before the next round begins, since machines change their speed from minute to minute. A figure is
the median of the rounds; a ratio is the median of the rounds' ratios, to the peer that comes out best.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import bench_chart
import bench_cinder
import bench_copy
import bench_scale
import bench_sparse
import bench_subjects
import bench_vm
from bench_subjects import PEERS, Volume
from rich.console import Console
from rich.table import Table
from services import MIB, Image, Services, image, lun, running_services

from volfs.version import VERSION

LIMIT = "fio rbd"  # librbd without a file in between
FILL = 4 * MIB
VM_SIZE_MIB = 16
COPY_SIZE_MIB = 4096
COPY_ROUNDS = 3


@dataclass(frozen=True)
class Job:
    """One measurement. What volfs has to be, as a multiple of the best peer, and of librbd itself."""

    name: str
    options: tuple[str, ...]  # of fio, or of dd
    unit: str = "MB/s"
    tool: str = "fio"
    floors: Mapping[str, float] = field(default_factory=dict)  # by driver
    limit_floor: float | None = None
    quick: bool = True


def _fio(rw: str, size: str, *, direct: int, depth: int = 1) -> tuple[str, ...]:
    engine = "psync" if depth == 1 else "libaio"
    options = (
        f"--rw={rw}",
        f"--bs={size}",
        f"--direct={direct}",
        f"--iodepth={depth}",
        f"--ioengine={engine}",
    )
    return (*options, "--end_fsync=1") if "write" in rw else options


def _floors(rbd: float, limit: float, iscsi: float) -> dict[str, Any]:
    return {"floors": {"rbd": rbd, "iscsi": iscsi}, "limit_floor": limit}


JOBS = (
    Job("read 1M direct", _fio("read", "1M", direct=1), **_floors(1.5, 0.6, 1.0)),
    Job("read 1M buffered", _fio("read", "1M", direct=0), **_floors(2.0, 0.6, 1.0)),
    Job("write 1M direct", _fio("write", "1M", direct=1), **_floors(1.2, 0.8, 1.0)),
    Job("write 1M buffered", _fio("write", "1M", direct=0), floors={"rbd": 0.9}),
    Job("dd bs=1M iflag=direct", ("bs=1M", "iflag=direct"), tool="dd"),
    Job("dd bs=1M", ("bs=1M",), tool="dd"),
    Job("randread 4k depth 1", _fio("randread", "4k", direct=1), "IOPS", **_floors(1.0, 0.65, 0.6)),
    Job("randread 4k depth 32", _fio("randread", "4k", direct=1, depth=32), "IOPS", **_floors(1.1, 0.6, 0.5)),
    Job("randwrite 4k depth 1", _fio("randwrite", "4k", direct=1), "IOPS", quick=False),
    Job(
        "randwrite 4k depth 32", _fio("randwrite", "4k", direct=1, depth=32), "IOPS", **_floors(0.9, 0.8, 0.9)
    ),
)
# Of volfs alone: a plain dd must not need to know of O_DIRECT.
PLAIN, DIRECT, PLAIN_FLOOR = "dd bs=1M", "dd bs=1M iflag=direct", 0.9

Samples = dict[str, dict[str, list[float]]]  # of each job, of each subject, one a round


def main() -> int:
    options = _arguments()
    if options.vm:
        return bench_vm.run(options.size_mib)
    if options.cinder:
        return bench_cinder.run(options.rounds, options.json, options.check)
    if missing := bench_subjects.missing_programs():
        return _fail(f"{', '.join(missing)}: not installed (scripts/setup)")
    if options.copy:
        return bench_copy.run(options.jobs, options.rounds, options.size_mib, options.json, options.check)
    if options.scale:
        return bench_scale.run(options.quick, options.job, options.json, options.check)
    if options.sparse:
        return bench_sparse.run(options.rounds, options.size_mib, options.json, options.check)
    console = Console(width=max(Console().width, 120), highlight=False)
    begin = time.monotonic()
    result: dict[str, Any] = {
        "settings": vars(options) | {"jobs": [job.name for job in options.jobs]},
        "machine": _machine(),
        "drivers": {},
    }
    missed = []
    with running_services() as services:
        for driver in options.driver or (["rbd"] if options.quick else ["rbd", "iscsi"]):
            samples = _measure(services, driver, options)
            rows = [_row(job, driver, samples[job.name]) for job in options.jobs]
            result["drivers"][driver] = {"jobs": rows}
            console.print(_table(driver, rows))
            missed += [f"{row['job']}: {row['ratio']:.2f}" for row in rows if row["met"] is False]
            missed += [
                f"{row['job']}: {row['limit_ratio']:.2f} of {LIMIT}"
                for row in rows
                if row["limit_met"] is False
            ]
            if PLAIN in samples and DIRECT in samples:
                floor = PLAIN_FLOOR * options.part_of_floor if options.floor is None else options.floor
                plain = _ratio(samples[PLAIN]["volfs"], samples[DIRECT]["volfs"])
                result["drivers"][driver]["plain_to_direct"] = round(plain, 3)
                console.print(f"volfs: {PLAIN} is {plain:.2f} times as fast as {DIRECT} (floor {floor})\n")
                if driver == "rbd" and plain < floor:
                    missed.append(f"{PLAIN}: {plain:.2f}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    if options.chart:
        bench_chart.draw(result, Path(options.chart))
    print(f"{result['seconds']:g} s" + (f"; below its floor: {', '.join(missed)}" if missed else ""))
    return 1 if missed and options.check else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__.split("\n\n")[0].split(": ")[1]
    )
    parser.add_argument("--quick", action="store_true", help="RBD only, less of everything; under 3 minutes")
    parser.add_argument(
        "--sparse", action="store_true", help="instead: copies of a terabyte that is nearly empty, against dd"
    )
    parser.add_argument(
        "--copy", action="store_true", help="instead: whole volumes, against qemu-img and Cinder's own loop"
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="instead: a large pool, many open volumes, many copies, an idle daemon; --job names a part of it",
    )
    parser.add_argument(
        "--vm",
        action="store_true",
        help="instead: beside krbd and rbd-nbd in the guest of scripts/vm, same bytes?",
    )
    parser.add_argument(
        "--cinder",
        action="store_true",
        help="instead: migrations by Cinder, through volfs and without (as root)",
    )
    parser.add_argument(
        "--driver", action="append", choices=list(PEERS), help="only this one; may be repeated"
    )
    parser.add_argument("--job", default="", help="only jobs with this in their name")
    parser.add_argument("--rounds", type=int, help="how often each job is run (5; quick and copy: 3)")
    parser.add_argument("--seconds", type=float, help="how long fio runs (4; quick: 0.6)")
    parser.add_argument("--size-mib", type=int, help="of each volume (1024; quick: 256; vm: 16; copy: 4096)")
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    parser.add_argument("--chart", metavar="FILE", help="draw the ratios there, as a PNG")
    floors = parser.add_mutually_exclusive_group()
    floors.add_argument(
        "--floor", type=float, help="what each ratio that has a floor has to reach, in place of that"
    )
    floors.add_argument("--part-of-floor", type=float, default=1.0, help="how much of it is enough")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a ratio is below its floor")
    options = parser.parse_args()
    for name, full, quick in (
        ("rounds", COPY_ROUNDS if options.copy else 5, 3),
        ("seconds", 4.0, 0.6),
        ("size_mib", VM_SIZE_MIB if options.vm else COPY_SIZE_MIB if options.copy else 1024, 256),
    ):
        value = getattr(options, name)
        if value is None:
            setattr(options, name, quick if options.quick else full)
        elif value <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a number above 0, not {value}")
    options.jobs = []
    if options.copy:
        options.jobs = [job for job in bench_copy.JOBS if options.job in job.name]
    elif not options.scale:  # which has parts, and no jobs
        options.jobs = _jobs(options)
    if not options.jobs and not options.scale:
        every = ", ".join(job.name for job in (bench_copy.JOBS if options.copy else JOBS))
        parser.error(f"--job {options.job}: expected a part of one of: {every}")
    return options


def _jobs(options: argparse.Namespace) -> list[Job]:
    return [
        _with_floors(
            job, lambda floor: floor * options.part_of_floor if options.floor is None else options.floor
        )
        for job in JOBS
        if options.job in job.name and (job.quick or not options.quick)
    ]


def _with_floors(job: Job, changed: Callable[[float], float]) -> Job:
    floors = {driver: changed(floor) for driver, floor in job.floors.items()}
    return replace(
        job, floors=floors, limit_floor=None if job.limit_floor is None else changed(job.limit_floor)
    )


def _measure(services: Services, driver: str, options: argparse.Namespace) -> Samples:
    samples: Samples = {job.name: {} for job in options.jobs}
    size = options.size_mib * MIB
    log = io.StringIO()  # the log of volfs, which is shown when something fails
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(log))
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="volfs-bench-")))
            paths = {}
            for name, subject in {"volfs": bench_subjects.volfs, **PEERS[driver]}.items():
                place = directory / name
                place.mkdir()
                volume = stack.enter_context(_filled(services, driver, size))
                paths[name] = stack.enter_context(subject(services, volume, place))
            limit = stack.enter_context(_filled(services, driver, size))
            for number in range(options.rounds):
                for job in options.jobs:
                    _say(f"{driver}: round {number + 1} of {options.rounds}: {job.name}")
                    for name, path in paths.items():
                        run = _run_dd(job, path) if job.tool == "dd" else _run_fio_on_file(job, path, options)
                        samples[job.name].setdefault(name, []).append(run)
                    if isinstance(limit, Image) and job.tool == "fio":
                        samples[job.name].setdefault(LIMIT, []).append(
                            _run_librbd(job, services, limit, options)
                        )
    except BaseException:
        _say("")
        print(log.getvalue(), file=sys.stderr)
        raise
    _say("")
    return samples


@contextlib.contextmanager
def _filled(services: Services, driver: str, size: int) -> Iterator[Volume]:
    """A volume without holes, of bytes that do not repeat."""
    with contextlib.ExitStack() as stack:
        if driver == "iscsi":
            target = stack.enter_context(lun(services, size))
            with target.backing.open("r+b") as file:
                for _ in range(0, size, FILL):
                    file.write(os.urandom(min(FILL, size - file.tell())))
            yield target
            return
        made = stack.enter_context(image(services, size))
        fill = ("--rw=write", "--bs=4M", "--iodepth=8", "--refill_buffers", f"--size={size}")
        subprocess.run(
            ["fio", "--name=fill", *_librbd(made), *fill],
            check=True,
            env=services.environment,
            stdout=subprocess.DEVNULL,
        )
        yield made


def _librbd(image: Image) -> list[str]:
    return ["--ioengine=rbd", f"--pool={image.pool}", f"--rbdname={image.name}", "--clientname=admin"]


def _run_librbd(job: Job, services: Services, image: Image, options: argparse.Namespace) -> float:
    """The same with fio's rbd engine; what goes in sequence, with as many requests under way as read-ahead has."""
    own = [option for option in job.options if not option.startswith(("--ioengine", "--direct"))]
    depth = ["--iodepth=16"] if "1M" in job.name else []
    return _run_fio(job, [*own, *_librbd(image), *depth], options, services.environment)


def _run_fio_on_file(job: Job, path: Path, options: argparse.Namespace) -> float:
    filename = str(path).replace(":", r"\:")  # which otherwise divides one name from the next
    return _run_fio(job, [*job.options, f"--filename={filename}", "--allow_file_create=0"], options, {})


def _run_fio(
    job: Job, what: Sequence[str], options: argparse.Namespace, environment: Mapping[str, str]
) -> float:
    how = [f"--size={options.size_mib}M", f"--runtime={int(options.seconds * 1000)}ms", "--time_based"]
    command = ["fio", f"--name={job.name}", *what, *how, "--output-format=json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    # Before it, librbd may have said something.
    (report,) = json.loads(done.stdout[done.stdout.index("{\n") :])["jobs"]
    figures = report["write" if "write" in job.name else "read"]
    return float(figures["iops"] if job.unit == "IOPS" else figures["bw_bytes"] / 1e6)


def _run_dd(job: Job, path: Path) -> float:
    begin = time.monotonic()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "status=none", *job.options], check=True)
    return path.stat().st_size / 1e6 / (time.monotonic() - begin)


def _row(job: Job, driver: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = {
        name: _ratio(samples["volfs"], values)
        for name, values in samples.items()
        if name not in ("volfs", LIMIT)
    }
    best = min(ratios, key=lambda name: ratios[name])
    floor = job.floors.get(driver)
    limit = _ratio(samples["volfs"], samples[LIMIT]) if LIMIT in samples else None
    limit_floor = None if limit is None else job.limit_floor
    return {
        "job": job.name,
        "unit": job.unit,
        "medians": {name: round(median(values), 1) for name, values in samples.items()},
        "best_peer": best,
        "ratio": round(ratios[best], 3),
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "floor": floor,
        "met": None if floor is None else ratios[best] >= floor,
        "limit_ratio": None if limit is None else round(limit, 3),
        "limit_floor": limit_floor,
        "limit_met": None if limit is None or limit_floor is None else limit >= limit_floor,
        "samples": {name: [round(value, 1) for value in values] for name, values in samples.items()},
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Round by round, since what the machine does differs more between rounds than within one."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def _table(driver: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["medians"]))
    table = Table(title=f"{driver}: medians; ratio of volfs to the best peer, round by round")
    table.add_column("job")
    for name in names:
        table.add_column(name, justify="right")
    for name in ("ratio", "floor", f"of {LIMIT}", "floor"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row['medians'][name]:.0f}" if name in row["medians"] else "" for name in names]
        ratios = [
            _judged(*(row[f"{which}{what}"] for what in ("ratio", "floor", "met")))
            for which in ("", "limit_")
        ]
        table.add_row(f"{row['job']}, {row['unit']}", *cells, *(cell for pair in ratios for cell in pair))
    return table


def _judged(ratio: float | None, floor: float | None, met: bool | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio:.2f}", "" if floor is None else f"{floor:g} {'met' if met else 'MISSED'}"


def _machine() -> dict[str, Any]:
    versions = {}
    for program, argument in (
        ("fio", "--version"),
        ("qemu-storage-daemon", "--version"),
        ("rbd", "--version"),
    ):
        text = subprocess.run([program, argument], capture_output=True, text=True, check=False).stdout
        found = re.search(r"\d+\.\d+(\.\d+)?", text)
        versions[program] = found[0] if found else "unknown"
    return {"cores": os.cpu_count(), "kernel": platform.release(), "volfs": VERSION, **versions}


def _say(text: str) -> None:
    """Where it has got to, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    print(f"bench: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
