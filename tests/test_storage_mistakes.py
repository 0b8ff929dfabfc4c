"""What a storage says no to, or does not say at all: unknown names, wrong secrets, and nobody who answers.

Each is one line with the storage's errno, within the configured deadline, which the line names. Nothing is left on the
storage or in the daemon, whose other backends go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Run, failed, ran, succeeded
from mounts import VOLFS, Mount, mounted, wait_until
from services import MIB, ImageFactory, Services, skip_or_fail
from targets import free_port
from volumes import Storage, raises, random_bytes

import volfs
from volfs import api

# What of this matters while writing code, test_cli.py and test_api.py have for each driver.
pytestmark = pytest.mark.slow

SECONDS = 1  # the configured timeout of backends that do not answer; librados takes whole ones
IQN = "iqn.2026-01.org.volfs:nosuch"
WRONG_KEY = "AQBzMJFnAAAAABAAqpPBPTGLwBrPHqXxLBEIhA=="
ROUTELESS = "198.51.100.1"  # of TEST-NET-2: no host has it


# Portals and monitors that do not answer


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def dropping() -> Iterator[int]:
    """A port whose backlog is full: the kernel drops what comes, as a firewall does."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    yield free_port()


PORTS = {"silent": silent, "dropping": dropping, "refusing": refusing}


@dataclass
class Unreachable:
    """A daemon with backends that nobody answers for, named after how, and a file backend that works."""

    mount: Mount
    portals: dict[str, str]
    environments: dict[str, dict[str, str]]  # of clients of those clusters

    def assert_alive(self) -> None:
        assert (self.mount.path / "raw" / "disk").read_bytes() == b"here"
        wait_until(lambda: not self._status().open, "nothing is open")
        assert self._status().attached == []

    def _status(self) -> api.StatusReply:
        return api.status(socket_path=str(self.mount.socket))


@pytest.fixture(scope="module")
def unreachable(services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unreachable]:
    directory = tmp_path_factory.mktemp("s")
    (directory / "raw").mkdir()
    (directory / "raw" / "disk").write_bytes(b"here")
    toml = [f'[backends.raw]\ndriver = "file"\npath = "{directory}/raw"\n']
    portals, environments = {}, {}
    with contextlib.ExitStack() as stack:
        for kind, port in PORTS.items():
            number = stack.enter_context(port())
            portals[kind] = f"127.0.0.1:{number}"
            conf = directory / f"{kind}.conf"
            conf.write_text(f"[global]\nmon host = v2:127.0.0.1:{number}\nkeyring = {services.keyring}\n")
            environments[kind] = {"CEPH_CONF": str(conf), "CEPH_ARGS": f"--id {services.user}"}
            toml.append(
                f'[backends.san-{kind}]\ndriver = "iscsi"\nportals = ["{portals[kind]}"]\ntimeout = {SECONDS}\n'
                f'[backends.ceph-{kind}]\ndriver = "rbd"\nconf = "{conf}"\nid = "{services.user}"\n'
                f"timeout = {SECONDS}\n"
            )
        (directory / "volfs.toml").write_text("\n".join(toml))
        mount = stack.enter_context(mounted(directory, [], ["-c", str(directory / "volfs.toml")]))
        yield Unreachable(mount, portals, environments)


ANSWERS = {
    "silent": (errno.ETIMEDOUT, f"no answer within {SECONDS} s"),
    "dropping": (errno.ETIMEDOUT, f"no answer within {SECONDS} s"),
    "refusing": (errno.ECONNREFUSED, "connect: Connection refused"),
}


@pytest.mark.parametrize("kind", PORTS)
def test_an_iscsi_portal_that_does_not_answer(run: Run, unreachable: Unreachable, kind: str) -> None:
    portal = unreachable.portals[kind]
    number, reason = ANSWERS[kind]
    environment = {"VOLFS_SOCKET": str(unreachable.mount.socket)}
    source = f"iscsi://{portal}/{IQN}/1"

    begun = time.monotonic()
    done = run("attach", source, **environment)
    elapsed = time.monotonic() - begun
    what = f"target {IQN}: " if number == errno.ETIMEDOUT else ""
    failed(done, 1, f"iscsi portal {portal}: {what}{reason}")
    assert number != errno.ETIMEDOUT or SECONDS <= elapsed < SECONDS + 2

    with raises(number):
        os.listdir(unreachable.mount.path / f"san-{kind}")
    assert f"iscsi portal {portal}: " in unreachable.mount.log
    with raises(number) as caught:
        volfs.open_volume(source, "r+b", socket_path=environment["VOLFS_SOCKET"])
    assert isinstance(caught.value, volfs.BackendTimeout if number == errno.ETIMEDOUT else volfs.BackendError)
    unreachable.assert_alive()


@pytest.mark.parametrize("kind", PORTS)
def test_a_monitor_that_does_not_answer(run: Run, unreachable: Unreachable, kind: str) -> None:
    """librados goes on trying those that refuse, too, until the deadline."""
    environment = {"VOLFS_SOCKET": str(unreachable.mount.socket), **unreachable.environments[kind]}
    begun = time.monotonic()
    done = run("attach", "rbd:volumes/nosuch", **environment)
    assert SECONDS <= time.monotonic() - begun < SECONDS + 3
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done
    where = f"volfs: Ceph cluster ({environment['CEPH_CONF']}, client.volfs): "
    assert done.err.startswith(where), done.err
    assert f"no answer within {SECONDS} s" in done.err
    with raises(errno.ETIMEDOUT):
        os.listdir(unreachable.mount.path / f"ceph-{kind}")
    unreachable.assert_alive()


def test_a_storage_that_no_route_leads_to(services: Services, tmp_path: Path) -> None:
    """In a network namespace of its own, which has no routes at all."""
    if os.geteuid() != 0:
        skip_or_fail("root", "only root can make a network namespace")
    done = subprocess.run(
        ["unshare", "--net", *VOLFS, "ls", f"iscsi://{ROUTELESS}"],
        capture_output=True,
        text=True,
        check=False,
    )
    failed(ran(done), 1, f"iscsi portal {ROUTELESS}:3260: connect: Network is unreachable")


def test_a_portal_whose_name_nobody_knows(run: Run) -> None:
    done = run("info", f"iscsi://nowhere.invalid/{IQN}/1")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    # The resolver's words depend on whether it reaches anybody.
    assert done.err.startswith("volfs: iscsi portal nowhere.invalid:3260: "), done.err
    assert "Errno" not in done.err


# What a storage does not have


@pytest.fixture(scope="module")
def storages(module_storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    prefixes = [module_storage.prefix("rbd"), module_storage.prefix("iscsi")]
    with mounted(tmp_path_factory.mktemp("d"), prefixes, env=module_storage.environment("rbd")) as mount:
        yield mount


UNKNOWN = {
    "pool": ("rbd:nosuch/x", "rbd:nosuch: no such pool"),
    "namespace": ("rbd:volumes/nosuch/x", "rbd:volumes/nosuch: no such namespace"),
    "image": ("rbd:volumes/nosuch", "rbd:volumes/nosuch: no such image"),
    "snapshot of nothing": ("rbd:volumes/nosuch@x", "rbd:volumes/nosuch@x: no such image"),
    "snapshot": ("rbd:volumes/{image}@nosuch", "rbd:volumes/{image}@nosuch: no such snapshot"),
    "target": (
        f"iscsi://{{portal}}/{IQN}/1",
        f"iscsi portal {{portal}}: target {IQN}: no such target, or not for {{initiator}}",
    ),
    "LUN": ("{lun}99", "{lun}99: no LUN 199"),
}


@pytest.fixture(scope="module")
def words(module_storage: Storage) -> dict[str, str]:
    from volfs.backends.iscsi import default_initiator_name

    services = module_storage.services
    return {
        "image": module_storage.make("rbd", MIB).place[-1],
        "portal": services.portal,
        "lun": services.luns["open"].url,
        "initiator": default_initiator_name(),
    }


@pytest.mark.parametrize(("source", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_a_storage_does_not_have(
    run: Run, storages: Mount, words: dict[str, str], source: str, message: str
) -> None:
    """By the command and by the Python call alike; neither opens nor makes anything."""
    url, line = source.format(**words), message.format(**words)
    environment = {"VOLFS_SOCKET": str(storages.socket), **storages.environment}
    for command in (["info", url], ["attach", url], ["copy", "-q", __file__, url]):
        failed(run(*command, **environment), 1, line)
    status = api.status(socket_path=str(storages.socket))
    assert (status.attached, status.open) == ([], [])


def test_paths_that_a_storage_does_not_have(storages: Mount, words: dict[str, str]) -> None:
    iqn = words["lun"].split("/")[3]
    for place in (
        "rbd/nosuch",
        "rbd/volumes/nosuch",
        "rbd/volumes/nosuch@x",
        f"rbd/volumes/{words['image']}@nosuch",
        f"rbd/volumes/{words['image']}@",
        "rbd/volumes/nosuch/x",
        "rbd/volumes/../../x",
        "iscsi/nosuch",
        f"iscsi/{IQN}",
        f"iscsi/{iqn}/199",
        f"iscsi/{iqn}/x",
        f"iscsi/{iqn}/01",
        f"iscsi/{iqn}/-1",
        f"iscsi/{iqn}/65536",
    ):
        with raises(errno.ENOENT):
            os.open(storages.path / place, os.O_RDONLY)
        path = storages.path / place
        with raises(errno.EPERM if path.parent.exists() else errno.ENOENT):
            os.open(path, os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize("place", ["rbd", "rbd/volumes", "iscsi", "iscsi/{iqn}"])
def test_names_that_no_volume_can_have(storages: Mount, words: dict[str, str], place: str) -> None:
    directory = storages.path / place.format(iqn=words["lun"].split("/")[3])
    for name, number in (
        (b"\xff\xfe", errno.ENOENT),
        (b"a\nb", errno.ENOENT),
        (b"x" * 255, errno.ENOENT),
        (b"x" * 256, errno.ENAMETOOLONG),
        (b"x" * 300, errno.ENAMETOOLONG),
    ):
        with raises(number):
            os.stat(os.path.join(os.fsencode(directory), name))
    assert "Traceback" not in storages.log


def test_images_that_no_file_can_be_named_after(
    services: Services, storages: Mount, new_image: ImageFactory
) -> None:
    """They do not spoil the listing of the others."""
    long, other = "x" * 300, new_image(MIB)
    for name in ("..", long):
        new_image(MIB, name=name)
    names = os.listdir(storages.path / "rbd" / "volumes")
    assert other.name in names
    assert not {"..", long} & set(names)


# Secrets that are wrong


def ceph_arguments(tmp_path: Path, kind: str) -> str:
    """CEPH_ARGS with a keyring that will not do."""
    keyring = tmp_path / "keyring"
    if kind == "wrong":
        keyring.write_text(f"[client.volfs]\nkey = {WRONG_KEY}\n")
    return f"--id {'nobody' if kind == 'unknown user' else 'volfs'} --keyring {keyring}"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wrong", "RADOS permission denied (error connecting to the cluster)"),
        ("missing", "RADOS object not found (error connecting to the cluster); is its keyring there?"),
    ],
)
def test_a_key_that_ceph_refuses(
    run: Run, services: Services, storages: Mount, tmp_path: Path, kind: str, reason: str
) -> None:
    environment = {"CEPH_CONF": str(services.ceph_conf), "CEPH_ARGS": ceph_arguments(tmp_path, kind)}
    line = f"Ceph cluster ({services.ceph_conf}, client.volfs): {reason}"
    for command in (["ls", "rbd:"], ["info", "rbd:volumes/x"], ["attach", "rbd:volumes/x"]):
        done = run(*command, VOLFS_SOCKET=str(storages.socket), **environment)
        failed(done, 1, line)
        assert WRONG_KEY not in done.err


@pytest.mark.parametrize("account", ["", "nobody%wrong-secret@", "{user}%wrong-secret@"])
def test_a_secret_that_a_target_refuses(
    run: Run, services: Services, storages: Mount, words: dict[str, str], account: str
) -> None:
    lun = services.luns["chap"]
    assert lun.initiator is not None
    account = account.format(user=lun.initiator.user)
    url = lun.url.replace("//", f"//{account}")
    user = account.partition("%")[0]
    how = f"CHAP user {user!r}" if user else "without CHAP"
    line = (
        f"iscsi portal {lun.portal}: target {lun.iqn}: login refused ({how}, initiator {words['initiator']}): "
        "Authentication failure(513)"
    )
    for command in (["info", url], ["attach", url]):
        failed(run(*command, VOLFS_SOCKET=str(storages.socket)), 1, line)
    with raises(errno.EACCES):
        volfs.open_volume(url, socket_path=str(storages.socket))
    assert "wrong-secret" not in storages.log


# Paths in the caller's environment


@pytest.mark.parametrize("way", ["CEPH_CONF", "--conf", "CEPH_ARGS"])
def test_relative_paths_are_the_callers(
    services: Services, module_storage: Storage, storages: Mount, tmp_path: Path, way: str
) -> None:
    """The daemon that serves him, and one that he starts in the background, have another working directory."""
    image = module_storage.make("rbd", MIB, random_bytes(MIB))
    shutil.copy(services.ceph_conf, tmp_path / "my.conf")
    shutil.copy(services.keyring, tmp_path / "my key")
    conf = ["--conf", "my.conf"] if way == "--conf" else []
    arguments = f"--id {services.user} --keyring 'my key'" + (" -c my.conf" if way == "CEPH_ARGS" else "")
    environment = {
        **os.environ,
        "CEPH_ARGS": arguments,
        "CEPH_CONF": "my.conf" if way == "CEPH_CONF" else "",
        "VOLFS_SOCKET": str(storages.socket),
    }

    def call(*command: str | Path, **more: str) -> str:
        done = subprocess.run(
            [*VOLFS, *map(str, command)],
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        return succeeded(ran(done))

    path = Path(call("attach", image.url, *conf).strip())
    assert path.read_bytes() == image.read()
    call("detach", path)

    tmp_path.chmod(0o700)
    (tmp_path / "mnt").mkdir()
    call("mount", "mnt", "rbd:volumes", "--daemon", *conf, VOLFS_SOCKET=str(tmp_path / "control"))
    try:
        assert (tmp_path / "mnt" / "rbd" / "volumes" / image.place[-1]).read_bytes() == image.read()
    finally:
        call("umount", "mnt")
