"""scripts/bench: that it measures everybody. What it measures is not for a test on a machine that does other things."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from services import TOP, Services

pytestmark = pytest.mark.slow


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOP / "scripts" / "bench", *arguments], capture_output=True, text=True, timeout=200, check=False
    )


def measured(result: dict[str, Any], driver: str) -> dict[str, set[str]]:
    return {row["job"]: set(row["medians"]) for row in result["drivers"][driver]["jobs"]}


def test_it_measures_volfs_and_all_peers(services: Services, tmp_path: Path) -> None:
    little = ("--rounds", "1", "--seconds", "0.1", "--size-mib", "16", "--check", "--floor", "0.001")
    chart = tmp_path / "chart.png"
    done = bench(*little, "--json", tmp_path / "result.json", "--chart", chart)
    assert done.returncode == 0, done.stdout + done.stderr
    assert chart.read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())

    peers = {"volfs", "nbdfuse+qemu-nbd", "qemu-storage-daemon"}
    on_rbd, on_iscsi = measured(result, "rbd"), measured(result, "iscsi")
    assert on_rbd.keys() == on_iscsi.keys()
    assert len(on_rbd) == 10
    for job, subjects in on_rbd.items():
        assert subjects == peers | {"rbd-fuse"} | (set() if job.startswith("dd") else {"fio rbd"}), job
    assert all(subjects == peers for subjects in on_iscsi.values())

    for row in result["drivers"]["rbd"]["jobs"] + result["drivers"]["iscsi"]["jobs"]:
        assert all(len(samples) == 1 and samples[0] > 0 for samples in row["samples"].values()), row
        assert row["ratio"] == min(row["ratios"].values())
        assert row["met"] is (None if row["floor"] is None else True), row
        assert f"{row['job']}, {row['unit']}".split()[0] in done.stdout
    assert result["drivers"]["rbd"]["plain_to_direct"] > 0


def test_floors_that_are_missed_are_named_and_with_check_an_error(services: Services) -> None:
    only = ("--quick", "--driver", "rbd", "--job", "read 1M direct")
    done = bench(*only, "--rounds", "1", "--seconds", "0.1", "--size-mib", "16", "--check", "--floor", "1000")
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"below its floor: read 1M direct: [\d.]+, read 1M direct: [\d.]+ of fio rbd$", done.stdout
    ), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds: expected a number above 0, not 0"),
        (("--seconds", "-1"), "--seconds: expected a number above 0, not -1.0"),
        (("--job", "nonsense"), "--job nonsense: expected a part of one of: read 1M direct, "),
        (("--driver", "tape"), "invalid choice: 'tape'"),
        (
            ("--copy", "--job", "tape"),
            "--job tape: expected a part of one of: rbd to iscsi, half of it data, ",
        ),
    ],
)
def test_wrong_use_is_one_clear_line(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_sparse_copies_are_measured_against_dd(services: Services, tmp_path: Path) -> None:
    done = bench("--sparse", "--rounds", "1", "--size-mib", "8", "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    copies = {row["copy"] for row in result["rows"]}
    assert {
        f"{side}: {name}" for side in ("rbd", "file") for name in ("volfs copy", "cp --sparse=auto")
    } < copies
    for row in result["rows"]:
        took, reference = result["seconds"][row["copy"]], row["copy"].split(":")[0] + ": " + row["reference"]
        assert row["ratio"] == pytest.approx(took[0] / result["seconds"][reference][0], abs=0.001)
    assert result["too_large"] == [], done.stdout


def test_copies_of_volumes_are_measured_against_qemu_img_and_the_loop_of_cinder(
    services: Services, tmp_path: Path
) -> None:
    little = ("--copy", "--job", "rbd to", "--rounds", "1", "--size-mib", "32")
    done = bench(*little, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        taken = {name: seconds[0] for name, seconds in result["seconds"][row["job"]].items()}
        for name, ratio in row["ratios"].items():
            theirs = min(seconds for way, seconds in taken.items() if way.startswith(name))
            assert ratio == pytest.approx(theirs / taken[row["ours"]], abs=0.001)
        assert len(row["missed"]) == sum(
            ratio < row["floors"][name] for name, ratio in row["ratios"].items()
        ), row


def test_scale_tells_figures_and_bars(services: Services, tmp_path: Path) -> None:
    arguments = ("--scale", "--quick", "--job", "listing", "--json", tmp_path / "result.json")
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert rows["ls -l of 500 images, cold"]["figure"] > 0
    assert rows["images open after it"]["met"] is True
    assert rows["requests to the OSD for it"]["met"] is True
    assert rows["making 500 images"]["met"] is None
    assert all(what in done.stdout for what in rows)
