"""The group [volfs] of cinder.conf."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg, types

GROUP = "volfs"
COPIES, IMAGES, BACKUPS = "copies", "images", "backups"
DD, VOLFS = "dd", "volfs"
FAIL, STOCK = "fail", "stock"

OPTIONS = [
    cfg.StrOpt(
        "socket", help="Control socket of the volfs daemon; by default the one of this service's user."
    ),
    cfg.StrOpt(
        "config_file",
        help="volfs.toml for a daemon that is started on demand. It needs allow_other in its table [mount] when this "
        "service does not run as root, since dd does.",
    ),
    cfg.BoolOpt(
        "start_daemon",
        default=True,
        help="Start a daemon, as this service's user, when none answers. It ends by itself when it is not used.",
    ),
    cfg.StrOpt(
        "without_daemon",
        default=FAIL,
        choices=[
            (FAIL, "the operation fails, and nothing has happened to the volumes"),
            (STOCK, "the volume is attached as if volfs were not there"),
        ],
        help="What to do when no daemon answers and none can be started.",
    ),
    cfg.ListOpt(
        "protocols",
        default=["rbd", "iscsi"],
        help="Volumes of which driver_volume_type are attached by volfs; of others os-brick's own way.",
    ),
    cfg.ListOpt(
        "use_for",
        item_type=types.String(choices=[COPIES, IMAGES, BACKUPS]),
        default=[COPIES],
        help="What volumes are attached by volfs for: copies between volumes (migration, retype, generic revert), "
        "images (upload and download, where the driver attaches volumes for that, or is Ceph's), backups (needs "
        "backup_manager).",
    ),
    cfg.StrOpt(
        "copy_method",
        default=DD,
        choices=[
            (DD, "Cinder's own, throttled if so configured"),
            (VOLFS, "volfs copy, which reads no holes"),
        ],
        help="How the data of volumes that are both attached as files or devices is copied.",
    ),
    cfg.BoolOpt(
        "verify",
        default=False,
        help="Read both volumes again after the copy, and compare. For copy_method volfs.",
    ),
    cfg.FloatOpt(
        "detach_timeout",
        default=60.0,
        min=0,
        help="For how many seconds a program that still has a volume open is waited for.",
    ),
]


def register(conf: Any) -> Any:
    """The group's values, in a configuration that may know it already."""
    conf.register_opts(OPTIONS, group=GROUP)
    return conf[GROUP]


def list_opts() -> list[tuple[str, list[Any]]]:
    """Entry point of oslo.config.opts, for its sample generator and validator."""
    return [(GROUP, OPTIONS)]
