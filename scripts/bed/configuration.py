"""What each daemon is told, in files of its own format."""

import base64
import hashlib
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bed.place import BIN, Place
from bed.storage import TOP, services

BACKENDS = ("ceph", "ceph2", "san", "local")
HOST = "volfs"  # in Cinder's names of backends: volfs@ceph#ceph
MARIADB_SETTINGS = """\
skip-name-resolve
innodb_flush_log_at_trx_commit = 0
innodb_doublewrite = 0
sync_binlog = 0
skip-log-bin
performance_schema = off
innodb_buffer_pool_size = 64M
innodb_log_file_size = 16M
innodb_fast_shutdown = 2
max_connections = 300
"""
RABBITMQ_SETTINGS = """\
loopback_users = none
log.console = true
log.console.level = info
disk_free_limit.absolute = 50MB
vm_memory_high_watermark.absolute = 2GB
"""
# What is no matter of place. The intervals are short for tests, which wait for a restarted service to be noticed.
CINDER_SETTINGS = f"""\
host = {HOST}
my_ip = 127.0.0.1
auth_strategy = keystone
osapi_volume_listen = 127.0.0.1
osapi_volume_workers = 1
report_interval = 2
service_down_time = 15
periodic_interval = 5
periodic_fuzzy_delay = 1
backend_stats_polling_interval = 5
rpc_response_timeout = 60
allocated_capacity_weight_multiplier = -1.0
volume_clear = none
backup_driver = cinder.backup.drivers.posix.PosixBackupDriver
backup_compression_algorithm = none
backup_enable_progress_timer = false
backup_ceph_user = volfs
backup_ceph_pool = rbd
rootwrap_config = {TOP}/.venv/etc/cinder/rootwrap.conf
api_paste_config = {TOP}/.venv/etc/cinder/api-paste.ini
resource_query_filters_file = {TOP}/.venv/etc/cinder/resource_filters.json
enabled_backends = {",".join(BACKENDS)}
"""


def database(state: Mapping[str, Any], name: str) -> str:
    return f"mysql+pymysql://volfs:{state['database_password']}@127.0.0.1:{state['mariadb_port']}/{name}"


def transport(state: Mapping[str, Any]) -> str:
    return f"rabbit://volfs:{state['amqp_password']}@127.0.0.1:{state['amqp_port']}//"


def write_configuration(place: Place, state: Mapping[str, Any]) -> None:
    """Anew at each start, for the settings above may have changed. All but cinder.conf."""
    mariadb = place.work("mariadbd")
    files = {
        # The socket lies in the directory that mariadbd works in: a whole path might be too long for one.
        place.top / "my.cnf": (
            f"[mariadbd]\ndatadir = {mariadb}\nsocket = mariadb.sock\nbind-address = 127.0.0.1\n"
            f"port = {state['mariadb_port']}\npid-file = {mariadb}/pid\ninit-file = {place.top}/init.sql\n"
            f"tmpdir = {mariadb}\n{MARIADB_SETTINGS}"
        ),
        place.top / "init.sql": "".join(
            line + ";\n"
            for line in (
                "CREATE DATABASE IF NOT EXISTS keystone CHARACTER SET utf8mb3",
                "CREATE DATABASE IF NOT EXISTS cinder CHARACTER SET utf8mb3",
                "CREATE DATABASE IF NOT EXISTS glance CHARACTER SET utf8mb3",
                "CREATE USER IF NOT EXISTS volfs@'127.0.0.1'",
                f"ALTER USER volfs@'127.0.0.1' IDENTIFIED BY '{state['database_password']}'",
                "GRANT ALL ON *.* TO volfs@'127.0.0.1'",
            )
        ),
        place.top / "rabbitmq.conf": (
            f"listeners.tcp.default = 127.0.0.1:{state['amqp_port']}\n"
            f"default_user = volfs\ndefault_pass = {state['amqp_password']}\n{RABBITMQ_SETTINGS}"
        ),
        place.work("rabbitmq") / "enabled_plugins": "[].\n",
        place.keystone_conf: (
            f"[DEFAULT]\nuse_stderr = true\n[database]\nconnection = {database(state, 'keystone')}\n"
            f"[fernet_tokens]\nkey_repository = {place.top}/fernet-keys\n"
            f"[fernet_receipts]\nkey_repository = {place.top}/fernet-keys\n"
            f"[credential]\nkey_repository = {place.top}/credential-keys\n"
            "[oslo_messaging_notifications]\ndriver = noop\n[cache]\nenabled = false\n"
            # A check of a password takes 2**rounds; it guards test data.
            "[identity]\npassword_hash_rounds = 4\n"
        ),
        place.glance / "glance-api.conf": glance_text(place, state),
        place.backup_conf: "# Written by each `up` of scripts/openstack.\n"
        + helper_text(place.cinder_conf, place.backup_conf),
    }
    for path, text in files.items():
        services.write_whole(path, text, 0o600)
    for name in ("fernet-keys", "credential-keys"):
        # As `keystone-manage fernet_setup` makes them, which takes seconds to load.
        directory = place.top / name
        directory.mkdir(mode=0o700, exist_ok=True)
        for key in ("0", "1"):
            if not (directory / key).exists():
                services.write_whole(
                    directory / key, base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(), 0o600
                )
    drivers = place.python / "cinder_drivers.py"
    drivers.unlink(missing_ok=True)
    drivers.symlink_to(TOP / "tests" / drivers.name)
    for daemon, port in (("keystone", "keystone_port"), ("glance-api", "glance_port")):
        # gunicorn finds this where it works. As arguments Keystone would take them for its own.
        application = f"{daemon.partition('-')[0]}.wsgi.api:application"
        services.write_whole(
            place.work(daemon) / "gunicorn.conf.py",
            f"bind = '127.0.0.1:{state[port]}'\nworkers, threads = 1, 4\n"
            f"wsgi_app = '{application}'\ncontrol_socket_disable = True\n",
        )
    (place.top / "targets.conf").write_text(f"include {place.targets}/*\n")
    services.write_whole(
        place.bin / "tgt-admin",
        # Cinder has no option for the file that tgt-admin reads.
        f'#!/bin/sh\nexec {shutil.which("tgt-admin")} --conf {shlex.quote(str(place.top / "targets.conf"))} "$@"\n',
        0o700,
    )


def authentication_text(state: Mapping[str, Any]) -> str:
    """How a service asks Keystone who its users are."""
    keystone = f"http://127.0.0.1:{state['keystone_port']}"
    return f"""\
[keystone_authtoken]
www_authenticate_uri = {keystone}
auth_url = {keystone}/v3
auth_type = password
username = admin
password = {state["admin_password"]}
project_name = admin
user_domain_id = default
project_domain_id = default
service_token_roles_required = true
"""


def glance_text(place: Place, state: Mapping[str, Any]) -> str:
    return f"""\
# Written by each `up` of scripts/openstack.
[DEFAULT]
use_stderr = true
enabled_backends = files:file
[database]
connection = {database(state, "glance")}
[glance_store]
default_backend = files
[files]
filesystem_store_datadir = {place.images}
[os_glance_staging_store]
filesystem_store_datadir = {place.glance}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {place.glance}/tasks
[paste_deploy]
flavor = keystone
config_file = {TOP}/.venv/etc/glance/glance-api-paste.ini
[oslo_concurrency]
lock_path = {place.glance}/lock
[oslo_messaging_notifications]
driver = noop
{authentication_text(state)}"""


def helper_text(*files: Path) -> str:
    """Privileged helpers are children of a process that is root already: no sudo, which would drop the environment,
    and no rootwrap, whose filters look in /etc.
    """
    helper = " ".join((f"{BIN}/privsep-helper", *(f"--config-file {file}" for file in files)))
    return "".join(
        f"[{group}]\nhelper_command = {helper}\n" for group in ("cinder_sys_admin", "privsep_osbrick")
    )


def backend_sections(place: Place, state: Mapping[str, Any], iscsi_port: int) -> str:
    lines = []
    for name, pool in (("ceph", "volumes"), ("ceph2", "rbd")):
        lines += [
            f"[{name}]",
            f"volume_backend_name = {name}",
            "volume_driver = cinder.volume.drivers.rbd.RBDDriver",
            f"rbd_pool = {pool}",
            f"rbd_cluster_name = {state['cluster']}",
            f"rbd_ceph_conf = {place.services.conf}",
            "rbd_user = volfs",
            f"rbd_secret_uuid = {state['secret_uuid']}",
        ]
    lines += [
        "[san]",
        "volume_backend_name = san",
        "volume_driver = cinder_drivers.San",
        f"volfs_test_directory = {place.san}",
        "target_helper = tgtadm",
        "target_ip_address = 127.0.0.1",
        f"target_port = {iscsi_port}",
        "target_prefix = iqn.2026-01.org.volfs:",
        f"volumes_dir = {place.targets}",
        "[local]",
        "volume_backend_name = local",
        "volume_driver = cinder_drivers.Local",
        f"volfs_test_directory = {place.local}",
    ]
    return "\n".join(lines) + "\n"


def settings_text(settings: list[str]) -> str:
    """[GROUP.]OPTION=VALUE; of an option that is there twice the last one counts."""
    text = ""
    for setting in settings:
        option, value = setting.split("=", 1)
        group, _, name = option.rpartition(".")
        text += f"[{group or 'DEFAULT'}]\n{name} = {value}\n"
    return text


def cinder_text(place: Place, state: Mapping[str, Any], iscsi_port: int) -> str:
    return f"""\
# Written by each `up` of scripts/openstack.
[DEFAULT]
{CINDER_SETTINGS}\
state_path = {place.top}/cinder
transport_url = {transport(state)}
osapi_volume_listen_port = {state["cinder_port"]}
backup_posix_path = {place.backups}
backup_ceph_conf = {place.services.conf}
# Not by the catalogue: who has logged in before Glance was there has one without it.
glance_api_servers = http://127.0.0.1:{state["glance_port"]}
[database]
connection = {database(state, "cinder")}
[oslo_concurrency]
lock_path = {place.top}/cinder/lock
[oslo_messaging_notifications]
driver = noop
{authentication_text(state)}\
{helper_text(place.cinder_conf)}\
{backend_sections(place, state, iscsi_port)}"""


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
