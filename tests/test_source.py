"""What names volumes of rbd, block and file: URLs, prefixes and connection infos. Those of iscsi: test_iscsi.py."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from volfs.attached import check_name
from volfs.backends import DRIVERS, backend_class, caller_environment, is_url
from volfs.backends.base import Source
from volfs.backends.block import BlockSource
from volfs.backends.file import FileSource
from volfs.backends.rbd import RbdBackend, RbdSource
from volfs.backends.rbd_cluster import ClusterAccess, access_from_environment
from volfs.errors import SourceError
from volfs.source import parse_connection_info, parse_prefix, parse_source

KEY = "AQDoSekretSekretSekretSekretSekretSekretA=="
UUID = "volume-5f1d2e0c-0d2f-4c7e-9c52-0b6a0d5ad1f1"

# As Cinder 29 hands them out; facts.md, "Cinder 29 and os-brick 7.1, run for real".
RBD_INFO: dict[str, Any] = {
    "driver_volume_type": "rbd",
    "data": {
        "name": f"volumes/{UUID}",
        "hosts": ["10.0.0.1", "10.0.0.2"],
        "ports": ["6789", "6789"],
        "cluster_name": "ceph",
        "auth_enabled": True,
        "auth_username": "cinder",
        "secret_type": "ceph",
        "secret_uuid": "0d9c2d3e-54ae-4ac3-8fd4-6f4d9a0f5b3a",
        "volume_id": UUID.removeprefix("volume-"),
        "discard": True,
        "access_mode": "rw",
        "encrypted": False,
        "qos_specs": None,
        "cacheable": False,
    },
}
LOCAL_INFO: dict[str, Any] = {
    "driver_volume_type": "local",
    "data": {"device_path": f"/dev/cinder-volumes/{UUID}", "access_mode": "rw", "encrypted": False},
}
INFOS = {"rbd": RBD_INFO, "local": LOCAL_INFO}


def changed(info: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The connection info with other data; a field that is `...` is left out."""
    data = {**info["data"], **fields}
    return {**info, "data": {key: value for key, value in data.items() if value is not ...}}


def refused(url: str, environment: Mapping[str, str] | None = None) -> str:
    """The one line that says why the URL names no volume."""
    with pytest.raises(SourceError) as caught:
        parse_source(url, environment or {})
    return one_line(caught.value)


def refused_info(info: Any, environment: Mapping[str, str] | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        parse_connection_info(info, environment or {})
    return one_line(caught.value)


def one_line(exc: SourceError) -> str:
    assert exc.errno == errno.EINVAL
    assert str(exc).isprintable()
    return str(exc)


# URLs


@pytest.mark.parametrize(
    ("url", "fields", "name"),
    [
        ("rbd:volumes/disk", {"pool": "volumes", "image": "disk"}, "disk"),
        ("rbd:a/b/c", {"pool": "a", "namespace": "b", "image": "c"}, "c"),
        ("rbd:a/b@s", {"pool": "a", "image": "b", "snapshot": "s"}, "b@s"),
        ("rbd:a/b/c@s", {"pool": "a", "namespace": "b", "image": "c", "snapshot": "s"}, "c@s"),
        ("rbd:pool with space/Ünïcode", {"pool": "pool with space", "image": "Ünïcode"}, "Ünïcode"),
        ("rbd:a/..b", {"pool": "a", "image": "..b"}, "..b"),
    ],
)
def test_rbd_url(url: str, fields: dict[str, str], name: str) -> None:
    source = parse_source(url, {})
    assert source == RbdSource(**fields)
    assert (source.url, source.name, source.read_only) == (url, name, False)


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "volumes",
        "volumes/",
        "/disk",
        "//",
        "a//b",
        "a/b/c/d",
        "a/b/",
        "a/b@",
        "a/@s",
        "a/b@s@t",
        "a@s/b",
        "a/b@s/c",
        "a/..",
        "../b",
        "a/../b",
        "a/./b",
        "a/b@..",
        "a/b\0",
        "//mon/pool/image",
    ],
)
def test_rbd_url_that_names_no_image(rest: str) -> None:
    shown = rest.replace("\0", r"\x00")
    assert refused(f"rbd:{rest}") == f"rbd:{shown}: expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]"


@pytest.mark.parametrize(("driver", "cls"), [("file", FileSource), ("block", BlockSource)])
@pytest.mark.parametrize(
    ("given_path", "path"),
    [
        ("/srv/disk", "/srv/disk"),
        ("/disk", "/disk"),
        ("///srv/disk", "/srv/disk"),
        ("//srv/disk", "/srv/disk"),
        ("/srv//a/../disk", "/srv/disk"),
        ("/srv/a b@c", "/srv/a b@c"),
    ],
)
def test_local_url(driver: str, cls: type[Any], given_path: str, path: str) -> None:
    source = parse_source(f"{driver}:{given_path}", {})
    assert source == cls(path=path)
    assert (source.url, source.name) == (f"{driver}:{path}", path.rpartition("/")[2])


@pytest.mark.parametrize("driver", ["file", "block"])
@pytest.mark.parametrize("rest", ["", "disk", "./disk", "../disk", "/", "/srv/", "/a\0b", "/..", "/srv/.."])
def test_local_url_that_names_no_file(driver: str, rest: str) -> None:
    what = {"file": "file", "block": "block device"}[driver]
    shown = rest.replace("\0", r"\x00")
    assert refused(f"{driver}:{rest}") == (
        f"{driver}:{shown}: expected {driver}:/PATH, the absolute path of a {what}"
    )


@pytest.mark.parametrize("url", ["", "disk", "/srv/disk", "nbd:host/disk", "RBD:a/b", ":a", "http://x/y"])
def test_url_of_no_driver(url: str) -> None:
    assert refused(url) == (
        f"{url!r}: not a volume's URL; expected one that begins with rbd:, iscsi:, block:, file:"
    )
    assert not is_url(url)


def test_a_mistyped_scheme_shows_no_password() -> None:
    assert "t0psecret" not in refused("iscis://admin%t0psecret@san/iqn.2026-01.org.volfs:a/1")
    assert "t0psecret" not in refused("isci//admin%t0p@t0psecret@san/iqn.2026-01.org.volfs:a/1")


@pytest.mark.parametrize("text", ["rbd:x", "file:/x", "iscsi://x", "block:", "rbd:"])
def test_text_that_is_meant_as_a_source(text: str) -> None:
    assert is_url(text)


@pytest.mark.parametrize("text", ["rbd", "./rbd:x", "/mnt/rbd:x", "x", ""])
def test_text_that_is_meant_as_a_path(text: str) -> None:
    assert not is_url(text)


# Prefixes


@pytest.mark.parametrize(
    ("prefix", "pools", "path"),
    [("rbd:", (), ()), ("rbd:volumes", ("volumes",), ("volumes",)), ("rbd:a/b", ("a",), ("a", "b"))],
)
def test_rbd_prefix(prefix: str, pools: tuple[str, ...], path: tuple[str, ...]) -> None:
    driver, settings, directory = parse_prefix(prefix, {"CEPH_CONF": "/c", "CEPH_ARGS": "--id me"})
    assert (driver, directory) == ("rbd", path)
    assert (settings.pools, settings.conf, settings.id) == (pools, "/c", "me")


@pytest.mark.parametrize("prefix", ["rbd:a/b/c", "rbd:/", "rbd:a/", "rbd:a@b", "rbd:a\0", "rbd://a"])
def test_rbd_prefix_that_is_no_directory(prefix: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_prefix(prefix, {})
    shown = prefix.replace("\0", r"\x00")
    assert one_line(caught.value) == f"{shown}: expected rbd:POOL[/NAMESPACE], or rbd: for all pools"


@pytest.mark.parametrize("prefix", ["file:", "file:x", "file:/a\0", "block:", "block:x"])
def test_local_prefix_that_is_no_directory(prefix: str) -> None:
    with pytest.raises(SourceError, match=rf"expected {prefix.partition(':')[0]}:/PATH"):
        parse_prefix(prefix, {})


# Connection infos


def test_rbd_connection_info_of_cinder() -> None:
    source = parse_connection_info(RBD_INFO, {})
    assert source == RbdSource(
        pool="volumes",
        image=UUID,
        access=ClusterAccess(
            client="cinder", cluster="ceph", monitors=("10.0.0.1:6789", "10.0.0.2:6789"), key=None
        ),
    )


def test_local_connection_info_of_cinder() -> None:
    assert parse_connection_info(LOCAL_INFO, {}) == BlockSource(path=f"/dev/cinder-volumes/{UUID}")


def test_it_comes_as_json_through_the_control_protocol_just_so() -> None:
    for info in INFOS.values():
        assert parse_connection_info(json.loads(json.dumps(info)), {}) == parse_connection_info(info, {})


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS.keys())
@pytest.mark.parametrize(("mode", "read_only"), [("ro", True), ("rw", False), (None, False), (..., False)])
def test_access_mode(info: dict[str, Any], mode: object, read_only: bool) -> None:
    assert parse_connection_info(changed(info, access_mode=mode), {}).read_only is read_only


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS.keys())
def test_what_does_not_matter_to_a_reader_of_blocks_is_ignored(info: dict[str, Any]) -> None:
    more = changed(info, encrypted=True, qos_specs={"total_iops_sec": "100"}, new_in_cinder_30=[1, {}])
    assert parse_connection_info({**more, "connector": {"host": "x"}}, {}) == parse_connection_info(info, {})


def test_rbd_without_what_ceph_finds_by_itself() -> None:
    data = {"name": "volumes/disk"}
    assert parse_connection_info({"driver_volume_type": "rbd", "data": data}, {}) == RbdSource(
        pool="volumes", image="disk"
    )


def test_rbd_monitors_of_the_callers_configuration_count_more() -> None:
    environment = {"CEPH_CONF": "/etc/ceph/other.conf", "CEPH_ARGS": "--keyring /k --id other"}
    access = parse_connection_info(RBD_INFO, environment).access
    assert access == ClusterAccess(
        conf="/etc/ceph/other.conf", keyring="/k", client="cinder", cluster="ceph", monitors=()
    )


def test_rbd_monitors_with_ipv6_addresses() -> None:
    info = changed(RBD_INFO, hosts=["fd00::1", "[fd00::2]"], ports=[6789, "3300"])
    assert parse_connection_info(info, {}).access.monitors == ("[fd00::1]:6789", "[fd00::2]:3300")


@pytest.mark.parametrize(
    "keyring",
    [f"[client.cinder]\n\tkey = {KEY}\n", f"[client.cinder]\n    key={KEY}\n    caps mon = allow\n"],
)
def test_rbd_key_of_older_cinders(keyring: str) -> None:
    assert parse_connection_info(changed(RBD_INFO, keyring=keyring), {}).access.key == KEY


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "expected an object, not NoneType"),
        ([], "expected an object, not list"),
        ("rbd:a/b", "expected an object, not str"),
        ({}, "driver_volume_type: expected the name of a protocol"),
        ({"driver_volume_type": 5, "data": {}}, "driver_volume_type: expected the name of a protocol"),
        ({"driver_volume_type": "rbd"}, "data: expected an object"),
        ({"driver_volume_type": "rbd", "data": []}, "data: expected an object"),
        (
            {"driver_volume_type": "smbfs", "data": {}},
            "no driver for 'smbfs'; volfs knows rbd, iscsi, local, fibre_channel, glusterfs, gpfs, "
            "huaweisdshypervisor, iser, lightos, nfs, nvme, nvmeof, quobyte, scality, scaleio, storpool, vmdk, "
            "vzstorage",
        ),
        (changed(RBD_INFO, access_mode="rx"), "data.access_mode: expected ro or rw, not 'rx'"),
        (changed(RBD_INFO, access_mode=[]), "data.access_mode: expected ro or rw, not []"),
    ],
    ids=repr,
)
def test_connection_info_of_no_known_kind(info: Any, message: str) -> None:
    assert refused_info(info) == f"connection info: {message}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ...}, "name: '': expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]"),
        ({"name": UUID}, f"name: '{UUID}': expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]"),
        ({"name": "../../x"}, "name: '../../x': expected rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]"),
        ({"name": 7}, "name: expected text, not int"),
        ({"name": ["volumes/x"]}, "name: expected text, not list"),
        ({"cluster_name": 7}, "cluster_name: expected text, not int"),
        ({"auth_username": {}}, "auth_username: expected text, not dict"),
        ({"keyring": 1}, "keyring: expected text, not int"),
        ({"hosts": "10.0.0.1"}, "hosts: expected a list of texts"),
        ({"hosts": [["10.0.0.1"]]}, "hosts: expected a list of texts"),
        ({"hosts": None}, "hosts: expected a list of texts"),
        ({"ports": {"a": 1}}, "ports: expected a list of texts"),
        ({"ports": ["6789"]}, "ports: expected as many as hosts (2), not 1"),
        ({"ports": ...}, "ports: expected as many as hosts (2), not 0"),
    ],
    ids=repr,
)
def test_rbd_connection_info_with_a_wrong_field(fields: dict[str, Any], message: str) -> None:
    assert refused_info(changed(RBD_INFO, **fields)) == f"connection info of type rbd: data.{message}"


@pytest.mark.parametrize("path", [..., None, 5, "", "sda", "../sda", "/dev/\0", [], "/", "/dev/.."])
def test_local_connection_info_with_a_wrong_field(path: object) -> None:
    assert refused_info(changed(LOCAL_INFO, device_path=path)) == (
        "connection info of type local: data.device_path: expected an absolute path"
    )


# CEPH_CONF and CEPH_ARGS


@pytest.mark.parametrize(
    ("environment", "access"),
    [
        ({}, ClusterAccess()),
        ({"CEPH_ARGS": ""}, ClusterAccess()),
        ({"CEPH_CONF": "/a.conf"}, ClusterAccess(conf="/a.conf")),
        ({"CEPH_ARGS": "--id me"}, ClusterAccess(client="me")),
        ({"CEPH_ARGS": "--id=me"}, ClusterAccess(client="me")),
        ({"CEPH_ARGS": "--user me"}, ClusterAccess(client="me")),
        ({"CEPH_ARGS": "--name client.me"}, ClusterAccess(client="me")),
        ({"CEPH_ARGS": "-n client.a.b"}, ClusterAccess(client="a.b")),
        ({"CEPH_ARGS": "-c /b.conf"}, ClusterAccess(conf="/b.conf")),
        ({"CEPH_ARGS": "-c /b.conf", "CEPH_CONF": "/a.conf"}, ClusterAccess(conf="/b.conf")),
        ({"CEPH_ARGS": "--cluster x -k '/key ring'"}, ClusterAccess(cluster="x", keyring="/key ring")),
        (
            {"CEPH_ARGS": "--id me --mon-host 10.0.0.1 --rbd_cache=false --no-mon-config"},
            ClusterAccess(
                client="me", arguments=("--mon-host", "10.0.0.1", "--rbd_cache=false", "--no-mon-config")
            ),
        ),
        ({"CEPH_ARGS": "--idle 5"}, ClusterAccess(arguments=("--idle", "5"))),
    ],
    ids=str,
)
def test_environment_of_ceph(environment: dict[str, str], access: ClusterAccess) -> None:
    assert access_from_environment(environment) == access
    assert parse_source("rbd:a/b", environment) == RbdSource(pool="a", image="b", access=access)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--id", "expected one argument"),
        ("--name osd.1", "--name osd.1: expected client.USER"),
        ("--name client.", "--name client.: expected client.USER"),
        ("-n me", "--name me: expected client.USER"),
        ("--id 'me", "No closing quotation"),
    ],
)
def test_environment_that_ceph_would_refuse(arguments: str, message: str) -> None:
    text = refused("rbd:a/b", {"CEPH_ARGS": arguments})
    assert text.startswith("CEPH_ARGS: ")
    assert message in text


def test_of_the_callers_environment_only_what_drivers_ask_for_is_passed_on() -> None:
    environment = {"CEPH_CONF": "/c", "CEPH_ARGS": "--id me", "AWS_SECRET_ACCESS_KEY": "x", "PATH": "/bin"}
    assert caller_environment(environment) == {"CEPH_CONF": "/c", "CEPH_ARGS": "--id me"}


# Secrets


def test_a_ceph_key_is_not_shown() -> None:
    keyring = f"[client.cinder]\n\tkey = {KEY}\n"
    source = parse_connection_info(changed(RBD_INFO, keyring=keyring), {})
    settings = RbdBackend.settings_for(source)
    assert settings.key == KEY  # it is there, and used
    by_argument = parse_source("rbd:a/b", {"CEPH_ARGS": f"--id me --key {KEY}"})
    for thing in (source, source.access, settings, by_argument, RbdBackend.settings_for(by_argument)):
        assert KEY not in f"{thing!r} {thing!s} {thing}"
    assert KEY not in source.url + source.name


@pytest.mark.parametrize(
    "fields",
    [{"name": ...}, {"hosts": 1}, {"auth_username": 1}, {"access_mode": "x"}, {"ports": []}],
    ids=str,
)
def test_a_ceph_key_is_not_in_errors(fields: dict[str, Any]) -> None:
    info = changed(RBD_INFO, keyring=f"[client.cinder]\n\tkey = {KEY}\n", **fields)
    assert KEY not in refused_info(info)
    assert KEY not in refused_info({**info, "driver_volume_type": "smbfs"})
    assert KEY not in refused_info(changed(RBD_INFO, keyring=[KEY]))
    assert KEY not in refused("rbd:a/b", {"CEPH_ARGS": f"--key {KEY} --id"})


# Anything at all

names = st.text(min_size=1, max_size=40)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
environments = st.dictionaries(st.sampled_from(["CEPH_CONF", "CEPH_ARGS"]), st.text(max_size=30))


def check(source: Source) -> None:
    """What is true of all sources."""
    assert source == msgspec.structs.replace(source)
    assert hash(source) == hash(msgspec.structs.replace(source))
    assert source.url.startswith(f"{source.driver}:")
    assert source.name
    assert "/" not in source.name
    assert "\0" not in source.url
    settings = backend_class(source.driver).settings_for(source)
    assert hash(settings) == hash(backend_class(source.driver).settings_for(source))


@given(url=st.text() | st.builds("{}:{}".format, st.sampled_from(sorted(DRIVERS)), st.text()))
@example("rbd:a/b@c")
@example("file:/.")
def test_any_text_is_a_source_or_a_source_error(url: str) -> None:
    try:
        source = parse_source(url, {})
    except SourceError:
        return
    check(source)


@given(url=st.text() | st.builds("{}:{}".format, st.sampled_from(sorted(DRIVERS)), st.text()))
def test_any_text_is_a_prefix_or_a_source_error(url: str) -> None:
    try:
        driver, settings, path = parse_prefix(url, {})
    except SourceError:
        return
    assert isinstance(settings, backend_class(driver).settings_type)
    assert all(path)


@given(environment=environments)
@example({"CEPH_ARGS": "--id=x --conf"})
@example({"CEPH_ARGS": "--"})
@example({"CEPH_ARGS": "-cx -n client.a"})
def test_any_environment_is_an_access_or_a_source_error(environment: dict[str, str]) -> None:
    try:
        hash(access_from_environment(environment))
    except SourceError:
        pass


@given(pool=names, namespace=st.text(max_size=20), image=names, snapshot=st.text(max_size=20))
def test_the_url_of_an_rbd_source_names_that_source(
    pool: str, namespace: str, image: str, snapshot: str
) -> None:
    source = RbdSource(pool=pool, namespace=namespace, image=image, snapshot=snapshot)
    try:
        again = parse_source(source.url, {})
    except SourceError:
        parts = {pool, namespace, image, snapshot}
        assert {".", ".."} & parts or any(set("/@\0") & set(part) for part in parts)
        return
    if not any(set("/@") & set(part) for part in (pool, namespace, image, snapshot)):
        assert again == source


@given(
    info=junk
    | st.fixed_dictionaries(
        {
            "driver_volume_type": st.sampled_from(["rbd", "iscsi", "local"]),
            "data": st.dictionaries(
                st.sampled_from([*RBD_INFO["data"], *LOCAL_INFO["data"], "keyring", "target_iqn"]), junk
            ),
        }
    ),
    environment=environments,
)
def test_any_object_is_a_source_or_a_source_error(info: Any, environment: dict[str, str]) -> None:
    try:
        source = parse_connection_info(info, environment)
    except SourceError:
        return
    check(source)


@given(fields=st.dictionaries(st.sampled_from(sorted(RBD_INFO["data"])), junk, min_size=1))
def test_any_field_of_a_good_connection_info_may_be_junk(fields: dict[str, Any]) -> None:
    try:
        check(parse_connection_info(changed(RBD_INFO, **fields), {}))
    except SourceError:
        pass


# Names of attached volumes


@pytest.mark.parametrize("name", ["", ".", "..", "/", "../x", "a/b", "a\0b", "x" * 256, "ü" * 128])
def test_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(SourceError, match="expected a file name"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["disk", "...", ".x", "a b", "x" * 255, "ü" * 127, "a\nb", "-rf", "iqn.x:y@1"]
)
def test_name_that_a_file_can_have(name: str) -> None:
    check_name(name)
