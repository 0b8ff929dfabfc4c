"""volfs.toml, mount options and prefixes: what is accepted, and what each mistake is told by."""

from __future__ import annotations

import errno
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from volfs.backends.file import FileSettings
from volfs.backends.rbd import RbdSettings
from volfs.config import Config, MountSettings, add_options, add_prefixes, load
from volfs.errors import ConfigError, SourceError

KEY = "AQDoSekretSekretSekretSekretSekretSekretA=="

GOOD = """
[mount]
uid = 1000
gid = 0
mode = "0640"
allow_other = true
read_only = true
read_ahead = 131072

[backends.ceph]
driver = "rbd"
conf = "/etc/ceph/prod.conf"
id = "volfs"
pools = ["volumes", "images"]
timeout = 5

[backends.raw]
driver = "file"
path = "/srv/raw"
resize = true

[backends.disks]
driver = "block"
devices = ["/dev/sdb"]
read_only = true

[backends.san]
driver = "iscsi"
portals = ["10.0.0.1"]
"""

LoadToml = Callable[[str | bytes], Config]


@pytest.fixture
def load_toml(tmp_path: Path) -> LoadToml:
    """Write a volfs.toml and load it."""

    def write(text: str | bytes) -> Config:
        path = tmp_path / "volfs.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(str(path))

    return write


@pytest.fixture
def refused(load_toml: LoadToml, tmp_path: Path) -> Callable[[str | bytes], str]:
    """What is said of a volfs.toml that cannot be used, after the file's name."""

    def refuse(text: str | bytes) -> str:
        with pytest.raises(ConfigError) as caught:
            load_toml(text)
        file, _, message = str(caught.value).partition(": ")
        assert (file, caught.value.errno) == (str(tmp_path / "volfs.toml"), errno.EINVAL)
        assert message.isprintable()
        return message

    return refuse


def backend(lines: str, driver: str = "file") -> str:
    return f'[backends.b]\ndriver = "{driver}"\n{lines}'


# What is accepted


def test_everything(load_toml: LoadToml) -> None:
    config = load_toml(GOOD)
    assert config.mount == MountSettings(
        uid=1000, gid=0, mode="0640", allow_other=True, read_only=True, read_ahead=128 << 10
    )
    assert config.mount.resolve_mode() == 0o640
    assert {name: driver for name, (driver, _) in config.backends.items()} == {
        "ceph": "rbd",
        "raw": "file",
        "disks": "block",
        "san": "iscsi",
    }
    assert config.backends["ceph"][1] == RbdSettings(
        conf="/etc/ceph/prod.conf", id="volfs", pools=("volumes", "images"), timeout=5.0
    )
    assert config.backends["raw"][1] == FileSettings(path="/srv/raw", resize=True)


def test_nothing(load_toml: LoadToml) -> None:
    config = load_toml("")
    assert config == Config()
    assert (config.mount.resolve_uid(), config.mount.resolve_gid()) == (os.geteuid(), os.getegid())
    assert config.mount.resolve_mode() == 0o600


@pytest.mark.parametrize(
    ("mode", "number"), [('"0640"', 0o640), ('"640"', 0o640), ('"0o640"', 0o640), ('"0"', 0)]
)
def test_mode(load_toml: LoadToml, mode: str, number: int) -> None:
    assert load_toml(f"[mount]\nmode = {mode}").mount.resolve_mode() == number


@pytest.mark.parametrize(("uid", "number"), [('"root"', 0), ('"0"', 0), ('"1000"', 1000), ("65534", 65534)])
def test_uid_and_gid(load_toml: LoadToml, uid: str, number: int) -> None:
    mount = load_toml(f"[mount]\nuid = {uid}\ngid = {uid}").mount
    assert (mount.resolve_uid(), mount.resolve_gid()) == (number, number)


@pytest.mark.parametrize("path", ["/srv/raw/", "/srv//raw", "//srv/raw", "/srv/./x/../raw"])
def test_a_directory_may_be_written_in_many_ways(load_toml: LoadToml, path: str) -> None:
    """A backend serves sources whose directory is its own, so both have to be of one form."""
    for driver in ("file", "block"):
        _, found = load_toml(backend(f'path = "{path}"', driver)).backends["b"]
        assert found.path == "/srv/raw"


def test_settings_do_not_show_their_secrets(load_toml: LoadToml) -> None:
    config = load_toml(backend(f'key = "{KEY}"', "rbd"))
    assert config.backends["b"][1].key == KEY
    assert KEY not in f"{config!r} {config.backends['b']!r} {config.backends['b'][1]}"


# Mistakes


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "none.toml"))
    assert str(caught.value) == f"{tmp_path}/none.toml: No such file or directory"
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ConfigError, match=r": Is a directory$"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "[mount",
        "mount = ",
        "x",
        "a = 1\na = 2",
        b"\xff\xfe",
        b"# \xff",
        "\0",
        "[mount]\nx = 2026-13-45",
        "x = " + "9" * 5000,
        "x = " + "[" * 5000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_not_toml(refused: Callable[[str | bytes], str], text: str | bytes) -> None:
    assert refused(text).startswith("not TOML: ")


def test_not_toml_tells_the_line(refused: Callable[[str], str]) -> None:
    assert "line 3" in refused("[mount]\nuid = 0\ngid =\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mountpoint = '/x'", "mountpoint: unknown key"),
        ("mount = 5", "mount: expected object, got int"),
        ("[mount]\nuuid = 5", "mount.uuid: unknown key"),
        ("[mount]\nallow_other = 1", "mount.allow_other: expected bool, got int"),
        ("[mount]\nread_ahead = '8M'", "mount.read_ahead: expected int, got str"),
        (
            "[mount]\nread_ahead = -1",
            "mount.read_ahead: expected 0 to 1 GiB in bytes, not -1",
        ),
        (
            "[mount]\nread_ahead = 9999999999",
            "mount.read_ahead: expected 0 to 1 GiB in bytes, not 9999999999",
        ),
        ("[mount]\nuid = 1.5", "mount.uid: expected int | str | null, got float"),
        (
            "[mount]\nuid = 'no such user'",
            "mount.uid: expected a number or the name of one there is, not 'no such user'",
        ),
        (
            "[mount]\ngid = 'no such group'",
            "mount.gid: expected a number or the name of one there is, not 'no such group'",
        ),
        (
            '[mount]\nuid = "a\\u0000b"',
            r"mount.uid: expected a number or the name of one there is, not 'a\x00b'",
        ),
        ("[mount]\nuid = -1", "mount.uid: expected a number or the name of one there is, not -1"),
        (
            "[mount]\ngid = 4294967295",
            "mount.gid: expected a number or the name of one there is, not 4294967295",
        ),
        ("[mount]\nmode = 'rw'", "mount.mode: expected octal permissions such as \"0640\", not 'rw'"),
        ("[mount]\nmode = '0800'", "mount.mode: expected octal permissions such as \"0640\", not '0800'"),
        ("[mount]\nmode = '1777'", "mount.mode: expected octal permissions such as \"0640\", not '1777'"),
        ("[mount]\nmode = ''", "mount.mode: expected octal permissions such as \"0640\", not ''"),
        ("[mount]\nmode = '-1'", "mount.mode: expected octal permissions such as \"0640\", not '-1'"),
        ("[mount]\nmode = 440", "mount.mode: expected str, got int"),
        ("[mount]\nmode = true", "mount.mode: expected str, got bool"),
        ("backends = []", "backends: expected object, got array"),
        ("[backends]\nceph = 5", "backends.ceph: expected object, got int"),
        (
            "[backends.b]",
            "backends.b.driver: expected one of rbd, iscsi, block, file, brick, not None",
        ),
        (
            backend("", "nfs"),
            "backends.b.driver: expected one of rbd, iscsi, block, file, brick, not 'nfs'",
        ),
        (
            "[backends.b]\ndriver = ['rbd']",
            "backends.b.driver: expected one of rbd, iscsi, block, file, brick, not ['rbd']",
        ),
        (backend(""), "backends.b.path: missing"),
        (backend("", "iscsi"), "backends.b.portals: missing"),
        (backend("path = 5"), "backends.b.path: expected str, got int"),
        (backend("path = '/x'\npth = '/y'"), "backends.b.pth: unknown key"),
        (backend("path = 'raw'"), "backends.b.path: expected an absolute path, not 'raw'"),
        (backend("path = ''"), "backends.b.path: expected an absolute path, not ''"),
        (backend("path = 'raw'", "block"), "backends.b.path: expected an absolute path, not 'raw'"),
        (
            backend("devices = ['/dev/sda', 'sdb']", "block"),
            "backends.b.devices: expected an absolute path, not 'sdb'",
        ),
        (backend("devices = '/dev/sda'", "block"), "backends.b.devices: expected array, got str"),
        (
            backend("", "block"),
            "backends.b.path: expected a directory of devices, or devices = [...], or volume_group = ...",
        ),
        (
            backend("volume_group = 'vg0'\npath = '/dev/vg0'", "block"),
            "backends.b.volume_group: expected neither path nor devices beside it",
        ),
        (
            backend("volume_group = '/dev/vg0'", "block"),
            "backends.b.volume_group: expected the name of one, not '/dev/vg0'",
        ),
        (backend("pools = ['a', 5]", "rbd"), "backends.b.pools[1]: expected str, got int"),
        (backend("id = 5", "rbd"), "backends.b.id: expected str | null, got int"),
        (backend("path = '/x'\nread_only = 'yes'"), "backends.b.read_only: expected bool, got str"),
        (backend("path = '/x'\ntimeout = 'long'"), "backends.b.timeout: expected float, got str"),
        (backend("path = '/x'\ntimeout = 0"), "backends.b.timeout: expected seconds above 0, not 0"),
        (backend("path = '/x'\ntimeout = -2.5"), "backends.b.timeout: expected seconds above 0, not -2.5"),
        (backend("path = '/x'\ntimeout = nan"), "backends.b.timeout: expected seconds above 0, not nan"),
        (backend("path = '/x'\ntimeout = inf"), "backends.b.timeout: expected seconds above 0, not inf"),
        (
            '[backends."a/b"]\ndriver = "rbd"',
            "backends.a/b: 'a/b': expected a file name, without '/'",
        ),
        ('[backends.""]\ndriver = "rbd"', "backends.: '': expected a file name, without '/'"),
        ('[backends.".."]\ndriver = "rbd"', "backends...: '..': expected a file name, without '/'"),
        (
            '[backends.attached]\ndriver = "rbd"',
            "backends.attached: expected another name; 'attached' is the directory of attached volumes",
        ),
    ],
)
def test_mistake_is_named_with_key_and_expectation(
    refused: Callable[[str], str], text: str, message: str
) -> None:
    assert refused(text) == message


def test_name_of_a_backend_that_no_directory_can_have(refused: Callable[[str], str]) -> None:
    assert "expected a file name of at most 255 bytes" in refused(f'[backends.{"x" * 256}]\ndriver = "rbd"')


def test_a_mistake_beside_a_secret_does_not_show_it(refused: Callable[[str], str]) -> None:
    for line in ("id = 5", "keyy = 'x'", f"keyring = ['{KEY}']", "timeout = 0", f"monitors = '{KEY}'"):
        assert KEY not in refused(backend(f"key = '{KEY}'\n{line}", "rbd"))
    assert KEY not in refused(backend(f"key = ['{KEY}']", "rbd"))


# -o


def mount_options(options: str, config: Config | None = None) -> MountSettings:
    return add_options(config or Config(), options).mount


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", MountSettings()),
        (",,", MountSettings()),
        ("ro", MountSettings(read_only=True)),
        ("read_only", MountSettings(read_only=True)),
        ("ro,rw", MountSettings(read_only=False)),
        ("allow_other,uid=1000,gid=root", MountSettings(allow_other=True, uid=1000, gid="root")),
        ("mode=0640,read_ahead=0", MountSettings(mode="0640", read_ahead=0)),
        ("uid=1,uid=2", MountSettings(uid=2)),
    ],
)
def test_options(options: str, expected: MountSettings) -> None:
    assert mount_options(options) == expected


def test_options_count_more_than_the_file_and_leave_the_rest_alone(load_toml: LoadToml) -> None:
    config = load_toml(GOOD)
    changed = add_options(config, "rw,mode=0600")
    assert changed.mount == MountSettings(
        uid=1000, gid=0, mode="0600", allow_other=True, read_only=False, read_ahead=128 << 10
    )
    assert changed.backends == config.backends


@pytest.mark.parametrize(
    "option",
    ["nosuch", "uid", "mode", "allow_other=1", "allow-other", "ro=1", "=", "=5", "RO", " ro", "read_ahead"],
)
def test_unknown_option(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mount_options(f"allow_other,{option}")
    assert str(caught.value) == (
        f"-o {option}: expected allow_other, ro, rw, uid=, gid=, mode= or read_ahead=, separated by commas"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "uid=nobody at all",
            "mount.uid: expected a number or the name of one there is, not 'nobody at all'",
        ),
        ("uid=-1", "mount.uid: expected a number or the name of one there is, not '-1'"),
        ("uid=", "mount.uid: expected a number or the name of one there is, not ''"),
        ("gid=\udcff", r"mount.gid: expected a number or the name of one there is, not '\udcff'"),
        ("mode=9", "mount.mode: expected octal permissions such as \"0640\", not '9'"),
        ("mode=", "mount.mode: expected octal permissions such as \"0640\", not ''"),
        ("read_ahead=8M", "mount.read_ahead: expected int, got str"),
        ("read_ahead=-1", "mount.read_ahead: expected int, got str"),
    ],
)
def test_option_with_a_wrong_value(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mount_options(option)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["uid", "gid", "mode", "read_ahead"])
def test_option_with_a_number_beyond_all_measure(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mount\.{key}: expected"):
        mount_options(f"{key}={'7' * 5000}")


# Prefixes


def prefixed(*prefixes: str, config: Config | None = None, **environment: str) -> Config:
    return add_prefixes(config or Config(), prefixes, environment)


def test_prefixes_become_backends_named_after_their_drivers() -> None:
    config = prefixed("rbd:volumes", "file:/srv", "rbd:", "file:/srv", "rbd:a/b", CEPH_CONF="/c")
    assert list(config.backends) == ["rbd", "file", "rbd-2", "file-2", "rbd-3"]
    assert config.backends["rbd"] == ("rbd", RbdSettings(pools=("volumes",), conf="/c"))
    assert config.backends["rbd-2"] == ("rbd", RbdSettings(conf="/c"))
    assert config.backends["file-2"] == ("file", FileSettings(path="/srv"))


def test_prefixes_come_beside_the_backends_of_the_file(load_toml: LoadToml) -> None:
    config = load_toml('[backends.rbd]\ndriver = "rbd"\n[backends.rbd-2]\ndriver = "file"\npath = "/x"')
    more = prefixed("rbd:a", "rbd:b", config=config)
    assert list(more.backends) == ["rbd", "rbd-2", "rbd-3", "rbd-4"]
    assert more.backends["rbd-2"] == ("file", FileSettings(path="/x"))


def test_no_prefixes() -> None:
    assert prefixed() == Config()


@pytest.mark.parametrize("prefix", ["volumes", "nbd:x", "rbd:a/b/c", "file:srv", "block:", ""])
def test_wrong_prefix(prefix: str) -> None:
    with pytest.raises(SourceError):
        prefixed("rbd:", prefix)


# Anything at all

values = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["rbd", "file", "block", "iscsi", "/x", "root", "0640"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MOUNT_KEYS = sorted(MountSettings.__struct_fields__)
BACKEND_KEYS = ["driver", "path", "devices", "pools", "timeout", "read_only", "portals", "key", "junk"]
tables = st.fixed_dictionaries(
    {},
    optional={
        "mount": values | st.dictionaries(st.sampled_from(MOUNT_KEYS), values, max_size=3),
        "backends": values
        | st.dictionaries(
            st.text(max_size=5),
            values | st.dictionaries(st.sampled_from(BACKEND_KEYS), values, max_size=4),
            max_size=2,
        ),
        "junk": values,
    },
)


def to_toml(value: Any) -> str:
    """A value as TOML, tables inline."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            escaped = "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value)
            return f'"{escaped}"'
        case list():
            return "[" + ", ".join(map(to_toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{to_toml(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    raise AssertionError(value)


fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@fuzz
@given(table=tables)
@example({"backends": {"b": {"driver": [1]}}})
def test_any_table_is_a_config_or_a_config_error(load_toml: LoadToml, table: dict[str, Any]) -> None:
    text = "".join(f"{key} = {to_toml(value)}\n" for key, value in table.items())
    tomllib.loads(text)  # our own mistake otherwise
    try:
        config = load_toml(text)
    except ConfigError:
        return
    assert 0 <= config.mount.resolve_mode() <= 0o777
    assert hash(tuple(config.backends.values())) is not None


@fuzz
@given(text=st.text() | st.binary())
def test_any_file_is_a_config_or_a_config_error(load_toml: LoadToml, text: str | bytes) -> None:
    try:
        load_toml(text)
    except ConfigError:
        pass


option = st.text(max_size=10) | st.builds(
    "{}={}".format, st.sampled_from(["uid", "gid", "mode", "read_ahead"]), st.text(max_size=10)
)


@given(options=st.lists(option, max_size=4).map(",".join))
def test_any_options_are_settings_or_a_config_error(options: str) -> None:
    try:
        mount = mount_options(options)
    except ConfigError:
        return
    assert 0 <= mount.resolve_mode() <= 0o777
    assert mount.resolve_uid() >= 0
    assert mount.resolve_gid() >= 0


@given(prefixes=st.lists(st.sampled_from(["rbd:a", "rbd:", "file:/x", "block:/y"]) | st.text(), max_size=4))
def test_any_prefixes_are_backends_or_a_source_error(prefixes: list[str]) -> None:
    try:
        config = prefixed(*prefixes)
    except SourceError:
        return
    assert len(config.backends) == len(prefixes)
