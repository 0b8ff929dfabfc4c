"""What `volfs ls`, `info` and `status` tell, as plain data for JSON and as text for people."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from rich.filesize import decimal

from volfs import catalog
from volfs.api import mount_attribute, path_error
from volfs.backends import is_url
from volfs.backends.base import VolumeInfo
from volfs.control import StatusReply
from volfs.errors import printable

Facts = dict[str, str | int | bool]


def listing(what: str, environment: Mapping[str, str]) -> list[Facts]:
    """One row for each volume or directory of a source prefix, or of a path on a mount."""
    if not is_url(what):
        return _listing_of_path(what)
    return [
        _row(entry.name, entry.size, entry.mtime_ns, entry.read_only)
        if isinstance(entry, VolumeInfo)
        else {"name": entry.name, "type": "directory"}
        for entry in catalog.list_volumes(what, environment)
    ]


def facts(what: str, environment: Mapping[str, str]) -> Facts:
    """All that is known of a volume, named by source or by path on a mount."""
    if not is_url(what):
        prefix = "user.volfs."
        mount_attribute(what, "source")
        keys = sorted(key.removeprefix(prefix) for key in os.listxattr(what) if key.startswith(prefix))
        found: Facts = {"path": os.path.abspath(what)}
        return found | {key: mount_attribute(what, key) for key in keys}
    info, details = catalog.describe_volume(what, environment)
    found = {"source": info.source.url, "driver": info.source.driver, "size": info.size}
    return found | {"read_only": info.read_only, "modified": _time(info.mtime_ns)} | dict(details)


def table(rows: Iterable[Facts]) -> str:
    """Rows of `listing` in columns: size, time of the last change, name; directories end with a slash."""
    lines = []
    for row in rows:
        name = printable(str(row["name"]))
        if row["type"] == "directory":
            lines.append(f"{'-':>10}  {'-':19}  {name}/")
        else:
            mark = "  (read-only)" if row["read_only"] else ""
            lines.append(f"{decimal(int(row['size'])):>10}  {row['modified'] or '-':19}  {name}{mark}")
    return "\n".join(lines)


def lines(found: Facts) -> str:
    """Facts one to a line."""
    return "\n".join(f"{key + ':':14} {printable(str(value))}" for key, value in found.items() if value != "")


def status(reply: StatusReply) -> str:
    """The daemon's answer for people."""
    backends = ", ".join(f"{name} ({driver})" for name, driver in reply.backends.items()) or "none configured"
    text = [f"{reply.mountpoint}: volfs {reply.version}, process {reply.pid}, backends: {backends}"]
    for attached in reply.attached:
        text.append(
            f"  attached/{attached.name}: {attached.source}, {decimal(attached.size)}, {attached.handles} open"
        )
    for volume in reply.open:
        how = "read and write" if volume.writable else "read"
        text.append(f"  open: {volume.source}, {how}, {volume.handles} handles")
    return "\n".join(map(printable, text))


def _listing_of_path(path: str) -> list[Facts]:
    try:
        with os.scandir(path) as entries:
            rows = []
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    rows.append(Facts(name=entry.name, type="directory"))
                else:
                    found = entry.stat()
                    rows.append(_row(entry.name, found.st_size, found.st_mtime_ns, not found.st_mode & 0o222))
            return rows
    except OSError as exc:
        raise path_error(path, exc) from exc


def _row(name: str, size: int, mtime_ns: int, read_only: bool) -> Facts:
    return {"name": name, "type": "volume", "size": size, "modified": _time(mtime_ns), "read_only": read_only}


def _time(mtime_ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(mtime_ns / 1e9)) if mtime_ns else ""
