"""Secrets as canaries: given to volfs in every way there is, and looked for wherever somebody might see them.

In the log at its most talkative, in what status, ls, info and extended attributes tell, in arguments and environment of
the daemon and of all that it starts, and in every file of the runtime directory and of those for temporary files: while
volumes are attached, read, written and detached, when that fails, and after a daemon was killed and started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mounts import Mount, mounted, run_volfs, wait_until
from services import MIB, Services
from test_daemon import everything_shown
from volumes import Storage, random_bytes

from volfs import api, control
from volfs.backends import backend_class, caller_environment
from volfs.backends.brick_target import ConnectorSettings, make_target
from volfs.backends.iscsi_login import Login
from volfs.config import Config, add_prefixes
from volfs.errors import VolfsError
from volfs.source import parse_connection_info, parse_source

CANARY = "AQcanaryOfThisTest000000000000000000000000=="


class Watch:
    """Arguments and environment of a process and of all that it starts, looked at all the time."""

    def __init__(self, pid: int) -> None:
        self.seen: set[bytes] = set()
        self.processes: set[int] = set()
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.005):
            waiting = [self._pid]
            while waiting:
                pid = waiting.pop()
                self.processes.add(pid)
                with contextlib.suppress(OSError):  # it has ended
                    for children in Path(f"/proc/{pid}/task").glob("*/children"):
                        waiting += map(int, children.read_text().split())
                    for name in ("cmdline", "environ"):
                        self.seen.add(Path(f"/proc/{pid}/{name}").read_bytes())


class Place:
    """Where one daemon after the other keeps its files, and nobody else."""

    def __init__(self, directory: Path, secrets: Sequence[str]) -> None:
        self.directory = directory
        self.secrets = [secret.encode() for secret in secrets]
        self.runtime, self.temporary = directory / "run", directory / "tmp"
        for path in (self.runtime, self.temporary):
            path.mkdir(mode=0o700)
        self.environment = {"XDG_RUNTIME_DIR": str(self.runtime), "TMPDIR": str(self.temporary)}

    def assert_hidden(self, what: str, shown: str | bytes) -> None:
        data = shown.encode(errors="surrogateescape") if isinstance(shown, str) else shown
        for secret in self.secrets:
            assert secret not in data, f"{what}: ...{data[max(0, data.find(secret) - 200) :][:300]!r}"

    def files_with_secrets(self) -> list[Path]:
        """Those of which somebody else may read none."""
        found = []
        for directory, directories, names in os.walk(self.directory):
            directories[:] = [name for name in directories if name != "mnt"]  # which may be dead
            for path in (Path(directory, name) for name in names if name != "volfs.toml"):
                if not stat.S_ISREG(path.lstat().st_mode):
                    continue
                data = path.read_bytes()
                if any(secret in data for secret in self.secrets):
                    assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
                    found.append(path)
        return found


@pytest.fixture
def short_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")


@contextlib.contextmanager
def daemon(place: Place, config: str, env: dict[str, str], name: str) -> Iterator[Mount]:
    """A daemon that logs all there is; what it shows, and started, is looked through at the end."""
    path = place.directory / "volfs.toml"
    path.touch(0o600)
    path.write_text(config)
    directory = place.directory / name
    directory.mkdir()
    options = ["--config", str(path), "-v"]
    env = {**place.environment, **env}
    mountpoint = place.directory / "mnt"
    with (
        mounted(directory, [], options, env, mountpoint=mountpoint) as mount,
        Watch(mount.process.pid) as watch,
    ):
        yield mount
    place.assert_hidden("log", mount.log)
    for seen in watch.seen:
        place.assert_hidden("arguments or environment", seen)
    assert watch.seen


def attach(
    place: Place, mount: Mount, info: dict[str, Any], *arguments: str
) -> subprocess.CompletedProcess[str]:
    environment = {**mount.environment, "VOLFS_SOCKET": str(mount.socket)}
    done = run_volfs("attach", "--connection-info", "-", *arguments, env=environment, input=json.dumps(info))
    place.assert_hidden("attach", done.stdout + done.stderr)
    return done


def exercise(
    place: Place, mount: Mount, listed: Path, good: dict[str, Any], bad: Sequence[dict[str, Any]]
) -> Path:
    """Attach, write, read and detach, in vain as well; returns the file of what is attached in the end."""
    content = random_bytes(MIB)
    for name in ("first", "second"):
        done = attach(place, mount, good, "--name", name)
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        with path.open("r+b") as file:
            file.write(content)
        assert path.read_bytes() == content
        if name == "first":
            place.assert_hidden("shown", everything_shown(mount, listed, path))
            for arguments in (
                ("info", path),
                ("info", path, "--json"),
                ("ls", path.parent),
                ("ls", path.parent, "--json"),
            ):
                told = mount.volfs(*arguments)
                assert told.returncode == 0, told.stderr
                place.assert_hidden("told", told.stdout + told.stderr)
        assert place.files_with_secrets() == []
        if name == "first":
            mount.volfs("detach", name)
    for number, info in enumerate(bad):
        assert attach(place, mount, info, "--name", f"bad-{number}").returncode == 1
        assert place.files_with_secrets() == []
    place.assert_hidden("shown", everything_shown(mount, listed, path))
    return path


def kill_and_start_again(place: Place, mount: Mount, path: Path, config: str, env: dict[str, str]) -> None:
    """With the volume open."""
    with contextlib.suppress(OSError), path.open("r+b", 0) as file:
        file.write(b"x")
        mount.process.kill()
        mount.process.wait()
    left = place.files_with_secrets()
    with daemon(place, config, env, "again") as again:
        assert not [path for path in left if path.exists()]
        assert place.files_with_secrets() == []
        place.assert_hidden("shown", everything_shown(again))


@pytest.mark.slow
def test_chap_passwords_are_found_nowhere(short_place: Path, storage: Storage, services: Services) -> None:
    """Of both directions: in the configuration, in a connection info, in a URL and in a client's environment."""
    stored = storage.make("iscsi", MIB, chap="mutual")
    account = {key.removeprefix("LIBISCSI_CHAP_").lower(): value for key, value in stored.environment.items()}
    wrong = "canary-of-a-password"
    place = Place(short_place, [account["password"], account["target_password"], wrong])
    config = (
        f'[backends.san]\ndriver = "iscsi"\nportals = ["{services.portal}"]\ntargets = ["{stored.place[0]}"]\n'
        f'chap_username = "{account["username"]}"\nchap_password = "{account["password"]}"\n'
        f'mutual_chap_username = "{account["target_username"]}"\n'
        f'mutual_chap_password = "{account["target_password"]}"\ntimeout = 5\n'
    )
    data = {
        "target_portal": services.portal,
        "target_iqn": stored.place[0],
        "target_lun": 1,
        "auth_method": "CHAP",
        "auth_username": account["username"],
        "auth_password": account["password"],
    }

    def info(**changes: Any) -> dict[str, Any]:
        return {"driver_volume_type": "iscsi", "data": data | changes}

    bad = [
        info(auth_password=wrong),
        info(target_portal="127.0.0.1:1"),
        info(target_lun=9),
        info(target_iqn="iqn.2026-01.org.example:none"),
    ]
    with daemon(place, config, {}, "one") as mount:
        listed = mount.path.joinpath("san", *stored.place)
        path = exercise(place, mount, listed, info(), bad)
        url = f"iscsi://{services.portal}/{stored.place[0]}/1"
        with_account = url.replace("//", f"//{account['username']}%{account['password']}@")
        for number, (source, env) in enumerate(((url, stored.environment), (with_account, {}))):
            env = {**env, **mount.environment, "VOLFS_SOCKET": str(mount.socket)}
            done = run_volfs("attach", source, "--name", f"by-url-{number}", "--json", env=env)
            assert done.returncode == 0, done.stderr
            place.assert_hidden("attach", done.stdout + done.stderr)
        place.assert_hidden("shown", everything_shown(mount, listed, path))
        kill_and_start_again(place, mount, path, config, {})


@pytest.mark.slow
def test_a_cephx_key_is_found_nowhere(short_place: Path, storage: Storage, services: Services) -> None:
    """In the configuration, and in the keyring's text of a connection info."""
    stored = storage.make("rbd", MIB)
    match = re.search(r"key = (\S+)", services.keyring.read_text())
    assert match is not None
    key = match[1]
    wrong = key[:6] + key[6:-2].swapcase() + key[-2:]
    place = Place(short_place, [key, wrong])
    config = (
        f'[backends.ceph]\ndriver = "rbd"\nconf = "{services.ceph_conf}"\nid = "{services.user}"\nkey = "{key}"\n'
        'pools = ["volumes"]\ntimeout = 5\n'
    )

    def info(given: str = key, **changes: Any) -> dict[str, Any]:
        data = {
            "name": stored.url.removeprefix("rbd:"),
            "auth_username": services.user,
            "hosts": [],
            "ports": [],
        }
        keyring = f"[client.{services.user}]\n\tkey = {given}\n"
        return {"driver_volume_type": "rbd", "data": data | {"keyring": keyring} | changes}

    bad = [info(wrong), info(name="volumes/none"), info(hosts=[1])]
    env = {"CEPH_CONF": str(services.ceph_conf)}
    with daemon(place, config, env, "one") as mount:
        mount.environment.update(env)
        try:
            for number, each in enumerate(bad[-1:]):
                assert attach(place, mount, each, "--name", f"wrong-{number}").returncode == 2
            path = exercise(place, mount, mount.path.joinpath("ceph", *stored.place), info(), bad[:-1])
            kill_and_start_again(place, mount, path, config, env)
        finally:
            stored.evict()


@pytest.mark.slow
def test_a_daemon_started_on_demand_keeps_no_password_of_its_first_client(
    tmp_path: Path, volumes: Path
) -> None:
    """In its environment, it would show it for as long as it runs, and hand it to all that it starts."""
    (volumes / "disk").write_bytes(b"content")
    variables = [f"LIBISCSI_CHAP_{key}" for key in ("PASSWORD", "TARGET_PASSWORD")]
    runtime = tmp_path / "r"
    runtime.mkdir(mode=0o700)
    env = {"XDG_RUNTIME_DIR": str(runtime), "VOLFS_SOCKET": "", **dict.fromkeys(variables, CANARY)}
    done = run_volfs("attach", f"file:{volumes}/disk", "--json", env=env)
    assert done.returncode == 0, done.stderr
    socket = str(runtime / "volfs" / "control")
    try:
        pid = api.status(socket_path=socket).pid
        for name in ("environ", "cmdline"):
            assert CANARY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    finally:
        done = run_volfs("umount", runtime / "volfs" / "control.mnt", "--force", env=env)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not os.path.exists(socket), "it has ended")
    for path in runtime.rglob("*"):
        assert not path.is_file() or CANARY not in path.read_text(), path


def test_no_repr_no_text_and_no_traceback_shows_a_secret() -> None:
    """Of whatever holds one on its way from a client or a configuration to a library."""
    iscsi = {
        "target_portal": "127.0.0.1:3260",
        "target_iqn": "iqn.2026-01.org.example:x",
        "target_lun": 1,
        "auth_method": "CHAP",
        "auth_username": "user",
        "auth_password": CANARY,
    }
    rbd = {"name": "a/b", "keyring": f"[client.x]\nkey = {CANARY}\n", "hosts": [], "ports": []}
    infos = [
        {"driver_volume_type": "iscsi", "data": iscsi},
        {"driver_volume_type": "rbd", "data": rbd},
        {"driver_volume_type": "nfs", "data": {"export": "a:/b", "password": CANARY}},
    ]
    environment = {f"LIBISCSI_CHAP_{key}": CANARY for key in ("PASSWORD", "TARGET_PASSWORD")}
    environment |= {f"LIBISCSI_CHAP_{key}": "user" for key in ("USERNAME", "TARGET_USERNAME")}
    environment["CEPH_ARGS"] = f"--id x --key={CANARY}"
    sources = [parse_connection_info(info, {}) for info in infos]
    sources += [
        parse_source("iscsi://127.0.0.1/iqn.x:y/1", environment),
        parse_source("rbd:a/b", environment),
    ]
    settings = [backend_class(source.driver).settings_for(source) for source in sources]
    backends = [
        backend_class(source.driver)("b", each) for source, each in zip(sources, settings, strict=True)
    ]
    config = add_prefixes(Config(), ["iscsi://127.0.0.1", "rbd:a"], environment)
    held: list[object] = [*sources, *settings, *backends, config, config.backends]
    held += [control.Attach(connection_info=info, environment=environment) for info in infos]
    held += [control.Status(connection_info=info, environment=environment) for info in infos]
    held.append(make_target("x", "nfs", infos[2]["data"], ConnectorSettings()))  # type: ignore[arg-type]
    held.append(Login(("p",), "i", "user", CANARY, "user", CANARY))
    for each in held:
        assert CANARY not in f"{each!r} {each}", type(each)
        assert CANARY not in f"{getattr(each, 'url', '')} {getattr(each, 'name', '')}"
    assert (
        caller_environment(environment)["LIBISCSI_CHAP_PASSWORD"] == CANARY
    )  # the test holds what it looks for
    for info in infos:
        for key, value in {**info["data"], "access_mode": "rw"}.items():  # type: ignore[dict-item]
            wrong = [CANARY, {}] if CANARY in str(value) else [1, {}]
            try:
                parse_connection_info({**info, "data": {**info["data"], key: wrong}}, environment)  # type: ignore[dict-item]
            except VolfsError:
                assert CANARY not in traceback.format_exc()
