"""All of Cinder in one process: API, scheduler, and a cinder-volume for each backend, as its functional tests have it.

    python tests/cinder_in_one.py --config-file cinder.conf

What is between the services is in this process, too (transport_url = fake://), so neither a message bus nor a
database server nor Keystone has to be started; all else is Cinder's own, and its configuration an ordinary
cinder.conf. It serves the API until it is killed. cinder_guest.py starts it; no test imports it.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

warnings.simplefilter("ignore")  # of what Cinder's libraries will not have in future versions
from cinder import monkey_patch

monkey_patch.patch()  # before anything else is imported, as in each of Cinder's own programs

import eventlet
import os_brick
from cinder import objects

objects.register_all()

from cinder import privsep, service, version
from cinder.cmd import rtstool
from cinder.common import config  # noqa: F401 - Cinder's options
from cinder.db import migration
from cinder.volume import manager
from cinder.volume.targets import lio
from os_brick import privileged
from os_brick.initiator import connector
from oslo_config import cfg
from oslo_log import log

CONF = cfg.CONF


def main() -> None:
    CONF(sys.argv[1:], project="cinder", version=version.version_string())
    log.setup(CONF, "cinder")
    os_brick.setup(CONF)
    spare_programs()
    manager.time = Time()
    migration.db_sync()
    # The scheduler comes first, to hear what the backends can do, and waits for the last of them.
    scheduler = service.Service.create(binary="cinder-scheduler")
    starting = eventlet.spawn(scheduler.start)
    services = [scheduler, *start_backends()]
    starting.wait()
    api = service.WSGIService("osapi_volume")
    services.append(api)
    api.start()
    eventlet.event.Event().wait()


def spare_programs() -> None:
    """In the guest each takes a second to start, and a migration runs dozens of them."""
    # This process is root's, and needs no helper that is.
    for context in (privsep.sys_admin_pctxt, privileged.default, privileged.brick_privsep_hide_output):
        context.set_client_mode(False)
    lio.LioAdm._execute = staticmethod(run_rtstool)
    subprocess.Popen = Popen
    # The others look for Fibre Channel and NVMe at each attach.
    wanted = ("BaseLinuxConnector", "ISCSIConnector")
    connector.unix_connector_list = [name for name in connector.unix_connector_list if name.endswith(wanted)]


class Time:
    """For Cinder's manager, which looks for a migration's new volume after 1, 4 and 9 seconds."""

    time = staticmethod(time.time)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, 1))


class Popen(subprocess.Popen):
    """Without a function between fork and exec, for which the whole of this process has to be copied."""

    def __init__(self, *command: Any, preexec_fn: Any = None, **how: Any) -> None:
        super().__init__(*command, **how)


def run_rtstool(*command: object, **how: object) -> tuple[str, str]:
    """The program cinder-rtstool, in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        rtstool.main([str(word) for word in command])
    return output.getvalue(), ""


def start_backends() -> Iterator[service.Service]:
    for backend in CONF.enabled_backends:
        CONF.register_opt(cfg.StrOpt("backend_host"), group=backend)  # as cinder-volume does
        made = service.Service.create(
            host=f"{CONF.host}@{backend}", service_name=backend, binary="cinder-volume", coordination=True
        )
        made.start()
        yield made


if __name__ == "__main__":
    main()
