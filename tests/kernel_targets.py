"""iSCSI for the kernel's initiator: LIO and tgtd targets in the guest, iscsid and multipathd, logins by open-iscsi.

For tests marked `vm`; as a fixture module, conftest.py offers `kernel_target`, `iscsid` and `multipathd`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from mounts import wait_until
from services import MIB, SLOWER, Account, script
from targets import Stoppable, Tgtd, running_tgtd

CONFIGFS = Path("/sys/kernel/config/target")
BY_PATH = Path("/dev/disk/by-path")
UDEV_SECONDS = 20.0 * SLOWER


class Kind(Protocol):
    """The target software."""

    def remove_lun(self) -> None:
        """Take the LUN away under whoever uses it."""


@dataclass(frozen=True)
class KernelTarget:
    """A target with one LUN, on one or more portals of 127.0.0.1."""

    portals: tuple[str, ...]
    iqn: str
    lun: int
    size: int
    backing: Path
    account: Account | None
    kind: Kind

    @property
    def url(self) -> str:
        return f"iscsi://{self.portals[0]}/{self.iqn}/{self.lun}"

    @property
    def connection_info(self) -> dict[str, Any]:
        """As Cinder gives it; with several portals what a multipath attach takes."""
        data: dict[str, Any] = {
            "target_discovered": False,
            "target_portal": self.portals[0],
            "target_iqn": self.iqn,
            "target_lun": self.lun,
        }
        if len(self.portals) > 1:
            data["target_portals"] = list(self.portals)
            data["target_iqns"] = [self.iqn] * len(self.portals)
            data["target_luns"] = [self.lun] * len(self.portals)
        if self.account:
            data |= {
                "auth_method": "CHAP",
                "auth_username": self.account.user,
                "auth_password": self.account.secret,
            }
        return {"driver_volume_type": "iscsi", "data": data}

    def device(self, portal: str = "") -> Path:
        """udev's name of it, once somebody is logged in."""
        return BY_PATH / f"ip-{portal or self.portals[0]}-iscsi-{self.iqn}-lun-{self.lun}"


def succeed(*command: str | Path) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---- targets ---------------------------------------------------------------------------------------------------


class Lio:
    """The kernel's own target, set up by configfs: targetcli takes a second for each command in the guest."""

    def __init__(self, iqn: str) -> None:
        self.iqn = CONFIGFS / "iscsi" / iqn
        self.group = self.iqn / "tpgt_1"
        self.lun = self.group / "lun" / "lun_0"
        self.link = self.lun / "volume"

    def remove_lun(self) -> None:
        self.link.unlink()
        self.lun.rmdir()


@contextlib.contextmanager
def lio(
    directory: Path, size: int, iqn: str, portals: int, account: Account | None
) -> Iterator[KernelTarget]:
    """A fileio LUN of a sparse file, number 0; blocks may be unmapped."""
    succeed("modprobe", "-a", "target_core_mod", "target_core_file", "iscsi_target_mod")
    backing = directory / "lio-lun"
    with backing.open("wb") as file:
        file.truncate(size)
    target = Lio(iqn)
    host = CONFIGFS / "core" / f"fileio_{secrets.randbelow(10**6)}"
    store = host / "volume"
    with contextlib.ExitStack() as undo:

        def make(path: Path) -> None:
            path.mkdir()
            undo.callback(lambda: path.rmdir() if path.exists() else None)

        make(host)
        make(store)
        (store / "control").write_text(f"fd_dev_name={backing},fd_dev_size={size}")
        (store / "enable").write_text("1")
        (store / "wwn" / "vpd_unit_serial").write_text(secrets.token_hex(16))
        (store / "attrib" / "emulate_tpu").write_text("1")
        (CONFIGFS / "iscsi").mkdir(exist_ok=True)
        make(target.iqn)
        make(target.group)
        make(target.lun)
        target.link.symlink_to(store)
        undo.callback(lambda: target.link.unlink(missing_ok=True))
        values = {
            "generate_node_acls": "1",
            "cache_dynamic_acls": "1",
            "demo_mode_write_protect": "0",
            "authentication": "1" if account else "0",
        }
        for name, value in values.items():
            (target.group / "attrib" / name).write_text(value)
        if account:
            (target.group / "auth" / "userid").write_text(account.user)
            (target.group / "auth" / "password").write_text(account.secret)
        addresses = free_portals(portals)
        for portal in addresses:
            make(target.group / "np" / portal)
        (target.group / "enable").write_text("1")
        undo.callback(lambda: (target.group / "enable").write_text("0"))
        yield KernelTarget(addresses, iqn, 0, size, backing, account, target)


@dataclass(frozen=True)
class TgtdKind:
    tgtd: Tgtd
    tid: str

    def remove_lun(self) -> None:
        unit = ("--mode", "logicalunit", "--tid", self.tid, "--lun", "1")
        self.tgtd.run(*unit, "--op", "delete")


@contextlib.contextmanager
def tgtd(
    directory: Path, size: int, iqn: str, portals: int, account: Account | None
) -> Iterator[KernelTarget]:
    """A daemon of its own, with a LUN of a sparse file, number 1."""
    with running_tgtd() as daemon:
        addresses = (daemon.portal, *free_portals(portals - 1))
        for portal in addresses[1:]:
            daemon.keep("--mode", "portal", "--op", "new", "--param", f"portal={portal}")
        target = daemon.target(iqn)
        backing = target.lun(size, thin_provisioning="1")
        if account:
            target.account(account.user, account.secret)
        yield KernelTarget(addresses, iqn, 1, size, backing, account, TgtdKind(daemon, target.tid))


def free_portals(count: int) -> tuple[str, ...]:
    return tuple(f"127.0.0.1:{script.choose_port()}" for _ in range(count))


TARGETS: Mapping[str, Callable[..., contextlib.AbstractContextManager[KernelTarget]]]
TARGETS = {"lio": lio, "tgtd": tgtd}

MakeTarget = Callable[..., KernelTarget]


@pytest.fixture
def kernel_target(tmp_path: Path) -> Iterator[MakeTarget]:
    """kernel_target(kind, size=, portals=, chap=): kind is "lio" or "tgtd", portals how many."""
    with contextlib.ExitStack() as stack:

        def make(
            kind: str, size: int = 64 * MIB, *, portals: int = 1, chap: bool = False, iqn: str = ""
        ) -> KernelTarget:
            name = secrets.token_hex(4)
            directory = tmp_path / name
            directory.mkdir()
            return stack.enter_context(
                TARGETS[kind](
                    directory,
                    size,
                    iqn or f"iqn.2026-01.org.volfs:kernel-{name}",
                    portals,
                    Account(f"user-{name}", secrets.token_hex(8)) if chap else None,
                )
            )

        yield make


# ---- initiator -------------------------------------------------------------------------------------------------


@dataclass
class Daemon(Stoppable):
    """One that stays in the foreground, until SIGTERM."""

    command: tuple[str, ...]
    ready: Callable[[], bool]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.command],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.process = process
        name = self.command[0]
        wait_until(lambda: process.poll() is not None or self.ready(), f"{name} is ready", UDEV_SECONDS)
        assert process.poll() is None, f"{name} ended with {process.returncode}"

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(UDEV_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


@contextlib.contextmanager
def daemon(*command: str, ready: Callable[[], bool]) -> Iterator[Daemon]:
    made = Daemon(command, ready)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="session")
def iscsid() -> Iterator[Daemon]:
    """The daemon of the kernel's initiator, for the session."""
    succeed("modprobe", "iscsi_tcp")
    name = Path("/etc/iscsi/initiatorname.iscsi")
    if not name.exists() or "InitiatorName" not in name.read_text():
        name.write_text("InitiatorName=iqn.2026-01.org.volfs:initiator\n")
    with daemon("iscsid", "-f", ready=iscsid_answers) as running:
        yield running


def iscsid_answers() -> bool:
    """And has taken over the sessions that it found when it was started: before that it logs out of none."""
    if "ISCSIADM_ABSTRACT_NAMESPACE" not in Path("/proc/net/unix").read_text():
        return False
    if not sessions():
        return True
    shown = succeed("iscsiadm", "-m", "session", "-P", "1")
    return shown.count("iSCSI Connection State: LOGGED IN") == len(sessions())


@pytest.fixture
def multipathd() -> Iterator[Daemon]:
    """Makes maps of devices with more than one path."""
    succeed("modprobe", "-a", "dm_multipath", "dm_round_robin", "dm_service_time")
    Path("/etc/multipath.conf").write_text(
        "defaults {\n user_friendly_names no\n find_multipaths no\n polling_interval 2\n}\n"
        'blacklist {\n devnode "^(nvme|loop|ram)"\n}\n'
    )
    with daemon("multipathd", "-d", ready=lambda: answers("multipathd", "show", "status")) as running:
        yield running


@contextlib.contextmanager
def logged_in(target: KernelTarget) -> Iterator[Path]:
    """A session to each portal, by open-iscsi; yields udev's name of the first path once all are there."""
    with contextlib.ExitStack() as undo:
        for portal in target.portals:
            node = ("iscsiadm", "-m", "node", "-T", target.iqn, "-p", portal)
            succeed(*node, "-o", "new")
            undo.callback(succeed, *node, "-o", "delete")
            if target.account:
                settings = {
                    "authmethod": "CHAP",
                    "username": target.account.user,
                    "password": target.account.secret,
                }
                for key, value in settings.items():
                    succeed(*node, "-o", "update", "-n", f"node.session.auth.{key}", "-v", value)
            succeed(*node, "--login")
            undo.callback(succeed, *node, "--logout")
        for portal in target.portals:
            device = target.device(portal)
            wait_until(device.exists, f"{device} is there", UDEV_SECONDS)
        yield target.device()


def sessions() -> list[str]:
    """The kernel's iSCSI sessions."""
    directory = "/sys/class/iscsi_session"
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []
