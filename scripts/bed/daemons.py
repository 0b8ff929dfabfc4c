"""How each daemon is started, and when it is ready."""

import contextlib
import datetime
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bed.api import REGION, Api, is_served
from bed.place import BIN, Place
from bed.processes import Runner
from bed.storage import SERVICES, Failure, services

RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one on the PATH insists on the system's user and directories


def start_services(runner: Runner) -> None:
    place = runner.place
    environment = {"VOLFS_VAR": str(place.var)}
    status = subprocess.run(
        [SERVICES, "status"], stdout=subprocess.DEVNULL, env=os.environ | environment, check=False
    )
    if status.returncode:
        runner.state["services_are_ours"] = True
        runner.run(str(SERVICES), "start", **environment)


def services_status(place: Place) -> tuple[int, int]:
    """The port and the pid of tgtd."""
    return services.read_state(place.services)["iscsi_port"], services.running(place.services).get("tgtd", 0)


def services_run(place: Place) -> bool:
    return bool(services.all_run(place.services, services.read_state(place.services)))


def start_mariadb(runner: Runner) -> None:
    place, state = runner.place, runner.state
    if not (place.work("mariadbd") / "mysql").exists():
        user = ("--user=root",) if os.geteuid() == 0 else ()
        runner.run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={place.work('mariadbd')}",
            "--skip-test-db",
            "--auth-root-authentication-method=socket",
            *user,
        )
    user = ("--user=root",) if os.geteuid() == 0 else ()
    runner.spawn("mariadbd", "mariadbd", f"--defaults-file={place.top}/my.cnf", *user)
    # It answers before the initial statements are done; those who come before fail, and there is no other sign.
    runner.wait_for("start of mariadbd", lambda: services.answers(state["mariadb_port"]), log="mariadbd")


def speaks_amqp(port: int) -> bool:
    """A node that boots accepts connections early, and answers them late."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"AMQP\0\0\x09\x01")
        return connection.recv(1) == b"\x01"
    return False


def start_rabbitmq(runner: Runner) -> None:
    state = runner.state
    runner.spawn("rabbitmq", RABBITMQ)
    runner.wait_for("start of RabbitMQ", lambda: speaks_amqp(state["amqp_port"]), 0.1, "rabbitmq")


def start_keystone(runner: Runner) -> None:
    place, state = runner.place, runner.state
    port, manage = state["keystone_port"], str(BIN / "keystone-manage")
    url = f"http://127.0.0.1:{port}/v3"
    config = ("--config-file", str(place.keystone_conf))
    if state.get("bootstrapped") != url:
        if not state["complete"]:
            runner.run(manage, *config, "db_sync")
        # A later one changes what the catalogue says.
        options = [f"--bootstrap-{kind}-url={url}" for kind in ("public", "internal", "admin")]
        runner.run(
            manage,
            *config,
            "bootstrap",
            f"--bootstrap-region-id={REGION}",
            *options,
            OS_BOOTSTRAP_PASSWORD=state["admin_password"],
        )
        state["bootstrapped"] = url
    runner.spawn("keystone", str(BIN / "gunicorn"))
    runner.wait_for("start of keystone", lambda: is_served(url), 0.1, "keystone")


def start_glance(runner: Runner) -> None:
    place, state = runner.place, runner.state
    if not state.get("has_glance"):
        runner.run(str(BIN / "glance-manage"), "--config-dir", str(place.glance), "db", "sync")
        state["has_glance"] = True
    runner.spawn("glance-api", str(BIN / "gunicorn"))
    url = f"http://127.0.0.1:{state['glance_port']}/versions"
    runner.wait_for("start of glance-api", lambda: is_served(url), 0.1, "glance-api")


def keyring_link(state: Mapping[str, Any]) -> Path:
    return Path("/etc/ceph") / f"{state['cluster']}.client.volfs.keyring"


def log_length(place: Place, daemon: str) -> int:
    log = place.log(daemon)
    return log.stat().st_size if log.exists() else 0


def start_cinder_volume(runner: Runner) -> int:
    """Returns where its log ends before."""
    place, link = runner.place, keyring_link(runner.state)
    mark = log_length(place, "cinder-volume")
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(place.services.keyring("client.volfs"))
    runner.spawn(
        "cinder-volume", str(BIN / "cinder-volume"), "--config-file", str(place.cinder_conf), "--debug"
    )
    return mark


def start_cinder_backup(runner: Runner) -> None:
    place = runner.place
    files = [f"--config-file={file}" for file in (place.cinder_conf, place.backup_conf)]
    runner.spawn("cinder-backup", str(BIN / "cinder-backup"), *files, "--debug")


def wait_for_backup(runner: Runner, api: Api, since: datetime.datetime, began: int) -> None:
    """`began` is where the log of this start begins. It is up before its driver is, and says so with the first of what
    it tells the scheduler, which then finds none to have a backup made by.
    """
    log = runner.place.log("cinder-backup")

    def done() -> bool:
        told = log.read_bytes()[began:].count(b"Notifying Schedulers of capabilities")
        return told > 2 and bool(api.hosts_up("cinder-backup", since))

    runner.wait_for("start of cinder-backup", done, 0.3, "cinder-backup")


def wait_for_backends(runner: Runner, api: Api, since: datetime.datetime, began: int) -> None:
    """`began` is where the log of this start begins: a driver that fails does not come up any more."""
    log = runner.place.log("cinder-volume")

    def done() -> bool:
        late = api.late_backends(since)
        with log.open("rb") as file:
            file.seek(began)
            text = file.read().decode(errors="replace")
        if late and (
            said := re.search(r"Failed to initialize driver|Volume service \S+ failed to start", text)
        ):
            raise Failure(f"{said[0]}; see {log}")
        return not late

    runner.wait_for("start of the backends", done, 0.3, "cinder-volume")
