"""volfs.toml, mount options and prefixes into typed settings. Every mistake names file, key and what was expected."""

from __future__ import annotations

import grp
import math
import os
import pwd
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from volfs.attached import check_name
from volfs.backends import DRIVERS, backend_class
from volfs.backends.base import Backend, Settings
from volfs.errors import ConfigError, SourceError
from volfs.source import parse_prefix

T = TypeVar("T")

RESERVED = "attached"
ID_END = (1 << 32) - 1  # of user and group numbers; this one means "none" to the kernel


class MountSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the files look, and to whom. Table [mount] of volfs.toml, or `-o`."""

    uid: int | str | None = None  # number or name; the daemon's own by default
    gid: int | str | None = None
    mode: str = "0600"  # of a volume's file, octal; not a number: TOML's 440 would be 0670
    allow_other: bool = False
    read_only: bool = False
    read_ahead: int = 8 << 20  # bytes the kernel reads ahead of a sequential reader; set when root

    def resolve_uid(self) -> int:
        return _resolve(self.uid, os.geteuid(), "uid", lambda name: pwd.getpwnam(name).pw_uid)

    def resolve_gid(self) -> int:
        return _resolve(self.gid, os.getegid(), "gid", lambda name: grp.getgrnam(name).gr_gid)

    def resolve_mode(self) -> int:
        try:
            mode = int(self.mode, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            raise ConfigError(f'mount.mode: expected octal permissions such as "0640", not {self.mode!r}')
        return mode


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon serves, and how."""

    mount: MountSettings = MountSettings()
    backends: dict[str, tuple[str, Settings]] = {}  # name: driver and its settings

    def make_backends(self) -> dict[str, Backend]:
        """The backends, not connected yet. Call it on the trio loop."""
        return {
            name: backend_class(driver)(name, settings) for name, (driver, settings) in self.backends.items()
        }


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    mount: MountSettings = MountSettings()
    backends: dict[str, Any] = {}


def load(path: str) -> Config:
    """Read a volfs.toml. ConfigError."""
    try:
        with open(path, "rb") as file:
            text = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"{path or repr(path)}: {exc.strerror}", exc.errno) from exc
    except (ValueError, RecursionError) as exc:  # also of numbers beyond all measure, and of endless brackets
        raise ConfigError(f"{path}: not TOML: {exc}") from exc
    try:
        file_settings = _convert(text, _File, "")
        backends = {
            name: _backend(name, table, f"backends.{name}") for name, table in file_settings.backends.items()
        }
        _check_mount(file_settings.mount)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return Config(mount=file_settings.mount, backends=backends)


def exposed_secrets(path: str, config: Config) -> list[str]:
    """One line for each file that others may read: the configuration itself, and those it names, if with a secret."""
    holders: dict[str, list[str]] = {}  # file: the keys
    for name, (_, settings) in config.backends.items():
        for key in settings.secrets():
            holders.setdefault(path, []).append(f"backends.{name}.{key}")
        for key in settings.secret_paths:
            for file in _paths(settings, key):
                holders.setdefault(file, []).append(f"backends.{name}.{key}")
    return [
        f"{file}: {who} may read the secret of {', '.join(keys)}: chmod 600 {shlex.quote(file)}"
        for file, keys in holders.items()
        if (who := _other_readers(file))
    ]


def _other_readers(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # whoever needs it will say so
        return ""
    if status.st_mode & stat.S_IROTH:
        return "everybody"
    # A group may be how we read somebody else's file; of our own it means others.
    return "its group" if status.st_mode & stat.S_IRGRP and status.st_uid == os.geteuid() else ""


def add_prefixes(config: Config, prefixes: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The configuration with a backend for each source prefix, named after its driver (`rbd`, `rbd-2`, ...).

    Prefixes of one driver that differ only in the pools or targets they name still become a backend each.
    SourceError.
    """
    backends = dict(config.backends)
    for prefix in prefixes:
        driver, settings, _ = parse_prefix(prefix, environment)
        names = (driver if number == 1 else f"{driver}-{number}" for number in range(1, len(backends) + 2))
        backends[next(name for name in names if name not in backends)] = (driver, settings)
    return msgspec.structs.replace(config, backends=backends)


def add_options(config: Config, options: str) -> Config:
    """The configuration with mount(8)'s kind of options: `allow_other,ro,uid=1000,mode=0640`. ConfigError."""
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if option in ("ro", "rw"):
            values["read_only"] = option == "ro"
        elif key in ("uid", "gid", "mode", "read_ahead") and equals:
            values[key] = int(value) if re.fullmatch(r"\d{1,18}", value) and key != "mode" else value
        elif option in ("allow_other", "read_only"):
            values[option] = True
        else:
            raise ConfigError(
                f"-o {option}: expected allow_other, ro, rw, uid=, gid=, mode= or read_ahead=, separated by commas"
            )
    table = msgspec.to_builtins(config.mount) | values
    mount = _convert({"mount": table}, _File, "").mount
    _check_mount(mount)
    return msgspec.structs.replace(config, mount=mount)


def _check_mount(mount: MountSettings) -> None:
    mount.resolve_uid()
    mount.resolve_gid()
    mount.resolve_mode()
    if not 0 <= mount.read_ahead <= 1 << 30:
        raise ConfigError(f"mount.read_ahead: expected 0 to 1 GiB in bytes, not {mount.read_ahead}")


def _backend(name: str, table: Any, where: str) -> tuple[str, Settings]:
    try:
        check_name(name)
    except SourceError as exc:
        raise ConfigError(f"{where}: {exc}") from exc
    if name == RESERVED:
        raise ConfigError(
            f"{where}: expected another name; {RESERVED!r} is the directory of attached volumes"
        )
    table = _convert(table, dict[str, Any], where)
    driver = table.get("driver")
    if not isinstance(driver, str) or driver not in DRIVERS:
        raise ConfigError(f"{where}.driver: expected one of {', '.join(DRIVERS)}, not {driver!r}")
    rest = {key: value for key, value in table.items() if key != "driver"}
    settings = _convert(rest, backend_class(driver).settings_type, where + ".")
    if not 0 < settings.timeout < math.inf:
        raise ConfigError(f"{where}.timeout: expected seconds above 0, not {settings.timeout:g}")
    for key in settings.paths:
        # A daemon in the background has another working directory than whoever started it.
        if not all(os.path.isabs(path) and "\0" not in path for path in _paths(settings, key)):
            raise ConfigError(f"{where}.{key}: expected an absolute path, not {getattr(settings, key)!r}")
    return driver, settings


def _paths(settings: Settings, key: str) -> list[str]:
    text = getattr(settings, key)
    return text.split(",") if text else []


def _convert(value: Any, kind: type[T], where: str) -> T:
    """msgspec.convert, with its errors in our words: `Expected `int`, got `str` - at `$.mount.uid``."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        text, _, path = str(exc).partition(" - at ")
        key = path.strip("`").removeprefix("$").lstrip(".")
        text = text[0].lower() + text[1:].replace("`", "")
        if unknown := re.fullmatch(r"object contains unknown field (.*)", text):
            key = ".".join(filter(None, (key, unknown[1])))
            text = "unknown key"
        elif missing := re.fullmatch(r"object missing required field (.*)", text):
            key = ".".join(filter(None, (key, missing[1])))
            text = "missing"
        elif own := re.fullmatch(r"(\w+): (.*)", text, re.DOTALL):  # of a driver's __post_init__
            key, text = ".".join(filter(None, (key, own[1]))), own[2]
        place = (where + key).strip(".")
        raise ConfigError(f"{place}: {text}" if place else text) from exc


def _resolve(value: int | str | None, default: int, key: str, look_up: Callable[[str], int]) -> int:
    if value is None:
        return default
    try:
        number = int(value) if isinstance(value, int) or value.isdecimal() else look_up(value)
    except (KeyError, ValueError):
        number = -1
    if not 0 <= number < ID_END:
        raise ConfigError(f"mount.{key}: expected a number or the name of one there is, not {value!r}")
    return number
