"""The virtual machine itself: what the guest has, that tests marked `vm` run in it, and how scripts/vm ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import bench_vm
import pytest
from guest import VM, why_not
from kernel_targets import MakeTarget, logged_in, sessions, succeed
from lvm import GroupFactory
from mounts import mounted, wait_until
from services import MIB, TOP, Image, Services, load_script, skip_or_fail

MODULES = [
    *("iscsi_tcp", "dm_multipath", "dm_crypt", "dm_thin_pool"),
    *("target_core_mod", "iscsi_target_mod", "nbd", "rbd"),
]
GUEST_SECONDS = 150  # from nothing to a guest that has ended

# ---- inside ----------------------------------------------------------------------------------------------------


@pytest.mark.vm
def test_this_runs_in_the_guest_as_root() -> None:
    assert os.environ["VOLFS_VM"] == "1"
    assert os.uname().nodename == "volfs-vm"
    assert os.geteuid() == 0


@pytest.mark.vm
def test_the_kernel_has_what_the_host_lacks() -> None:
    succeed("modprobe", "-a", *MODULES)
    loaded = {path.name for path in Path("/sys/module").iterdir()}
    assert set(MODULES) <= loaded


@pytest.mark.vm
@pytest.mark.parametrize("kind", ["lio", "tgtd"])
@pytest.mark.parametrize("chap", [False, True], ids=["open", "chap"])
def test_a_kernel_login_gives_a_block_device(
    iscsid: object, kernel_target: MakeTarget, kind: str, chap: bool
) -> None:
    target = kernel_target(kind, 16 * MIB, chap=chap)
    data = os.urandom(MIB)
    with logged_in(target) as device:
        assert len(sessions()) == 1
        with device.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            assert file.seek(0, os.SEEK_END) == target.size
    assert sessions() == []
    with target.backing.open("rb") as file:
        assert file.read(MIB) == data


@pytest.mark.vm
@pytest.mark.parametrize("kind", ["lio", "tgtd"])
def test_two_paths_are_one_multipath_map(
    iscsid: object, multipathd: object, kernel_target: MakeTarget, kind: str
) -> None:
    target = kernel_target(kind, 16 * MIB, portals=2)
    with logged_in(target):
        wait_until(lambda: succeed("multipathd", "show", "paths").count("active ready") == 2, "two paths", 60)
        (name,) = succeed("multipathd", "show", "maps", "raw", "format", "%n").split()
        with (Path("/dev/mapper") / name).open("rb") as file:
            assert file.seek(0, os.SEEK_END) == target.size
        succeed("udevadm", "settle", "--timeout=30")  # a rule of udev's may still be looking at the map
        succeed("multipath", "-f", name)


@pytest.mark.vm
def test_a_volume_group_has_thick_and_thin_volumes(new_group: GroupFactory) -> None:
    group = new_group()
    thick, thin = group.create("thick", 8 * MIB), group.create_thin("thin", 128 * MIB)
    for path, size in ((thick, 8 * MIB), (thin, 128 * MIB)):
        with path.open("r+b") as file:
            file.write(b"volfs")
            assert file.seek(0, os.SEEK_END) == size
    group.activate("thick", False)
    assert group.active() == {"pool", "thin"}
    assert not thick.exists()


@pytest.mark.vm
def test_volfs_mounts_in_the_guest(tmp_path: Path) -> None:
    directory, data = tmp_path / "volumes", os.urandom(MIB)
    directory.mkdir()
    (directory / "disk-1").write_bytes(bytes(4 * MIB))
    with mounted(tmp_path / "m", [f"file:{directory}"]) as mount:
        file = mount.path / "file" / "disk-1"
        with file.open("r+b") as volume:
            volume.write(data)
        assert file.read_bytes() == data + bytes(3 * MIB)


@pytest.mark.vm
def test_ceph_runs_in_the_guest(rbd_image: Image) -> None:
    rbd_image.write(b"volfs", offset=MIB)
    assert rbd_image.read()[MIB : MIB + 5] == b"volfs"


@pytest.mark.thorough
@pytest.mark.vm(seconds=12)
def test_the_kernels_ways_to_an_image_have_the_same_bytes(
    services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_vm.run(4) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["volfs", "krbd", "rbd-nbd"]
    assert shown.count("the same bytes") == 3


# ---- outside ---------------------------------------------------------------------------------------------------


def vm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=GUEST_SECONDS,
        check=False,
    )


def descendants(ancestor: int) -> dict[Path, str]:
    """The directories in /proc of all processes below one, and their names."""
    names, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            name, _, rest = (path / "stat").read_text().partition("(")[2].rpartition(")")
            names[path], parents[path] = name, Path("/proc") / rest.split()[1]
    found: dict[Path, str] = {}
    begin = Path("/proc") / str(ancestor)
    while True:
        more = {path: names[path] for path in names if path not in found and parents[path] in (begin, *found)}
        if not more:
            return found
        found |= more


@pytest.fixture
def guests() -> None:
    """For tests that boot one by themselves: it is built, so that they wait for booting only."""
    if reason := why_not():
        skip_or_fail("vm", reason)
    built = subprocess.run([VM, "build"], capture_output=True, text=True, timeout=900, check=False)
    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("arguments", [(), ("run",), ("build", "now"), ("start",)])
def test_wrong_usage_is_one_line_and_2(arguments: tuple[str, ...]) -> None:
    done = vm(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("vm")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_output_and_exit_code_of_the_command_are_passed_on(guests: None, tmp_path: Path) -> None:
    script = f"echo out; echo err >&2; echo $0 >{tmp_path}/shared; touch left-behind; exit 3"
    done = vm("run", "--share", str(tmp_path), "--", "sh", "-c", script, "two words")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert (tmp_path / "shared").read_text() == "two words\n"
    assert not (TOP / "left-behind").exists()  # what a guest does to the checkout is gone with it


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_command_that_hangs_ends_at_its_timeout(guests: None) -> None:
    done = vm("run", "--timeout", "2", "--", "sh", "-c", "echo begun; sleep 1000")
    assert (done.returncode, done.stdout) == (124, "begun\n")
    assert done.stderr.endswith("vm: the command did not end within 2 s\n")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_guest_that_panics_is_told(guests: None) -> None:
    done = vm("run", "--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000")
    assert done.returncode == 125
    assert "Kernel panic" in done.stderr
    assert done.stderr.endswith("vm: the guest ended without an answer\n")


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running_when_the_script_is_ended(guests: None, number: signal.Signals) -> None:
    with subprocess.Popen(
        [VM, "run", "--", "sleep", "1000"], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: "linux.uml" in descendants(process.pid).values(), "the guest runs", GUEST_SECONDS)
        left = descendants(process.pid)
        process.send_signal(number)
        process.wait(30)
    wait_until(lambda: not any(path.exists() for path in left), "the guest is gone", 10)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)


@pytest.mark.parametrize(
    ("program", "failure"), [("exit 0", ""), ("echo 'libc is too old' >&2; exit 1", "libc is too old")]
)
def test_a_kernel_that_does_not_run_on_this_host_is_found_out(
    tmp_path: Path, program: str, failure: str
) -> None:
    if reason := why_not():
        skip_or_fail("vm", reason)
    kernel = tmp_path / "usr" / "bin" / "linux.uml"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(f"#!/bin/sh\n{program}\n")
    kernel.chmod(0o755)
    host = next(Path("/usr/lib").glob("*-gnu/libc.so.6")).resolve()
    library = tmp_path / host.relative_to("/")
    library.parent.mkdir(parents=True)
    library.write_bytes(host.read_bytes())
    assert load_script(VM).kernel_failure(tmp_path) == failure
