"""scripts/services itself, on private instances beside the one the session uses."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import (
    MIB,
    SCRIPT,
    ImageFactory,
    LoopFactory,
    Lun,
    LunFactory,
    Services,
    describe,
    script,
    services_command,
)

DAEMONS = {"ceph-mon", "ceph-mgr", "ceph-osd", "tgtd"}


def start(var: Path) -> Services:
    done = services_command("start", var=var)
    assert done.returncode == 0, done.stderr
    return describe(var)


def pids(var: Path) -> dict[str, int]:
    return dict(script.running(script.Place(var)))


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, pattern: str) -> None:
    assert done.returncode == code
    assert re.fullmatch(pattern, done.stderr.rstrip("\n")), done.stderr


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory, services: Services) -> Iterator[Path]:
    """The VAR of another checkout, running beside ours: its path is too long for a socket, and has a space in it."""
    var = tmp_path_factory.mktemp("private") / ("a long name " + "x" * 100) / "var"
    start(var)
    yield var
    services_command("stop", "--purge", var=var)


# ---- without starting anything ---------------------------------------------------------------------------------


def test_status_of_nothing(tmp_path: Path) -> None:
    done = services_command("status", var=tmp_path)
    assert done.returncode == 3
    assert done.stdout.count("does not run") == len(DAEMONS)
    assert list(tmp_path.iterdir()) == []


def test_env_of_nothing(tmp_path: Path) -> None:
    done = services_command("env", var=tmp_path)
    assert_one_line(done, 3, r"services: nothing in .*; `.* start` changes that")
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [(), ("begin",), ("start", "--fast"), ("env", "surplus")])
def test_wrong_usage_is_one_line(arguments: tuple[str, ...]) -> None:
    assert_one_line(services_command(*arguments), 2, r"services.*: .*; see services.* --help")


@pytest.mark.parametrize("name", ["a#b", "a;b", "a$b", "a\nb"])
def test_path_that_ceph_would_misread(tmp_path: Path, name: str) -> None:
    done = services_command("start", var=tmp_path / name)
    assert done.returncode == 2
    assert "choose another" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_var_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(
        services_command("start", var=tmp_path / "file"), 2, r"services: .*/file is not a directory"
    )


@pytest.mark.parametrize("command", [("start",), ("stop", "--purge")])
def test_foreign_directory_is_left_alone(tmp_path: Path, command: tuple[str, ...]) -> None:
    foreign = tmp_path / "services" / "somebody's"
    foreign.parent.mkdir()
    foreign.write_text("precious")
    done = services_command(*command, var=tmp_path)
    assert done.returncode == (1 if command == ("start",) else 0)
    assert foreign.read_text() == "precious"


# ---- on the session's instance ---------------------------------------------------------------------------------


def test_start_again_is_quick(services: Services) -> None:
    before, began = pids(services.var), time.monotonic()
    done = services_command("start", var=services.var)
    assert done.returncode == 0
    assert "already running" in done.stdout
    assert time.monotonic() - began < 2
    assert pids(services.var) == before
    assert before.keys() == DAEMONS


def test_env_serves_a_shell(services: Services) -> None:
    """Also against variables of a system Ceph in the caller's environment."""
    commands = f"""\
        set -eu
        export CEPH_ARGS='--no-such-option' CEPH_CONF=/nonexistent
        eval "$('{SCRIPT}' env)"
        ceph fsid
        rbd --id "$VOLFS_CEPH_USER" --keyring "$VOLFS_CEPH_KEYRING" -p volumes ls
        iscsi-ls "$VOLFS_ISCSI_URL"
        tgtadm --lld iscsi --mode target --op show | grep -c "$VOLFS_MUTUAL_TARGET_USER"
        test "$(stat -c %a "$VOLFS_CHAP_SECRETS")" = 600
    """
    environment = {**os.environ, "VOLFS_VAR": str(services.var)}
    done = subprocess.run(
        ["bash", "-c", commands], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert script.read_state(script.Place(services.var))["fsid"] in done.stdout
    for lun in services.luns.values():
        assert f"Target:{lun.iqn} Portal:{services.portal}" in done.stdout


def test_secrets_stay_in_private_files(services: Services) -> None:
    secrets = [a.secret for lun in services.luns.values() for a in (lun.initiator, lun.target) if a]
    keys = re.findall(r"key = (\S+)", services.keyring.read_text() + services.admin_keyring.read_text())
    assert len(secrets) == 3
    assert len(keys) == 2
    shown = services_command("env").stdout + services_command("status", "--json").stdout + repr(services)
    shown += "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in pids(services.var).values())
    assert not [secret for secret in secrets + keys if secret in shown]
    holders = [path for path in (services.var / "services").iterdir() if path.is_file()]
    told = [path for path in holders if any(secret in path.read_text() for secret in secrets + keys)]
    assert len(told) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in told} == {0o600}


def test_everything_listens_on_loopback_only(services: Services) -> None:
    ours = {str(pid) for pid in pids(services.var).values()}
    listening = services.run("ss", "-Hltnp").decode().splitlines()
    addresses = {line.split()[3] for line in listening if ours & set(re.findall(r"pid=(\d+)", line))}
    assert addresses
    assert all(address.startswith("127.0.0.1:") for address in addresses)


def test_ceph_is_healthy_and_has_the_pools(services: Services) -> None:
    assert services.run("ceph", "health").strip() == b"HEALTH_OK"
    assert services.json("ceph", "osd", "pool", "ls", "--format", "json") == ["rbd", "volumes"]


def test_new_image(new_image: ImageFactory) -> None:
    image = new_image(8 * MIB, pool="rbd")
    image.write(b"volfs", offset=MIB)
    assert image.read() == bytes(MIB) + b"volfs" + bytes(7 * MIB - 5)
    assert image.watchers() == []


@pytest.mark.parametrize("how", [{}, {"sector_size": 4096}, {"chap": "one-way"}, {"chap": "mutual"}])
def test_new_lun(services: Services, new_lun: LunFactory, how: dict[str, object]) -> None:
    lun = new_lun(16 * MIB, **how)
    shown = services.run("iscsi-readcapacity16", lun.url, environment=lun.environment).decode()
    assert f"LOGICAL BLOCK LENGTH IN BYTES:{lun.sector_size}" in shown
    assert f"Total size:{lun.size}" in shown
    assert "LBPME:1" in shown  # may be unmapped
    if "chap" in how:
        with pytest.raises(subprocess.CalledProcessError):
            services.run("iscsi-readcapacity16", lun.url)


def test_readonly_lun(services: Services, new_lun: LunFactory) -> None:
    lun = new_lun(16 * MIB, readonly=True)
    with pytest.raises(subprocess.CalledProcessError):
        services.run("qemu-io", "-f", "raw", "-c", "write 0 1M", lun.url)
    services.run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", lun.url)


def test_loop_device(loop_device: LoopFactory) -> None:
    device = loop_device(4 * MIB, sector_size=4096)
    with device.open("rb") as file:
        assert len(file.read()) == 4 * MIB


# ---- on instances of its own -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_beside_another_checkout(services: Services, private: Path) -> None:
    other = describe(private)
    assert other.portal != services.portal
    assert other.run("ceph", "fsid") != services.run("ceph", "fsid")
    assert pids(private).keys() == pids(services.var).keys() == DAEMONS
    assert not set(pids(private).values()) & set(pids(services.var).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "killed", [DAEMONS, {"ceph-osd"}, {"ceph-mon"}, {"tgtd"}], ids=lambda killed: ",".join(sorted(killed))
)
def test_start_after_a_crash_keeps_data(private: Path, killed: set[str]) -> None:
    services, data = start(private), os.urandom(4 * MIB)
    name = f"rbd/crash-{len(killed)}-{min(killed)}"
    services.run("rbd", "import", "--no-progress", "-", name, data=data)
    lun = services.luns["chap"]
    services.run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 1M", with_account(lun))
    before = pids(private)
    for daemon in killed:
        os.kill(before[daemon], signal.SIGKILL)
    assert services_command("status", var=private).returncode == 3
    start(private)
    after = pids(private)
    assert {daemon for daemon in DAEMONS if after[daemon] != before[daemon]} == killed
    assert services.run("rbd", "export", "--no-progress", name, "-") == data
    services.run("qemu-io", "-f", "raw", "-c", "read -P 0x5a 0 1M", with_account(lun))
    assert lun.backing.read_bytes()[:MIB] == b"\x5a" * MIB


def with_account(lun: Lun) -> str:
    """QEMU takes the account in the URL only."""
    return lun.url.replace("iscsi://", f"iscsi://{lun.initiator.user}%{lun.initiator.secret}@")


@pytest.mark.slow
def test_stop_leaves_no_process_and_a_new_start_finds_other_ports(private: Path) -> None:
    """A process that only looks like a daemon of ours is not touched."""
    services = start(private)
    state = script.read_state(script.Place(private))
    with subprocess.Popen(["sleep", "100"], executable="/bin/sleep") as bystander:
        impostor = subprocess.Popen(["ceph-osd", "100"], executable="/bin/sleep")
        done = services_command("stop", var=private)
        assert "stopped" in done.stdout
        assert pids(private) == {}
        again = services_command("stop", var=private)
        assert again.returncode == 0
        assert "not running" in again.stdout
        assert impostor.poll() is None
        assert bystander.poll() is None
        impostor.kill()
        impostor.wait()
        bystander.kill()
    with (
        socket.create_server(("127.0.0.1", state["mon_port"])),
        socket.create_server(("127.0.0.1", state["iscsi_port"])),
    ):
        start(private)
        moved = script.read_state(script.Place(private))
        assert moved["fsid"] == state["fsid"]
        assert not {moved["mon_port"], moved["iscsi_port"]} & {state["mon_port"], state["iscsi_port"]}
        services.run("rbd", "pool", "stats", "rbd")


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["tgtd", "ceph-mon", "ceph-osd"])
def test_interrupted_first_start_leaves_nothing(tmp_path: Path, daemon: str) -> None:
    """Ctrl-C once this daemon is there; the next start is a first one again."""
    environment = {**os.environ, "VOLFS_VAR": str(tmp_path)}
    with subprocess.Popen([SCRIPT, "start"], stderr=subprocess.PIPE, text=True, env=environment) as starting:
        while daemon not in pids(tmp_path):
            assert starting.poll() is None
            time.sleep(0.02)
        starting.send_signal(signal.SIGINT if daemon == "tgtd" else signal.SIGTERM)
        _, stderr = starting.communicate(timeout=60)
    assert stderr == "services: start interrupted\n"
    assert starting.returncode == 130
    assert pids(tmp_path) == {}
    if daemon == "ceph-osd":
        services = start(tmp_path)
        assert services.run("rbd", "ls") == b""
        assert services_command("stop", "--purge", var=tmp_path).returncode == 0
        assert not (tmp_path / "services").exists()


@pytest.mark.slow
def test_failed_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """The stores are gone, as after a mistaken clean-up."""
    start(tmp_path)
    services_command("stop", var=tmp_path)
    (tmp_path / "services" / "mon" / "kv_backend").write_text("nonsense")
    done = services_command("start", var=tmp_path)
    assert_one_line(
        done, 1, rf"services: ceph-mon ended while starting; see {tmp_path}/services/log/ceph-mon.log"
    )
    assert pids(tmp_path) == {}


@pytest.mark.slow
def test_two_starts_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "VOLFS_VAR": str(tmp_path)}
    both = [
        subprocess.Popen([SCRIPT, "start"], stdout=subprocess.PIPE, text=True, env=environment) for _ in "12"
    ]
    said = sorted(process.communicate(timeout=200)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "already running" in said[0]
    assert "after" in said[1]
    assert json.loads(services_command("status", "--json", var=tmp_path).stdout)["ready"] is True
    services_command("stop", "--purge", var=tmp_path)
