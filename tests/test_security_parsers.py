"""Anything at all to whatever reads text from outside: it is understood, or refused by an error of ours on one line.

Sources by URL and by connection info of every type, volfs.toml by the command that reads it, the crash journal by the
start that cleans up, requests and replies of the control protocol. Where such text holds a secret, no error, no repr
and no name of what came out of it shows that.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_config import to_toml

from volfs import cli, control, journal, mounting, recovery
from volfs.backends import DRIVERS, backend_class, brick_connection, caller_environment, lvm
from volfs.backends import brick_library as library
from volfs.backends.base import Source
from volfs.backends.brick_target import ConnectorSettings, make_target
from volfs.backends.rbd import RbdSource
from volfs.config import Config
from volfs.daemon import Daemon
from volfs.errors import ControlError, SourceError, VolfsError
from volfs.source import parse_connection_info, parse_prefix, parse_source

CANARY = "AQc4n4rySecretOfThisTest0000000000000000=="
PROTOCOLS = sorted({name for registration in DRIVERS.values() for name in registration.protocols})
ENVIRONMENT = sorted({name for registration in DRIVERS.values() for name in registration.environment})

# What each example writes is replaced by the next.
in_one_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

odd_text = st.text(max_size=20) | st.sampled_from(
    [
        "",
        "/",
        "..",
        "../../etc",
        "a/b",
        "-rf",
        "a\nb",
        "\0",
        "x\0y",
        "/x\0y",
        "x" * 300,
        "ü" * 200,
        "\x1b[2J",
        "1" * 30,
    ]
)
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=5,
)
json_text = odd.map(json.dumps)

# A value that is right for each key that Cinder's drivers or os-brick's connectors use; any of them may be replaced.
GOOD: dict[str, Any] = {
    "access_mode": "rw",
    "auth_enabled": True,
    "auth_method": "CHAP",
    "auth_username": "user",
    "cluster_name": "ceph",
    "device_path": "/dev/disk",
    "encrypted": False,
    "enforce_multipath": False,
    "export": "127.0.0.1:/volumes",
    "format": "raw",
    "hosts": ["127.0.0.1"],
    "name": "volumes/disk",
    "nqn": "nqn.2026-01.org.example:disk",
    "portals": [["127.0.0.1", "4420", "tcp"]],
    "ports": ["6789"],
    "scaleIO_volname": "disk",
    "secret_type": "ceph",
    "target_iqn": "iqn.2026-01.org.example:disk",
    "target_iqns": ["iqn.2026-01.org.example:disk"],
    "target_lun": 1,
    "target_luns": [1],
    "target_nqn": "nqn.2026-01.org.example:disk",
    "target_portal": "127.0.0.1:3260",
    "target_portals": ["127.0.0.1:3260"],
    "target_wwn": ["50014380186b3f65"],
    "target_wwns": ["50014380186b3f65"],
    "uuid": "0d9c2d3e-54ae-4ac3-8fd4-6f4d9a0f5b3a",
    "volume": "disk",
    "volume_id": "5f1d2e0c-0d2f-4c7e-9c52-0b6a0d5ad1f1",
}
SECRETS: dict[str, Any] = {
    "auth_password": CANARY,
    "discovery_auth_password": CANARY,
    "keyring": f"[client.user]\n\tkey = {CANARY}\n",
    "serverPassword": CANARY,
    "serverToken": CANARY,
}


@st.composite
def connection_infos(draw: st.DrawFn) -> dict[str, Any]:
    """Of any type: some of the keys that there are, most of them right, and always with secrets."""
    keys = draw(st.sets(st.sampled_from(sorted(GOOD)), max_size=12))
    data = {key: GOOD[key] for key in keys}
    data |= draw(st.dictionaries(st.sampled_from(sorted(GOOD)) | odd_text, odd, max_size=3))
    return {"driver_volume_type": draw(st.sampled_from(PROTOCOLS)), "data": data | SECRETS}


@contextlib.contextmanager
def refusals_in_one_line(kind: type[VolfsError] = VolfsError) -> Iterator[None]:
    """Nothing else than an error of this class comes out, of one line without the canary."""
    refused: VolfsError | None = None
    try:
        yield
    except kind as exc:
        refused = exc
    if refused is not None:
        assert str(refused).isprintable()
        assert CANARY not in f"{refused} {refused!r} {refused.__cause__!r}"
        assert refused.errno in errno.errorcode


def check(source: Source) -> None:
    """What is true of every source, whoever wrote the text that it came from."""
    name, settings_ = source.name, backend_class(source.driver).settings_for(source)
    assert name not in ("", ".", "..")
    assert not set("/\0") & set(name)
    for shown in (source, settings_, source.url, name, backend_class(source.driver)("b", settings_)):
        assert CANARY not in f"{shown!r} {shown}"
    name.encode()
    if isinstance(source, RbdSource):
        access = source.access
        assert "\0" not in f"{access.conf} {access.keyring} {access.arguments} {access.monitors} {access.key}"
        assert not set("/\0") & set(f"{access.cluster} {access.client}")  # which become parts of paths
    assert hash(source) == hash(msgspec.structs.replace(source))


# Sources


@pytest.mark.slow
@settings(max_examples=300)
@given(connection_infos(), st.dictionaries(st.sampled_from(ENVIRONMENT), odd_text, max_size=2))
@example({"driver_volume_type": "nvmeof", "data": {"target_iqn": "x", "target_luns": 5}}, {})
@example({"driver_volume_type": "nfs", "data": {"target_wwn": {"a": 1}}}, {})
@example({"driver_volume_type": "rbd", "data": {"name": "a/b", "cluster_name": "../../tmp/ceph"}}, {})
@example({"driver_volume_type": "rbd", "data": {"name": "a/b", "auth_username": "../x"}}, {})
@example({"driver_volume_type": "rbd", "data": {"name": "a/b"}}, {"CEPH_CONF": "/x\0y"})
async def test_any_connection_info_is_a_source_or_a_source_error(
    info: dict[str, Any], environment: dict[str, str]
) -> None:
    with refusals_in_one_line(SourceError):
        check(parse_connection_info(info, environment))


@pytest.mark.slow
@given(connection_infos())
@example({"driver_volume_type": "nvmeof", "data": {"target_iqns": 3, "target_luns": {"a": 5}}})
def test_what_is_locked_and_noted_for_any_connection_info(info: dict[str, Any]) -> None:
    """Equal volumes wait for each other, by a name that tells no secret; nor do the facts for the journal."""
    data = msgspec.json.decode(msgspec.json.encode(info["data"]))
    target = make_target("x", info["driver_volume_type"], data, ConnectorSettings())
    assert CANARY not in f"{target!r} {target.identity}"
    noted = json.dumps(library.without_secrets(data))
    assert not [key for key in SECRETS if f'"{key}"' in noted]


@given(
    st.builds("{}:{}".format, st.sampled_from([*DRIVERS, "iscsii"]), odd_text)
    | st.builds(
        "{}://user%{}{}@{}/iqn.2026-01.org.example:x/{}".format,
        st.sampled_from(["iscsi", "iscsii"]),
        st.just(CANARY),
        st.sampled_from(["", "/", "@", "%", "//"]),
        odd_text,
        odd_text,
    ),
    st.dictionaries(st.sampled_from(ENVIRONMENT), odd_text, max_size=2),
)
@example(f"iscsii://user%{CANARY}/x@127.0.0.1/iqn.x/1", {})
async def test_any_url_is_a_source_or_a_source_error(url: str, environment: dict[str, str]) -> None:
    caller_environment(environment)
    with refusals_in_one_line(SourceError):
        check(parse_source(url, environment))
    with refusals_in_one_line(SourceError):
        driver, made, _ = parse_prefix(url, environment)
        assert CANARY not in repr(made)
        backend_class(driver)("b", made)


# The command, and volfs.toml


def _command(*arguments: str) -> str:
    """Run a volfs command that fails here, in this process; returns its one line."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["volfs", *arguments]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
    finally:
        sys.argv = before
    assert end.value.code in (1, 2), err.getvalue()
    assert out.getvalue() == ""
    *warnings, line = err.getvalue().splitlines()
    for shown in (*warnings, line):
        assert shown.startswith("volfs: ")
        assert shown.isprintable()
        assert CANARY not in shown
    return line


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "x" * 300])
def test_a_host_name_that_cannot_be_is_an_error_of_one_line(host: str) -> None:
    assert _command("ls", f"iscsi://{host}").startswith(f"volfs: iscsi portal {host}:3260: ")


driver_tables = st.sampled_from(sorted(DRIVERS)).flatmap(
    lambda driver: st.fixed_dictionaries(
        {"driver": st.just(driver)},
        optional={
            key: odd
            | st.sampled_from(
                [["/x"], "/x", "/x\0y", ["127.0.0.1"], "name", ["a"], 1, 0.5, True, "chap", CANARY]
            )
            for key in backend_class(driver).settings_type.__struct_fields__
        },
    )
)


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "volfs.toml"
    path.touch(0o644)
    return path


@pytest.mark.slow
@in_one_place
@given(st.dictionaries(odd_text, driver_tables | odd, max_size=2), st.dictionaries(odd_text, odd, max_size=2))
@example({"b": {"driver": "rbd", "keyring": "/x\0y"}}, {})
@example({"b": {"driver": "iscsi", "portals": ["a"], "chap_username": "x", "chap_password_file": "/\0"}}, {})
@example({"b": {"driver": "iscsi", "portals": ["a"], "connect_timeout": float("nan")}}, {})
@example({"b": {"driver": "file", "path": "/x", "timeout": 1e308}}, {})
def test_any_configuration_is_served_or_refused_on_one_line(
    configuration: Path, backends: dict[str, Any], mount: dict[str, Any]
) -> None:
    """All that a mount does before it mounts; the mountpoint is not there."""
    text = f"mount = {to_toml(_toml(mount))}\nbackends = {to_toml(_toml(backends))}\n"
    configuration.write_text(text)
    mountpoint = configuration.parent / "none"
    line = _command(
        "mount", str(mountpoint), "-c", str(configuration), "--socket", str(configuration.parent / "s")
    )
    assert line.startswith((f"volfs: {configuration}: ", f"volfs: {mountpoint}: ", "volfs: mount.mode: "))


def _toml(value: Any) -> Any:
    """Without what TOML has not."""
    match value:
        case dict():
            return {_text(key): _toml(item) for key, item in value.items() if item is not None}
        case list():
            return [_toml(item) for item in value if item is not None]
        case str():
            return _text(value)
        case int() if not isinstance(value, bool):
            return max(min(value, 2**63 - 1), -(2**63))
    return value


def _text(value: str) -> str:
    return value.encode(errors="replace").decode()


@pytest.mark.slow
@in_one_place
@given(
    st.binary(max_size=50)
    | json_text.map(str.encode)
    | connection_infos().map(lambda it: json.dumps(it).encode())
)
@example(b'{"a": ' + b"[" * 100_000)
@example(b"9" * 5000)
@example(b'{"driver_volume_type": "rbd", "data": {"name": "a/b", "hosts": "\\ud800"}}')
def test_any_file_with_a_connection_info_is_understood_or_refused(tmp_path: Path, content: bytes) -> None:
    """By the command, and by the process that would become the daemon."""
    path = tmp_path / "info.json"
    path.write_bytes(content)
    with refusals_in_one_line(SourceError):
        info = cli._read_json(str(path))
        with contextlib.suppress(TypeError, ValueError):
            refused = mounting.refuse_request(control.encode(control.Attach(connection_info=info)))
            assert refused is None or (refused.message.isprintable() and CANARY not in refused.message)


# The crash journal

FACTS: dict[str, Any] = {
    "logical_volume": "vg/disk",
    "uuid": "x",
    "name": "brick:nfs/x",
    "protocol": "nfs",
    "identity": "nfs",
    "data": {"export": "127.0.0.1:/x"},
    "options": {
        "root_helper": "sudo",
        "lock_path": "/nowhere",
        "use_multipath": False,
        "enforce_multipath": False,
        "device_scan_attempts": 1,
    },
    "borrowed": False,
    "path": "",
    "mount_point": "",
    "device_info": {},
}
records = st.builds(
    lambda driver, keys, junk: json.dumps(
        {"driver": driver, "facts": {key: FACTS[key] for key in keys} | junk}
    ).encode(),
    st.sampled_from(sorted(DRIVERS)) | odd_text,
    st.sets(st.sampled_from(sorted(FACTS))),
    st.dictionaries(st.sampled_from(sorted(FACTS)) | odd_text, odd, max_size=2),
)


@pytest.fixture
def journal_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The journal of this test's own, whose records make nobody unmount or deactivate anything."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(brick_connection, "_take_down", lambda *_: None)
    monkeypatch.setattr(library, "make_connector", lambda *_: (None, None))
    monkeypatch.setattr(brick_connection, "_volume_lock", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(lvm, "_path_of", lambda _: None)
    path = tmp_path / "volfs" / "journal"
    path.mkdir(mode=0o700, parents=True)
    path.parent.chmod(0o700)
    return path


@pytest.mark.slow
@in_one_place
@given(st.binary(max_size=60) | records | json_text.map(str.encode))
@example(b'{"driver": "brick", "facts": {"data": ' + b"[" * 100_000)
@example(b'{"driver": "block", "facts": {"logical_volume": 3}}')
@example(b'{"driver": "a\\u001b[2J\\nb", "facts": {}}')
def test_a_start_survives_any_journal(
    journal_directory: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """And finds what is right in it, however wrong the rest."""
    caplog.clear()
    (journal_directory / "brick-1.json").write_bytes(content)
    (journal_directory / "file-2.json").write_text('{"driver": "file", "facts": {}}')
    trio.run(recovery.clean_up)
    assert "Record(file-2.json, file)" in caplog.text
    assert "Traceback" not in caplog.text
    assert "bug" not in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert isinstance(journal.living("brick"), list)


# The control protocol

fields = {name for message in control.Request.__args__ for name in message.__struct_fields__}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    return path


@pytest.mark.slow
@in_one_place
@given(data=st.data())
@example(data=None)
async def test_any_request_is_answered_or_an_error_of_ours(volume: Path, data: st.DataObject | None) -> None:
    """Through the handler of a daemon, as far as it comes without a storage."""
    urls = [f"file:{volume}", f"block:{volume}", f"file:{volume}/x", "file:/" + "x/" * 3000]
    sources = st.sampled_from(urls) | odd_text
    infos = st.builds(
        lambda path, more: {"driver_volume_type": "local", "data": {"device_path": path, **more}},
        st.just(str(volume)) | odd,
        st.dictionaries(st.sampled_from(sorted(GOOD)), odd, max_size=2),
    )
    environments = st.dictionaries(st.sampled_from(ENVIRONMENT) | odd_text, odd_text, max_size=2)
    requests = st.one_of(
        st.builds(dict, type=st.just("Hello"), protocol=st.integers(), version=odd_text),
        st.builds(
            dict, type=st.just("Attach"), source=sources, name=st.none() | odd_text, hold=st.booleans()
        ),
        st.builds(dict, type=st.just("Attach"), connection_info=infos | odd, environment=environments),
        st.builds(
            dict, type=st.just("Attach"), source=sources, blank=st.booleans(), environment=environments
        ),
        st.builds(
            dict, type=st.just("Detach"), name=st.just("disk") | odd_text, wait=st.floats(max_value=1e300)
        ),
        st.builds(dict, type=st.just("Detach"), lease=st.integers(-5, 5), wait=st.integers(-5, 1)),
        st.builds(dict, type=st.just("Status"), connection_info=infos, environment=environments),
    )
    chosen = [{"type": "Attach", "source": f"file:{volume}"}, {"type": "Detach", "name": "disk", "wait": -1}]
    if data is not None:
        chosen += data.draw(st.lists(requests, max_size=8))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            daemon = Daemon(Config(), str(volume.parent / "mnt"), str(volume.parent / "s"))
            daemon.background = nursery
            client = control_client()
            for each in chosen:
                with contextlib.suppress(VolfsError):
                    request = control.decode_request(json.dumps(each).encode())
                    if each["type"] == "Attach" and _connects(request):
                        continue
                    control.encode(await daemon.handle(client, request))
            await daemon.goodbye(client)
            await daemon.backends.aclose()


def control_client() -> Any:
    from volfs.control_server import Client

    return Client(os.getpid())


def _connects(request: Any) -> bool:
    """Whether it might lead to a storage that is somewhere else."""
    try:
        if request.source is not None:
            return parse_source(request.source, request.environment).driver not in ("file", "block")
        return parse_connection_info(request.connection_info, request.environment).driver not in (
            "file",
            "block",
        )
    except VolfsError:
        return False


replies = st.builds(
    lambda kind, fields_: json.dumps({"type": kind, **fields_}).encode(),
    st.sampled_from([cls.__name__ for cls in control.Reply.__args__]),
    st.dictionaries(
        st.sampled_from(sorted({name for it in control.Reply.__args__ for name in it.__struct_fields__})), odd
    ),
)


@given(st.binary(max_size=60) | replies | json_text.map(str.encode))
@example(b'{"type":"Failed","kind":"\xff","errno":1,"message":""}')
@example(b'{"type":"Done","x":' + b"[" * 100_000)
@example(b'{"type":"Failed","kind":"errnos","errno":99999999999999999999,"message":"\\u001b[2J"}')
def test_any_reply_is_one_of_ours_or_a_control_error(line: bytes) -> None:
    with refusals_in_one_line(ControlError):
        reply = control.decode_reply(line)
        if isinstance(reply, control.Failed):
            assert isinstance(reply.error(), VolfsError)
            assert str(reply.error()).isprintable()
    failure = control.decode_failure(line)
    assert failure is None or isinstance(failure, VolfsError)
