"""Where everything is, and which daemons there are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bed.storage import TOP, services

BIN = TOP / ".venv" / "bin"
# In the order of starting; those of one row neither need nor know each other as they stop.
ROWS = (
    ("epmd",),
    ("mariadbd", "rabbitmq"),
    ("keystone", "glance-api", "cinder-api", "cinder-scheduler", "cinder-volume", "cinder-backup"),
)
DAEMONS = tuple(daemon for row in ROWS for daemon in row)
EXTRAS = {"images": "glance-api", "backup": "cinder-backup"}  # started only when asked for
PORTS = {
    "epmd": ("epmd_port",),
    "mariadbd": ("mariadb_port",),
    "rabbitmq": ("amqp_port", "erlang_port"),
    "keystone": ("keystone_port",),
    "glance-api": ("glance_port",),
    "cinder-api": ("cinder_port",),
}


def wanted_daemons(extras: Iterable[str]) -> tuple[str, ...]:
    """In the order of starting."""
    left_out = {daemon for name, daemon in EXTRAS.items() if name not in extras}
    return tuple(daemon for daemon in DAEMONS if daemon not in left_out)


class Place:
    """Where everything is."""

    def __init__(self, var: Path) -> None:
        self.services = services.Place(var)
        self.var = Path(self.services.var)
        self.top = self.var / "openstack"
        self.state = self.top / "state.json"  # also tells that the directory is ours to remove
        self.logs = self.top / "log"
        self.run = self.top / "run"  # a working directory for each daemon
        self.bin = self.top / "bin"
        # With cinder_drivers alone: what else is in tests/ has names (services, openstack) that libraries have, too.
        self.python = self.top / "python"
        self.cinder_conf = self.top / "cinder.conf"
        self.backup_conf = self.top / "cinder-backup.conf"  # what it reads after cinder.conf
        self.keystone_conf = self.top / "keystone.conf"
        self.glance = self.top / "glance"  # its configuration and its images
        self.images = self.glance / "images"
        self.backups = self.top / "backups"  # those of the posix driver
        self.local = self.top / "local"
        self.san = self.top / "san"
        self.targets = self.top / "targets"  # those of the san backend, as tgt-admin reads them
        self.users = self.var / "openstack.users"

    def log(self, daemon: str) -> Path:
        return self.logs / f"{daemon}.log"

    def work(self, daemon: str) -> Path:
        return self.run / daemon

    def environment(self, state: Mapping[str, Any]) -> dict[str, str]:
        """For every child. The tools of Ceph and tgt are led to scripts/services; nobody's OpenStack is meant."""
        kept = {
            key: value
            for key, value in self.services.environment().items()
            if not key.startswith(("OS_", "RABBITMQ_", "ERL_", "MYSQL_", "MARIADB_"))
            and not key.lower().endswith("_proxy")
        }
        work = self.work("rabbitmq")
        return kept | {
            # tgt-admin is told in there to read our targets and not /etc/tgt.
            "PATH": f"{self.bin}:{BIN}:{kept['PATH']}",
            "PYTHONPATH": str(self.python),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self.top),  # with Erlang's cookie, and without anyone's configuration
            "OS_KEYSTONE_CONFIG_FILES": str(self.keystone_conf),
            "OS_GLANCE_CONFIG_DIR": str(self.glance),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(state["epmd_port"]),
            "RABBITMQ_NODENAME": "volfs@localhost",
            "RABBITMQ_MNESIA_BASE": str(work / "mnesia"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(self.logs),
            "RABBITMQ_CONFIG_FILE": str(self.top / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(work / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(work / "config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(work / "enabled_plugins"),
            "RABBITMQ_DIST_PORT": str(state["erlang_port"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # it becomes the server then, and is no shell that waits for it
        }
