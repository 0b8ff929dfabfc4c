"""Sources and settings of the iscsi driver: what is understood, what is refused and how, and that no secret shows."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volfs.backends.iscsi import IscsiBackend, default_initiator_name
from volfs.backends.iscsi_source import IscsiSettings, IscsiSource
from volfs.errors import SourceError

IQN = "iqn.2010-10.org.openstack:volume-1"
ACCOUNT = {"LIBISCSI_CHAP_USERNAME": "ann", "LIBISCSI_CHAP_PASSWORD": "hidden"}


@pytest.mark.parametrize(
    ("rest", "portal", "lun", "account"),
    [
        (f"//192.0.2.1/{IQN}/1", "192.0.2.1:3260", 1, ("", "")),
        (f"//192.0.2.1:860/{IQN}/0", "192.0.2.1:860", 0, ("", "")),
        (f"//[2001:DB8::1]/{IQN}/16383", "[2001:db8::1]:3260", 16383, ("", "")),
        (f"//[fe80::1%eth0]:3261/{IQN}/1", "[fe80::1%eth0]:3261", 1, ("", "")),
        (f"//San.example.org/{IQN}/1", "san.example.org:3260", 1, ("", "")),
        (f"//ann%hidden@192.0.2.1/{IQN}/1", "192.0.2.1:3260", 1, ("ann", "hidden")),
        (f"//ann%a/b%c@d@192.0.2.1/{IQN}/1", "192.0.2.1:3260", 1, ("ann", "a/b%c@d")),
    ],
)
def test_urls(rest: str, portal: str, lun: int, account: tuple[str, str]) -> None:
    source = IscsiBackend.parse_url(rest, {})
    assert (source.portals, source.iqn, source.lun) == ((portal,), IQN, lun)
    assert (source.chap_username, source.chap_password) == account
    assert source.url == f"iscsi://{portal}/{IQN}/{lun}"
    assert source.name == f"{IQN}-lun-{lun}"
    assert IscsiBackend.parse_url(source.url.removeprefix("iscsi:"), {}) == msgspec.structs.replace(
        source, chap_username="", chap_password=""
    )


def test_an_escaped_name() -> None:
    source = IscsiBackend.parse_url("//h/iqn.2026-01.org.volfs%3Aa/1", {})
    assert source.iqn == "iqn.2026-01.org.volfs:a"


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "//",
        "/h/iqn.x/1",
        "//h",
        f"//h/{IQN}",
        f"//h/{IQN}/",
        f"//h/{IQN}/x",
        f"//h/{IQN}/-1",
        f"//h/{IQN}/65536",
        f"//h/{IQN}/1/2",
        "//h/disk/1",
        "//h/iqn.a%2fb/1",
        "//h/iqn.a%00b/1",
        f"//h:0/{IQN}/1",
        f"//h:65536/{IQN}/1",
        f"//fe80::1/{IQN}/1",
        f"//[::g]/{IQN}/1",
        f"//[:::]/{IQN}/1",
        f"///{IQN}/1",
        f"//@h/{IQN}/1",
        f"//ann@h/{IQN}/1",
        f"//ann%@h/{IQN}/1",
        f"//%x@h/{IQN}/1",
        f"//ann%{'x' * 256}@h/{IQN}/1",
        f"//h/iqn.{'x' * 220}/1",
    ],
)
def test_what_is_no_url(rest: str) -> None:
    with pytest.raises(SourceError, match="expected") as caught:
        IscsiBackend.parse_url(rest, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rest", ["//ann%hidden@h", "//ann%hidden@h:x/iqn.a/1", "ann%hidden@h", "//ann%hid/hidden@/x"]
)
def test_a_message_shows_no_account(rest: str) -> None:
    with pytest.raises(SourceError) as caught:
        IscsiBackend.parse_url(rest, ACCOUNT)
    assert "hid" not in str(caught.value)
    assert "ann" not in str(caught.value)


def test_the_environments_account() -> None:
    source = IscsiBackend.parse_url(f"//h/{IQN}/1", ACCOUNT)
    assert (source.chap_username, source.chap_password) == ("ann", "hidden")
    settings, path = IscsiBackend.parse_prefix("//h", ACCOUNT)
    assert (settings.chap_username, settings.chap_password, path) == ("ann", "hidden", ())
    # The URL's own goes before it; half of one is none.
    source = IscsiBackend.parse_url(f"//bob%other@h/{IQN}/1", ACCOUNT)
    assert (source.chap_username, source.chap_password) == ("bob", "other")
    source = IscsiBackend.parse_url(f"//h/{IQN}/1", {"LIBISCSI_CHAP_USERNAME": "ann"})
    assert (source.chap_username, source.chap_password) == ("", "")
    both = {"LIBISCSI_CHAP_TARGET_USERNAME": "array", "LIBISCSI_CHAP_TARGET_PASSWORD": "hidden"}
    source = IscsiBackend.parse_url(f"//h/{IQN}/1", ACCOUNT | both)
    assert (source.mutual_chap_username, source.mutual_chap_password) == ("array", "hidden")
    assert IscsiBackend.parse_url(f"//h/{IQN}/1", both).mutual_chap_username == ""


def test_prefixes() -> None:
    assert IscsiBackend.parse_prefix("//h", {}) == (IscsiSettings(portals=("h:3260",)), ())
    assert IscsiBackend.parse_prefix(f"//[::1]:1/{IQN}", {}) == (
        IscsiSettings(portals=("[::1]:1",), targets=(IQN,)),
        (IQN,),
    )
    for rest in ("", "h", f"//h/{IQN}/1", "//h/x"):
        with pytest.raises(SourceError, match="expected"):
            IscsiBackend.parse_prefix(rest, {})


def test_secrets_do_not_show() -> None:
    source = IscsiBackend.parse_url(f"//ann%hidden@h/{IQN}/1", {})
    settings = IscsiBackend.settings_for(source)
    backend = IscsiBackend("san", settings)
    for thing in (source, settings, backend, [source], str(source), f"{settings}", source.url, source.name):
        assert "hidden" not in repr(thing)
    assert settings.chap_password == source.chap_password == "hidden"
    assert "***" in repr(source)
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"portals": ["h"], "chap_password": "hidden"}, IscsiSettings)
    assert "hidden" not in str(caught.value)


CINDER = {
    "target_portal": "192.0.2.1:3260",
    "target_iqn": IQN,
    "target_lun": 1,
    "target_discovered": False,
    "volume_id": "42",
    "auth_method": "CHAP",
    "auth_username": "ann",
    "auth_password": "hidden",
    "access_mode": "rw",
    "discard": True,
    "encrypted": True,
    "qos_specs": None,
}


def test_a_connection_info() -> None:
    source = IscsiBackend.parse_connection("iscsi", CINDER, {})
    expected = IscsiSource(
        portals=("192.0.2.1:3260",), iqn=IQN, lun=1, chap_username="ann", chap_password="hidden"
    )
    assert source == expected
    assert hash(source) == hash(expected)
    read_only = IscsiBackend.parse_connection("iscsi", {**CINDER, "access_mode": "ro"}, {})
    assert read_only.read_only
    assert read_only != source
    assert IscsiBackend.parse_connection("iscsi", {**CINDER, "auth_method": None}, {}).chap_username == ""


def test_several_paths() -> None:
    several = {
        **CINDER,
        "target_portals": ["192.0.2.1:3260", "[2001:db8::1]:3260", "192.0.2.2", "192.0.2.1:3260"],
        "target_iqns": [IQN, IQN, IQN + "b", IQN],
        "target_luns": [1, 1, 1, 1],
    }
    source = IscsiBackend.parse_connection("iscsi", several, {})
    assert source.portals == ("192.0.2.1:3260", "[2001:db8::1]:3260")
    only_lists = {
        key: value
        for key, value in several.items()
        if key not in ("target_portal", "target_iqn", "target_lun")
    }
    assert IscsiBackend.parse_connection("iscsi", only_lists, {}) == source


def test_paths_to_several_targets_are_for_multipath() -> None:
    several = {
        **CINDER,
        "target_portals": ["192.0.2.1", "192.0.2.2", "192.0.2.3"],
        "target_iqns": [IQN, IQN + "b", IQN + "b"],
        "target_luns": [1, 2, 2],
    }
    source = IscsiBackend.parse_connection("iscsi", several, {})
    assert [path[1:] for path in source.paths] == [(IQN, 1), (IQN + "b", 2), (IQN + "b", 2)]
    first, second = source.alternatives
    assert (first.portals, first.iqn, first.lun) == (("192.0.2.1:3260",), IQN, 1)
    assert (second.portals, second.iqn, second.lun) == (("192.0.2.2:3260", "192.0.2.3:3260"), IQN + "b", 2)
    wrong = {**several, "target_iqns": [IQN, IQN, "disk"]}
    with pytest.raises(SourceError, match="an iSCSI name"):
        IscsiBackend.parse_connection("iscsi", wrong, {})


@pytest.mark.parametrize("installed", [True, False])
async def test_the_kernel_opens_what_asks_for_multipath_unless_a_setting_says_who(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/sbin/{name}" if installed else None)
    plain = {"target_portals": ["192.0.2.1", "192.0.2.2"], "target_iqns": [IQN] * 2, "target_luns": [1] * 2}
    several = {**plain, "target_iqns": [IQN, IQN + "b"]}
    enforced = {**plain, "enforce_multipath": True}
    for initiator, expected in (
        (None, [False, installed, True]),
        ("user", [False, False, False]),
        ("kernel", [True, True, True]),
    ):
        settings = IscsiSettings(portals=("192.0.2.1",), initiator=initiator)  # type: ignore[arg-type]
        backend = IscsiBackend("san", settings)
        sources = [IscsiBackend.parse_connection("iscsi", data, {}) for data in (plain, several, enforced)]
        assert [backend._by_kernel(source) for source in sources] == expected, initiator


@pytest.mark.parametrize(
    "setting",
    [
        {"initiator_name": IQN},
        {"header_digest": "crc32c"},
        {
            "chap_username": "a",
            "chap_password": "b",
            "mutual_chap_username": "c",
            "mutual_chap_password": "d",
        },
    ],
)
def test_what_the_kernels_initiator_is_not_told_is_refused(setting: dict[str, Any]) -> None:
    IscsiSettings(portals=("192.0.2.1",), **setting)
    with pytest.raises(ValueError, match='with initiator = "kernel"'):
        IscsiSettings(portals=("192.0.2.1",), initiator="kernel", **setting)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_portal", None),
        ("target_portal", 3),
        ("target_portal", "a b"),
        ("target_portal", "192.0.2.1:99999"),
        ("target_iqn", None),
        ("target_iqn", ["x"]),
        ("target_iqn", "volume-1"),
        ("target_lun", None),
        ("target_lun", "1"),
        ("target_lun", True),
        ("target_lun", -1),
        ("target_portals", "192.0.2.1"),
        ("target_portals", ["192.0.2.1", "192.0.2.2"]),
        ("target_portals", [1]),
        ("target_luns", ["1"]),
        ("auth_method", "SRP"),
        ("auth_username", None),
        ("auth_password", 7),
        ("auth_password", ""),
    ],
)
def test_a_wrong_field_is_named(key: str, value: Any) -> None:
    wrong = {**CINDER, "target_iqns": [IQN], "target_luns": [1], key: value}
    if key in ("target_iqn", "target_lun"):
        del wrong["target_iqns"], wrong["target_luns"]
    with pytest.raises(SourceError) as caught:
        IscsiBackend.parse_connection("iscsi", wrong, {})
    assert key.removesuffix("s").rpartition("_")[0] in str(caught.value)
    assert "hidden" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from([*CINDER, "target_portals", "target_iqns", "target_luns"]), JSON),
    st.booleans(),
)
def test_any_connection_info_is_a_source_or_a_source_error(data: dict[str, Any], mostly_right: bool) -> None:
    with refusals_in_one_line():
        check(IscsiBackend.parse_connection("iscsi", {**CINDER, **data} if mostly_right else data, {}))


@given(
    st.text(max_size=80)
    | st.text("/%@:[]iqn.019aA-", max_size=60).map("//".__add__)
    | st.builds(
        "//{}/iqn.{}/{}".format, st.text(string.printable, max_size=20), st.text(max_size=9), st.integers()
    ),
    st.dictionaries(st.sampled_from(list(ACCOUNT)), st.text(max_size=300)),
)
def test_any_url_is_a_source_or_a_source_error(rest: str, environment: dict[str, str]) -> None:
    with refusals_in_one_line():
        check(IscsiBackend.parse_url(rest, environment))
    with refusals_in_one_line():
        settings, path = IscsiBackend.parse_prefix(rest, environment)
        assert settings.targets == path


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    try:
        yield
    except SourceError as exc:
        message = str(exc)
    else:
        return
    assert message.isprintable()


def check(source: IscsiSource) -> None:
    assert "/" not in source.name
    assert source.name.isprintable()
    hash(source)
    again = IscsiBackend.parse_url(source.url.removeprefix("iscsi:"), {})
    assert (again.iqn, again.lun, again.portals) == (source.iqn, source.lun, source.portals[:1])
    assert IscsiBackend("x", IscsiBackend.settings_for(source)).serves(source)


def test_serves() -> None:
    source = IscsiBackend.parse_url(f"//h/{IQN}/1", {})
    with_account = IscsiBackend.parse_url(f"//h/{IQN}/1", ACCOUNT)
    account = {"chap_username": "ann", "chap_password": "hidden"}

    def serves(what: IscsiSource, *portals: str, **more: Any) -> bool:
        return IscsiBackend("x", IscsiSettings(portals=portals, **more)).serves(what)

    assert serves(source, "h")
    assert serves(source, "g", "h:3260")
    assert not serves(source, "g")
    assert not serves(source, "h:1")
    assert serves(source, "h", **account)
    assert serves(with_account, "h", **account)
    assert not serves(with_account, "h")
    assert not serves(with_account, "h", **{**account, "chap_password": "other"})
    assert serves(source, "h", targets=(IQN,))
    assert not serves(source, "h", targets=(IQN + "b",))


def test_an_account_of_the_volume_s_own_keeps_what_is_configured_for_its_portal() -> None:
    """As Cinder's targets have it."""
    source = IscsiSource(portals=("h:3260",), iqn=IQN, lun=1, chap_username="u", chap_password="p")
    configured = IscsiBackend("san", IscsiSettings(portals=("g", "h"), timeout=7, initiator="kernel"))
    assert not configured.serves(source)
    settings = configured.settings_like(source)
    assert settings is not None
    assert (settings.timeout, settings.initiator) == (7, "kernel")
    assert IscsiBackend("x", settings).serves(source)
    assert IscsiBackend("san", IscsiSettings(portals=("g",))).settings_like(source) is None
    both = {
        "chap_username": "u",
        "chap_password": "p",
        "mutual_chap_username": "v",
        "mutual_chap_password": "q",
    }
    with pytest.raises(SourceError, match="mutual_chap_username: expected none"):
        configured.settings_like(IscsiSource(portals=("h:3260",), iqn=IQN, lun=1, **both))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "portals"),
        ({"portals": []}, "portals"),
        ({"portals": ["a:b:c"]}, "ADDRESS"),
        ({"portals": ["h"], "targets": ["x"]}, "iSCSI name"),
        ({"portals": ["h"], "initiator_name": "me"}, "iSCSI name"),
        ({"portals": ["h"], "chap_username": "ann"}, "chap_password"),
        ({"portals": ["h"], "chap_password": "hidden"}, "chap_username"),
        (
            {"portals": ["h"], "chap_username": "a", "chap_password": "b", "chap_password_file": "c"},
            "chap_password",
        ),
        ({"portals": ["h"], "mutual_chap_username": "a", "mutual_chap_password": "b"}, "chap_username"),
        ({"portals": ["h"], "chap_username": "a", "chap_password": "b" * 256}, "255"),
        ({"portals": ["h"], "header_digest": "md5"}, "header_digest"),
        ({"portals": ["h"], "queue_depth": 0}, "queue_depth"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, IscsiSettings)


def test_the_initiators_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "initiatorname.iscsi"
    monkeypatch.setattr("volfs.backends.iscsi.INITIATOR_FILE", file)
    monkeypatch.setattr("socket.gethostname", lambda: "Node_1.Example")
    assert default_initiator_name() == "iqn.2026-01.org.volfs:node-1.example"
    file.write_text("## comment\nInitiatorName=iqn.1993-08.org.debian:01:abc\n")
    assert default_initiator_name() == "iqn.1993-08.org.debian:01:abc"
    file.write_text("InitiatorName=nonsense\n")
    assert default_initiator_name() == "iqn.2026-01.org.volfs:node-1.example"
