"""In which order all of it starts and stops, and whether a start is still good."""

import datetime
import os
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bed.api import Api, is_served
from bed.configuration import cinder_text, database, digest, settings_text
from bed.daemons import (
    keyring_link,
    log_length,
    services_run,
    services_status,
    start_cinder_backup,
    start_cinder_volume,
    start_glance,
    start_keystone,
    start_mariadb,
    start_rabbitmq,
    start_services,
    wait_for_backends,
    wait_for_backup,
)
from bed.place import BIN, EXTRAS, Place, wanted_daemons
from bed.processes import Runner, running, stop_daemons
from bed.state import read_state, write_state
from bed.storage import SERVICES, TOP, Failure, services


def wanted_digests(place: Place, state: Mapping[str, Any]) -> dict[str, str]:
    """What each daemon is to be started with; only for cinder-volume that may change while others go on."""
    port, tgtd = services_status(place)
    text = cinder_text(place, state, port)
    return {
        "cinder-volume": digest(
            text, state["settings"], tgtd, (TOP / "tests" / "cinder_drivers.py").read_text()
        )
    }


def is_up(place: Place, state: dict[str, Any]) -> bool:
    """True when the very processes are there that a start left when it got to its end, and those of the storage."""
    now = running(place)
    wanted = set(wanted_daemons(state.get("extras", ())))
    return now.keys() == wanted and state.get("pids") == now and services_run(place)


def bring_up(runner: Runner) -> None:
    """Start what does not run; return when every backend is up."""
    place, state = runner.place, runner.state
    extras = state["extras"]
    alive = {*running(place), *(daemon for name, daemon in EXTRAS.items() if name not in extras)}

    def start(pool: ThreadPoolExecutor, daemon: str, function: Callable[[Runner], None]) -> Any:
        return pool.submit(runner.call, (lambda _: None) if daemon in alive else function)

    with ThreadPoolExecutor() as pool:
        storage = pool.submit(runner.call, start_services)
        try:
            if "epmd" not in alive:
                runner.spawn("epmd", "epmd", "-port", str(state["epmd_port"]), "-address", "127.0.0.1")
            queue = start(pool, "rabbitmq", start_rabbitmq)
            start(pool, "mariadbd", start_mariadb).result()
            keystone = start(pool, "keystone", start_keystone)
            glance = start(pool, "glance-api", start_glance)
            if not state["complete"]:
                # Its cinder.conf waits for what scripts/services tells.
                connection = database(state, "cinder")
                runner.run(
                    str(BIN / "cinder-manage"),
                    "--config-file=/dev/null",
                    "db",
                    "sync",
                    OS_DATABASE__CONNECTION=connection,
                )
            storage.result()
            text = cinder_text(place, state, services_status(place)[0])
            services.write_whole(place.cinder_conf, text + settings_text(state["settings"]), 0o600)
            # None of these waits for the queue to be there: they ask again until it is.
            began = datetime.datetime.now(datetime.UTC).replace(tzinfo=None, microsecond=0)
            for daemon in ("cinder-scheduler", "cinder-api"):
                if daemon not in alive:
                    runner.spawn(daemon, str(BIN / daemon), "--config-file", str(place.cinder_conf))
            backup_mark = log_length(place, "cinder-backup")
            mark = start_cinder_volume(runner)
            start(pool, "cinder-backup", start_cinder_backup).result()
            queue.result()
            keystone.result()
            glance.result()
        except BaseException:
            runner.gave_up.set()
            raise
    url = f"http://127.0.0.1:{state['cinder_port']}/"
    runner.wait_for("start of cinder-api", lambda: is_served(url), 0.1, "cinder-api")
    api = Api(state)
    api.log_in()
    api.register("cinder", "block-storage", api.cinder)
    if "images" in extras:
        api.register("glance", "image", api.glance)
    api.make_types()
    wait_for_backends(runner, api, began, mark)
    if "backup" in extras:
        wait_for_backup(runner, api, began, backup_mark)


def take_down(place: Place) -> bool:
    """Whether anything ran."""
    ran = bool(running(place))
    stop_daemons(place)
    if state := read_state(place):
        keyring_link(state).unlink(missing_ok=True)
        if state["services_are_ours"]:
            environment = os.environ | {"VOLFS_VAR": str(place.var)}
            stopped = subprocess.run(
                [SERVICES, "stop"], stdout=subprocess.DEVNULL, env=environment, check=False
            )
            if stopped.returncode:
                raise Failure(f"{SERVICES} stop: exit code {stopped.returncode}")
        write_state(place, state, pids={}, services_are_ours=False)
    return ran
