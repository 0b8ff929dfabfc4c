"""What names a LUN, and what an operator may say of an iSCSI backend: URLs, connection infos, settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal
from urllib.parse import quote, unquote

import msgspec

from volfs.backends.base import Source
from volfs.backends.brick_target import ConnectorSettings
from volfs.backends.iscsi_login import normal_portal
from volfs.errors import SourceError

SYNTAX = "iscsi://[USER%PASSWORD@]ADDRESS[:PORT]/TARGET/LUN"
LONGEST_NAME = 223  # of a target or initiator (RFC 7143 4.2.7.1)
LONGEST_TEXT = 255  # that libiscsi takes
ACCOUNT_VARIABLES = ("USERNAME", "PASSWORD", "TARGET_USERNAME", "TARGET_PASSWORD")  # after LIBISCSI_CHAP_
CONNECTION = "connection info of type iscsi: data."
LUNS = 1 << 16  # what one level of addressing can tell apart


class Secret(str):
    """A password: a str for the library that needs it, `***` where it is shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"


class IscsiSource(Source, frozen=True, kw_only=True):
    """A LUN of a target. The portals lead to the same target; they are tried in order.

    `paths` are all ways to the volume when a connection info tells of several that differ in target or LUN: only the
    kernel, with multipath above it, can use these as one disk. `multipath`: it demands that.
    """

    driver: ClassVar[str] = "iscsi"
    portals: tuple[str, ...]  # "address:port"
    iqn: str
    lun: int
    # Accounts as in IscsiSettings; "" when the backend's own, or none, is meant.
    chap_username: str = ""
    chap_password: str = ""
    mutual_chap_username: str = ""
    mutual_chap_password: str = ""
    paths: tuple[tuple[str, str, int], ...] = ()  # portal, target, LUN
    multipath: bool = False

    def __post_init__(self) -> None:
        _hide(self, "chap_password")
        _hide(self, "mutual_chap_password")

    @property
    def alternatives(self) -> tuple[IscsiSource, ...]:
        """The volume by each target that leads to it, this one first, for who can follow one target at a time."""
        groups: dict[tuple[str, int], list[str]] = {(self.iqn, self.lun): list(self.portals)}
        for portal, iqn, lun in self.paths:
            portals = groups.setdefault((iqn, lun), [])
            if portal not in portals:
                portals.append(portal)
        return tuple(
            msgspec.structs.replace(self, portals=tuple(portals), iqn=iqn, lun=lun)
            for (iqn, lun), portals in groups.items()
        )

    @property
    def url(self) -> str:
        return f"iscsi://{self.portals[0]}/{quote(self.iqn, safe=':')}/{self.lun}"

    @property
    def name(self) -> str:
        return f"{self.iqn}-lun-{self.lun}"


class IscsiSettings(ConnectorSettings, frozen=True, kw_only=True):
    """A backend of driver `iscsi`. What a connector needs is for the kernel's initiator."""

    secret_paths = ("chap_password_file", "mutual_chap_password_file")
    paths = (*ConnectorSettings.paths, *secret_paths)

    portals: tuple[str, ...]  # "address[:port]", IPv6 in brackets; several are tried in order
    targets: tuple[str, ...] = ()  # the names to show; all that the portals offer when empty
    initiator_name: str = ""  # by default that of open-iscsi, whom the storage knows this machine by
    chap_username: str = ""
    chap_password: str = ""
    chap_password_file: str = ""
    mutual_chap_username: str = ""  # by which the target proves itself
    mutual_chap_password: str = ""
    mutual_chap_password_file: str = ""
    header_digest: Literal["none", "prefer", "crc32c"] = "none"
    reconnect_timeout: float = 30.0  # seconds that requests wait for a broken connection to be made again
    queue_depth: int = 32  # commands under way for one volume
    # Who opens volumes: this process, or the kernel through os-brick. By default this process, but for connection
    # infos that ask for multipath.
    initiator: Literal["user", "kernel"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # ValueErrors: msgspec turns them into its own error, with the key's path.
        if not self.portals:
            raise ValueError("portals: expected at least one")
        try:
            portals = tuple(normal_portal(portal) for portal in self.portals)
        except ValueError as exc:
            raise ValueError(f"portals: {exc}") from None
        msgspec.structs.force_setattr(self, "portals", portals)
        for key, names in (("targets", self.targets), ("initiator_name", (self.initiator_name,))):
            for name in names:
                if name and not is_iscsi_name(name):
                    raise ValueError(
                        f"{key}: {name!r}: expected an iSCSI name such as iqn.2026-01.org.example:disk"
                    )
        for prefix in ("chap", "mutual_chap"):
            user, password, file = (getattr(self, f"{prefix}_{key}") for key in _ACCOUNT)
            if bool(user) != bool(password or file) or (password and file):
                raise ValueError(
                    f"{prefix}_username: expected together with {prefix}_password or {prefix}_password_file"
                )
            if not _is_text(user) or not _is_text(password):
                raise ValueError(f"{prefix}_username: expected at most {LONGEST_TEXT} bytes of text")
            _hide(self, f"{prefix}_password")
        if self.mutual_chap_username and not self.chap_username:
            raise ValueError("mutual_chap_username: expected together with chap_username")
        if self.queue_depth < 1:
            raise ValueError("queue_depth: expected at least 1")
        if self.initiator == "kernel":
            for key in ("initiator_name", "mutual_chap_username"):
                if getattr(self, key):
                    raise ValueError(
                        f'{key}: expected none with initiator = "kernel", which os-brick logs in'
                    )
            if self.header_digest != "none":
                raise ValueError(
                    'header_digest: expected "none" with initiator = "kernel", which os-brick logs in'
                )

    def secrets(self) -> Sequence[str]:
        return [key for key in ("chap_password", "mutual_chap_password") if getattr(self, key)]


_ACCOUNT = ("username", "password", "password_file")


def parse_url(rest: str, environment: Mapping[str, str]) -> IscsiSource:
    """The source of `iscsi:<rest>`. SourceError, whose message shows nothing of the account."""
    portal, account, path = _split_url(rest, environment, SYNTAX)
    match = re.fullmatch(r"([^/]+)/(\d{1,5})", path, re.ASCII)
    if match is None:
        raise _bad_url(portal, path, SYNTAX)
    iqn, lun = unquote(match[1]), int(match[2])
    if not is_iscsi_name(iqn) or lun >= LUNS:
        raise _bad_url(portal, path, f"{SYNTAX}, with the target's iSCSI name and a LUN below {LUNS}")
    return IscsiSource(
        portals=(portal,),
        iqn=iqn,
        lun=lun,
        chap_username=account[0],
        chap_password=account[1],
        mutual_chap_username=account[2],
        mutual_chap_password=account[3],
    )


def parse_prefix(rest: str, environment: Mapping[str, str]) -> tuple[IscsiSettings, tuple[str, ...]]:
    """The settings of a backend for `iscsi://PORTAL[/TARGET]`, and the directory in it. SourceError."""
    syntax = "iscsi://[USER%PASSWORD@]ADDRESS[:PORT][/TARGET]"
    portal, account, path = _split_url(rest, environment, syntax)
    iqn = unquote(path.removesuffix("/"))
    if iqn and not is_iscsi_name(iqn):
        raise _bad_url(portal, path, f"{syntax}, with the target's iSCSI name")
    directory = (iqn,) if iqn else ()
    settings = IscsiSettings(
        portals=(portal,),
        targets=directory,
        chap_username=account[0],
        chap_password=account[1],
        mutual_chap_username=account[2],
        mutual_chap_password=account[3],
    )
    return settings, directory


def parse_connection(data: Mapping[str, Any]) -> IscsiSource:
    """The source of a Cinder connection info's data. SourceError naming the field.

    With several paths (`target_portals`, `target_iqns`, `target_luns`) the portals are those that lead to the same
    target and LUN as the first: a source has one name. All are its `paths` when others differ. What does not matter to
    a reader of blocks is ignored: `discard`, `qos_specs`; also `encrypted`, as the bytes are shown as they are.
    """
    portals = _list(data, "target_portals", str) or [_field(data, "target_portal", str)]
    iqns = _list(data, "target_iqns", str) or [_field(data, "target_iqn", str)] * len(portals)
    luns = _list(data, "target_luns", int) or [_field(data, "target_lun", int)] * len(portals)
    if not len(portals) == len(iqns) == len(luns):
        raise _bad("target_portals", "as many as target_iqns and target_luns", f"{len(portals)}")
    paths = list(zip(portals, iqns, luns, strict=True))
    for key in ("target_portal", "target_iqn", "target_lun"):
        if data.get(key) is not None:
            _field(data, key, int if key == "target_lun" else str)
    for _, iqn, lun in reversed(paths):  # the first, which names the volume, is left at the end
        if not is_iscsi_name(iqn):
            raise _bad("target_iqn", "an iSCSI name", repr(iqn))
        if not 0 <= lun < LUNS:
            raise _bad("target_lun", f"a number below {LUNS}", str(lun))
    normal = _normal_paths(paths)
    chosen = tuple(dict.fromkeys(portal for portal, *other in normal if other == [iqn, lun]))
    username = password = ""
    method = data.get("auth_method")
    if method == "CHAP":
        username, password = (_field(data, key, str) for key in ("auth_username", "auth_password"))
        if not username or not password or not _is_text(username) or not _is_text(password):
            raise SourceError(f"{CONNECTION}auth_password: expected user and password of CHAP")
    elif method not in (None, "", "None"):
        raise _bad("auth_method", "CHAP", repr(method))
    return IscsiSource(
        portals=chosen,
        iqn=iqn,
        lun=lun,
        chap_username=username,
        chap_password=password,
        read_only=data.get("access_mode") == "ro",
        paths=normal if any(other != [iqn, lun] for _, *other in normal) else (),
        # Cinder hands on what the caller's connector has said; see os-brick's check_multipath.
        multipath=bool(data.get("enforce_multipath")),
    )


def _normal_paths(paths: Sequence[tuple[str, str, int]]) -> tuple[tuple[str, str, int], ...]:
    try:
        return tuple((normal_portal(portal), iqn, lun) for portal, iqn, lun in paths)
    except ValueError as exc:
        raise SourceError(f"{CONNECTION}target_portal: {exc}") from None


def is_iscsi_name(name: str) -> bool:
    """Whether it may be the name of a target or initiator (RFC 7143 4.2.7). It is one path component, too."""
    return (
        re.fullmatch(r"(iqn|eui|naa)\.[^\s/@]+", name) is not None
        and name.isprintable()
        and len(name.encode()) <= LONGEST_NAME
    )


def _split_url(
    rest: str, environment: Mapping[str, str], syntax: str
) -> tuple[str, tuple[str, str, str, str], str]:
    """Portal, account and what follows. libiscsi's variables give what of the account the URL does not."""
    # No name after the account has an "@", and a password may have anything, as libiscsi decodes nothing in it.
    account, at, place = rest.removeprefix("//").rpartition("@")
    address, _, path = place.partition("/")
    values = [environment.get(f"LIBISCSI_CHAP_{key}", "") for key in ACCOUNT_VARIABLES]
    if at:
        user, percent, password = account.partition("%")
        values[:2] = user, password if percent else values[1]
        if not all(values[:2]):
            raise _bad_url(address, path, f"{syntax}, with user and password before the @")
    for first in (
        2,
        0,
    ):  # half an account is none, and mutual CHAP needs the other direction (RFC 7143 12.1.3)
        if not all(values[: first + 2]):
            values[first:] = [""] * (4 - first)
    if not all(map(_is_text, values)):
        raise _bad_url(address, path, f"at most {LONGEST_TEXT} bytes of text for CHAP")
    try:
        if not rest.startswith("//"):
            raise ValueError
        portal = normal_portal(address)
    except ValueError:
        raise _bad_url(address, path, syntax) from None
    user, password, target_user, target_password = values
    return portal, (user, password, target_user, target_password), path


def _bad_url(address: str, path: str, expected: str) -> SourceError:
    url = f"iscsi://{address}/{path}"
    return SourceError(f"{url if url.isprintable() else ascii(url)}: expected {expected}")


def _is_text(value: str) -> bool:
    """Whether libiscsi takes it as a user name or secret: it would cut off what is longer."""
    return value.isprintable() and len(value.encode()) <= LONGEST_TEXT


def _bad(key: str, expected: str, got: str) -> SourceError:
    return SourceError(f"{CONNECTION}{key}: expected {expected}, not {got}")


def _field(data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(key, "a number" if kind is int else "text", type(value).__name__)
    return value


def _list(data: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = data.get(key)
    if values is None:
        return []
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    ):
        raise _bad(key, f"a list of {'numbers' if kind is int else 'texts'}", type(values).__name__)
    return list(values)


def _hide(struct: msgspec.Struct, key: str) -> None:
    """Make a field a Secret. msgspec decodes only plain str, and repr() shows what the field shows."""
    msgspec.structs.force_setattr(struct, key, Secret(getattr(struct, key)))
