"""What Tempest asks of a plugin: where its tests are, and the options they need, group [volfs] of tempest.conf."""

from __future__ import annotations

import os
from typing import Any

from oslo_config import cfg
from tempest.test_discover import plugins

import volfs

GROUP = cfg.OptGroup("volfs", title="Migrations through volfs, read behind Cinder's back")
OPTIONS = [
    cfg.StrOpt(
        "ceph_backend", help="volume_backend_name of a backend on Ceph. Without it all tests are skipped."
    ),
    cfg.ListOpt(
        "other_backends", default=[], help="volume_backend_name of those to migrate to, and back from."
    ),
    cfg.MultiStrOpt(
        "read_command",
        default=[],
        help="BACKEND: COMMAND that prints the bytes of a volume, straight from the storage, in the place where "
        "Tempest runs. {name} is what the volume is called there, volume-UUID.",
    ),
    cfg.MultiStrOpt(
        "write_command", default=[], help="BACKEND: COMMAND that writes the file {file} to the volume {name}."
    ),
    cfg.StrOpt(
        "daemon_socket",
        help="Control socket of the daemon that cinder-volume uses, to be killed in a test. "
        "Without it that test is skipped.",
    ),
]


class VolfsPlugin(plugins.TempestPlugin):  # type: ignore[misc]
    """Named in the packaging metadata."""

    def load_tests(self) -> tuple[str, str]:
        """The directory of the tests, and the one that has the package."""
        here = os.path.dirname(os.path.abspath(__file__))
        return os.path.join(here, "tests"), os.path.dirname(os.path.dirname(volfs.__file__))

    def register_opts(self, conf: Any) -> None:
        conf.register_group(GROUP)
        conf.register_opts(OPTIONS, group=GROUP)

    def get_opt_lists(self) -> list[tuple[str, list[Any]]]:
        return [(GROUP.name, OPTIONS)]
