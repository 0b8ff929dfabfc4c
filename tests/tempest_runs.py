"""Tempest, as an operator runs it, against the private Cinder of scripts/openstack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from openstack import Openstack

SECONDS = 280
PROGRAM = Path(sys.executable).parent / "tempest"

CONFIGURATION = """\
[DEFAULT]
log_file = {directory}/tempest.log
[oslo_concurrency]
lock_path = {directory}/lock
[auth]
admin_username = {env[OS_USERNAME]}
admin_password = {env[OS_PASSWORD]}
admin_project_name = {env[OS_PROJECT_NAME]}
admin_domain_name = Default
[identity]
uri_v3 = {env[OS_AUTH_URL]}
region = {env[OS_REGION_NAME]}
v3_endpoint_type = public
[service_available]
cinder = true
glance = false
neutron = false
nova = false
swift = false
[volume]
catalog_type = block-storage
min_microversion = 3.0
max_microversion = latest
build_interval = 1
build_timeout = 120
backend_names = {backends}
[volume-feature-enabled]
multi_backend = true
backup = false
[volfs]
ceph_backend = ceph
other_backends = {others}
read_command = ceph: rbd export --no-progress volumes/{{name}} -
read_command = local: cat {env[VOLFS_CINDER_LOCAL]}/{{name}}
read_command = san: cat {env[VOLFS_CINDER_SAN]}/{{name}}
write_command = ceph: {python} -m volfs copy --quiet {{file}} rbd:volumes/{{name}}
daemon_socket = {socket}
"""
STESTR = """\
[DEFAULT]
test_path = {tempest}/test_discover
top_dir = {tempest}
group_regex = ([^\\.]*\\.)*
"""


def run(
    cinder: Openstack, directory: Path, regex: str, *, backends: str, others: str, socket: str
) -> list[str]:
    """The tests that passed, by their names; AssertionError with Tempest's output when one failed, or none ran."""
    import tempest

    values = {"directory": directory, "env": cinder.environment, "backends": backends, "others": others}
    configuration = CONFIGURATION.format(**values, socket=socket, python=sys.executable)
    (directory / "tempest.conf").write_text(configuration)
    (directory / "tempest.conf").chmod(0o600)
    (directory / ".stestr.conf").write_text(STESTR.format(tempest=Path(tempest.__file__).parent))
    done = subprocess.run(
        [PROGRAM, "run", "--config-file", "tempest.conf", "--serial", "--regex", regex],
        cwd=directory,
        env={
            **os.environ,
            **cinder.services.environment,
            "PYTHONWARNINGS": "ignore",
            "HOME": str(directory),
            "VOLFS_SOCKET": socket,  # of what writes to volumes
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    told = re.findall(r"^\{\d+\} (\S+) (?:\[[\d.]+s\] )?\.\.\. (\w+)", done.stdout, re.MULTILINE)
    passed = [name.rpartition(".")[2] for name, result in told if result == "ok"]
    assert done.returncode == 0, done.stdout[-20_000:]
    assert passed, done.stdout[-20_000:]
    return passed
