"""scripts/openstack: the bed comes up, and a stock Cinder migrates on it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from openstack import GIB, Openstack, fill, openstack_command, script

BACKENDS = ("ceph", "ceph2", "san", "local")


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, pattern: str) -> None:
    assert done.returncode == code
    assert re.fullmatch(pattern, done.stderr.rstrip("\n")), done.stderr


# ---- without starting anything ---------------------------------------------------------------------------------


def test_status_of_nothing(tmp_path: Path) -> None:
    done = openstack_command("status", var=tmp_path)
    assert done.returncode == 3
    assert done.stdout.count("does not run") == len(script.DAEMONS) - len(script.EXTRAS)
    assert list(tmp_path.iterdir()) == []


def test_env_of_nothing(tmp_path: Path) -> None:
    done = openstack_command("env", var=tmp_path)
    assert_one_line(done, 3, r"openstack: nothing in .*; `.* up` changes that")
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("begin",),
        ("up", "--set", "nonsense"),
        ("up", "--with", "nova"),
        ("restart",),
        ("restart", "mariadbd"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...]) -> None:
    assert_one_line(openstack_command(*arguments), 2, r"openstack.*: .*; see openstack.* --help")


def test_path_that_rabbitmq_would_misread(tmp_path: Path) -> None:
    done = openstack_command("up", var=tmp_path / "a b")
    assert_one_line(done, 2, r"openstack: .*; choose another by --var")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["down", "purge"])
def test_down_of_nothing(tmp_path: Path, command: str) -> None:
    done = openstack_command(command, var=tmp_path)
    assert done.returncode == 0
    assert "not running" in done.stdout


def test_restart_of_nothing(tmp_path: Path) -> None:
    done = openstack_command("restart", "cinder-volume", var=tmp_path)
    assert_one_line(done, 3, r"openstack: not all else runs; `.* up` changes that")


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "openstack").mkdir()
    (tmp_path / "openstack" / "file").touch()
    assert openstack_command("purge", var=tmp_path).returncode == 0
    assert (tmp_path / "openstack" / "file").exists()


# ---- the session's ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_backend_is_up(openstack: Openstack) -> None:
    assert openstack.backends() == dict.fromkeys(BACKENDS, "up")
    done = openstack_command("status", "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 0
    assert shown["ready"] is True
    assert shown["pids"] == openstack.pids()
    again = openstack_command("up")
    assert "already running" in again.stdout


@pytest.mark.slow
def test_secrets_are_in_files_that_only_the_owner_reads(openstack: Openstack) -> None:
    state = script.read_state(script.Place(openstack.var))
    hidden = [value for key, value in state.items() if key.endswith("_password")]
    assert len(hidden) == 3
    shown = openstack_command("status", "--json").stdout
    top = openstack.var / "openstack"
    assert stat.S_IMODE(top.stat().st_mode) == 0o700
    for path in [*top.glob("*.*"), *(top / "log").iterdir()]:
        if path.is_file():
            text = path.read_bytes()
            holds = any(secret.encode() in text for secret in hidden)
            assert not (holds and stat.S_IMODE(path.stat().st_mode) & 0o077), path
    assert not any(secret in shown for secret in hidden)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_volume_comes_and_goes_and_leaves_nothing(openstack: Openstack, kind: str) -> None:
    before = openstack.stored(kind)
    volume = openstack.create_volume(kind)
    stored = openstack.where(volume)
    assert stored.exists()
    assert stored.size == GIB
    assert openstack.stored(kind) == sorted([*before, f"volume-{volume}"])
    openstack.delete(volume)
    assert openstack.stored(kind) == before
    assert openstack.volumes() == []


@pytest.mark.slow
def test_san_exports_by_tgtd_with_chap(openstack: Openstack, new_volume: Any) -> None:
    """Create an attachment as a client would, and log in with what it tells."""
    volume = new_volume("san")
    connector = {
        "host": "client",
        "ip": "127.0.0.1",
        "platform": "x86_64",
        "os_type": "linux",
        "multipath": False,
    }
    body = {"attachment": {"volume_uuid": volume, "connector": connector}}
    attachment = openstack.call("POST", "/attachments", body)["attachment"]
    try:
        info = attachment["connection_info"]
        assert info["driver_volume_type"] == "iscsi"
        assert info["auth_method"] == "CHAP"
        url = f"iscsi://{info['target_portal']}/{info['target_iqn']}/{info['target_lun']}"
        assert info["target_portal"] == openstack.services.portal
        account = {
            "LIBISCSI_CHAP_USERNAME": info["auth_username"],
            "LIBISCSI_CHAP_PASSWORD": info["auth_password"],
        }
        run = openstack.services.run
        assert run("iscsi-readcapacity16", "-s", url, environment=account).split() == [str(GIB).encode()]
        with pytest.raises(subprocess.CalledProcessError):
            run("iscsi-readcapacity16", "-s", url)
    finally:
        openstack.call("DELETE", f"/attachments/{attachment['id']}")


@pytest.mark.slow
def test_a_stock_volume_migrates_to_files_and_back(openstack: Openstack, new_volume: Any) -> None:
    volume = new_volume("ceph")
    fill(openstack.where(volume), GIB)
    before = openstack.where(volume).sha256()
    for kind in ("local", "ceph", "ceph2"):
        mark = openstack.mark()
        openstack.retype(volume, kind)
        openstack.wait_moved(volume, kind)
        log = openstack.since(mark)
        assert openstack.where(volume).sha256() == before, log
        rate = re.search(r"Volume copy completed \((.*)\)", log)
        print(f"{kind}: {rate[1] if rate else 'moved by the driver'}")
    for kind in ("ceph", "local"):
        assert openstack.stored(kind) == []


@pytest.mark.slow
@pytest.mark.thorough
def test_a_stock_volume_migrates_within_the_cluster_by_copying(openstack: Openstack, new_volume: Any) -> None:
    """A type that names its backend is in the way of `migrate`, so this is a volume of no type of ours."""
    volume = new_volume("__DEFAULT__")
    if openstack.show(volume)["os-vol-host-attr:host"] != openstack.host("ceph"):
        openstack.migrate(volume, "ceph", force_host_copy=True)
        openstack.wait_moved(volume, "ceph")
    fill(openstack.where(volume), GIB)
    before, mark = openstack.where(volume).sha256(), openstack.mark()
    openstack.migrate(volume, "ceph2", force_host_copy=True)
    openstack.wait_moved(volume, "ceph2")
    log = openstack.since(mark)
    assert openstack.where(volume).sha256() == before, log
    rate = re.search(r"Volume copy completed \((.*)\)", log)
    assert rate, log
    print(f"ceph to ceph2: {rate[1]}")


@pytest.mark.slow
@pytest.mark.thorough
def test_a_backend_that_cannot_start_is_told_in_one_line(openstack: Openstack) -> None:
    done = openstack_command("up", "--set", "local.volume_driver=no.such.Driver", var=openstack.var)
    try:
        assert_one_line(done, 1, r"openstack: Volume service \S+ failed to start; see .*/cinder-volume.log")
        assert openstack.pids() == {}
    finally:
        openstack.up()


@pytest.mark.slow
def test_a_killed_cinder_volume_is_noticed_and_restarted(openstack: Openstack, new_volume: Any) -> None:
    killed = openstack.pids()["cinder-volume"]
    os.killpg(killed, signal.SIGKILL)
    while "cinder-volume" in openstack.pids():
        time.sleep(0.05)
    assert openstack_command("status").returncode == 3
    openstack.restart()
    assert openstack.pids()["cinder-volume"] != killed
    assert openstack_command("status").returncode == 0
    new_volume("local")


@pytest.mark.slow
def test_settings_last_until_the_next_up(openstack: Openstack) -> None:
    before = openstack.pids()
    conf = Path(openstack.environment["VOLFS_CINDER_CONF"])
    with openstack.configured("local.max_over_subscription_ratio=7.0", "volfs_test.some_option=a b"):
        changed = openstack.pids()
        assert {name for name in before if before[name] != changed[name]} == {"cinder-volume"}
        assert conf.read_text().endswith("[volfs_test]\nsome_option = a b\n")
    assert "some_option" not in conf.read_text()
