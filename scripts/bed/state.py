"""What is remembered of a place from one start to the next."""

import contextlib
import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from bed.place import DAEMONS, PORTS, Place
from bed.processes import running
from bed.storage import Failure, services


def read_state(place: Place) -> dict[str, Any]:
    """{} before the first start; then
    *_port, *_password, cluster: chosen by the first start; a port that others took meanwhile is chosen anew,
    complete: the first start got to its end, so there may be data worth keeping,
    settings: what the last `up` was told to --set,
    extras: what it was told to start --with all else,
    digests: of what each daemon was started with,
    pids: the daemons that the last start left running when it got to its end; {} after a stop,
    services_are_ours: scripts/services did not run before, so `down` stops it.
    """
    try:
        return dict(json.loads(place.state.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Failure(f"{place.state} is damaged; remove {place.top} to begin anew") from None


def write_state(place: Place, state: dict[str, Any], **changes: Any) -> None:
    state |= changes
    services.write_whole(place.state, json.dumps(state) + "\n", 0o600)


def prepare(place: Place) -> dict[str, Any]:
    """Make directories, choose numbers and secrets. What a first start that broke off left goes away."""
    if read_state(place).get("complete") is False:
        remove(place)
    state = read_state(place)
    if not state:
        if place.top.exists() and any(place.top.iterdir()):
            raise Failure(f"{place.top} holds files that this script did not make")
        place.top.mkdir(exist_ok=True)
        place.top.chmod(0o700)
        state = {port: services.choose_port() for ports in PORTS.values() for port in ports}
        state |= {f"{who}_password": secrets.token_hex(16) for who in ("admin", "database", "amqp")}
        state |= {"cluster": f"volfs-{secrets.token_hex(4)}", "secret_uuid": secrets.token_hex(16)}
        write_state(
            place, state, complete=False, settings=[], extras=[], digests={}, pids={}, services_are_ours=False
        )
    works = [place.work(daemon) for daemon in DAEMONS]
    for directory in (
        place.logs,
        place.bin,
        place.python,
        place.local,
        place.san,
        place.targets,
        place.glance,
        place.images,
        place.backups,
        place.run,
        *works,
    ):
        directory.mkdir(exist_ok=True)
    alive = running(place)
    for daemon, ports in PORTS.items():
        for port in ports:
            if daemon not in alive and not (port in state and services.is_free(state[port])):
                state[port] = services.choose_port()
    return state


def remove(place: Place) -> None:
    if place.state.exists():
        shutil.rmtree(place.top)


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
    """One start or stop at a time. The lock lies beside the directory, for a purge removes that."""
    place.var.mkdir(parents=True, exist_ok=True)
    with (place.var / "openstack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
