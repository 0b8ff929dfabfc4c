"""The real services the tests run against, and fresh volumes on them.

conftest.py imports the fixtures from here. `services` starts the private Ceph and iSCSI target once a session; the
factories make a volume for one test and remove it afterwards; the functions further up look at volumes straight at
the backend, past volfs. A removal that fails fails the test: it means that somebody still has the volume open.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

import pytest

TOP = Path(__file__).resolve().parent.parent
SCRIPT = TOP / "scripts" / "services"
MIB = 1024**2
SLOWER = 5 if "VOLFS_VM" in os.environ else 1  # how much longer a deadline is in the guest
WATCH_SECONDS = 45  # librados lets go of the watch of a killed client after 30 s


def is_required(service: str) -> bool:
    return service in os.environ.get("VOLFS_REQUIRE", "").split(",")


def skip_or_fail(service: str, reason: str) -> NoReturn:
    """What a test does without a service (fuse, ceph, iscsi, root, vm): VOLFS_REQUIRE tells which must be there."""
    if is_required(service):
        pytest.fail(f"{service} is required: {reason}", pytrace=False)
    pytest.skip(f"{service}: {reason}")


def load_script(path: Path) -> ModuleType:
    """One of scripts/ as a module: scripts/services knows the standing LUNs and how to make more of them."""
    loader = SourceFileLoader(f"volfs_{path.name}_script", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


script = load_script(SCRIPT)


@dataclass(frozen=True)
class Account:
    """A user of CHAP."""

    user: str
    secret: str = field(repr=False)


@dataclass(frozen=True)
class Lun:
    """An iSCSI volume, and the file it is made of."""

    portal: str
    iqn: str
    size: int
    sector_size: int
    readonly: bool
    backing: Path
    initiator: Account | None = None  # we have to prove ourselves with this
    target: Account | None = None  # and it proves itself with this
    number: int = 1

    @property
    def url(self) -> str:
        return f"iscsi://{self.portal}/{self.iqn}/{self.number}"

    @property
    def environment(self) -> dict[str, str]:
        """The accounts, as the tools of libiscsi take them."""
        accounts = [(a.user, a.secret) for a in (self.initiator, self.target) if a]
        return dict(script.libiscsi_environment(accounts))

    def sha256(self) -> str:
        """Of what is in the backing file."""
        with self.backing.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Image:
    """An RBD image."""

    services: "Services" = field(repr=False)
    pool: str
    name: str
    size: int
    namespace: str = ""

    @property
    def spec(self) -> str:
        return "/".join(part for part in (self.pool, self.namespace, self.name) if part)

    @property
    def url(self) -> str:
        return f"rbd:{self.spec}"

    def read(self, snapshot: str = "") -> bytes:
        """All of it, by the distribution's own librbd module. For small images."""
        import rbd

        with (
            self._pool() as pool,
            rbd.Image(pool, self.name, snapshot=snapshot.removeprefix("@") or None, read_only=True) as image,
        ):
            return bytes(image.read(0, image.size()))

    def sha256(self, snapshot: str = "") -> str:
        """Of all of it, by the rbd tool, in constant memory."""
        command = ["rbd", "export", "--no-progress", self.spec + snapshot, "-"]
        environment = self.services.environment
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as export:
            digest = hashlib.file_digest(export.stdout, "sha256").hexdigest()
        if export.returncode:
            raise subprocess.CalledProcessError(export.returncode, command)
        return digest

    def write(self, data: bytes, offset: int = 0) -> None:
        """By the distribution's own librbd module."""
        import rbd

        with self._pool() as pool, rbd.Image(pool, self.name) as image:
            image.write(data, offset)

    def _pool(self) -> contextlib.AbstractContextManager[Any]:
        return self.services.open_pool(self.pool, self.namespace)

    def watchers(self) -> list[str]:
        """The addresses of who has it open for writing (or holds a lock); [] once everybody has closed it."""
        import rbd

        with self._pool() as pool, rbd.Image(pool, self.name, read_only=True) as image:
            return [watcher["addr"] for watcher in image.watchers_list()]

    def lockers(self) -> list[dict[str, Any]]:
        return list(self.services.json("rbd", "lock", "ls", "--format", "json", self.spec))

    def snapshot(self, name: str) -> str:
        """Take one; returns its "@name". Goes away with the image."""
        import rbd

        with self._pool() as pool, rbd.Image(pool, self.name) as image:
            image.create_snap(name)
        return f"@{name}"

    def resize(self, size: int) -> None:
        import rbd

        with self._pool() as pool, rbd.Image(pool, self.name) as image:
            image.resize(size)


@dataclass(frozen=True)
class Services:
    """What runs, and how to reach it."""

    var: Path
    ceph_conf: Path
    user: str  # for volfs: cephx name without "client.", with `profile rbd`
    keyring: Path
    admin_keyring: Path
    pools: tuple[str, ...]
    portal: str
    chap_secrets: Path
    luns: Mapping[str, Lun]  # the standing ones: open, chap, mutual, sector4k
    environment: Mapping[str, str] = field(repr=False)  # for tools; leads them here as client.admin

    def run(self, *command: str, data: bytes = b"", environment: Mapping[str, str] | None = None) -> bytes:
        """The output of a tool; CalledProcessError with its stderr as a note when it fails."""
        done = subprocess.run(
            command,
            input=data,
            capture_output=True,
            timeout=120 * SLOWER,
            check=False,
            env={**self.environment, **(environment or {})},
        )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(done.stderr.decode(errors="replace").strip())
            raise error
        return done.stdout

    def json(self, *command: str) -> Any:
        return json.loads(self.run(*command))

    @contextlib.contextmanager
    def open_pool(self, name: str, namespace: str = "") -> Iterator[Any]:
        """As client.admin, on one connection for all tests: to make one takes as long as most of what it is for."""
        if self.ceph_conf not in _clusters:
            import rados

            cluster = rados.Rados(conffile=str(self.ceph_conf), name="client.admin")
            cluster.connect()
            _clusters[self.ceph_conf] = cluster
        with _clusters[self.ceph_conf].open_ioctx(name) as pool:
            pool.set_namespace(namespace)
            yield pool


_clusters: dict[Path, Any] = {}  # connected, by configuration


def disconnect(services: Services) -> None:
    cluster = _clusters.pop(services.ceph_conf, None)
    if cluster is not None:
        cluster.shutdown()


def services_command(*arguments: str, var: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run scripts/services; var other than the default is another, private place."""
    return script_command(SCRIPT, *arguments, var=var, timeout=200 * SLOWER)


def script_command(
    program: Path, *arguments: str, var: Path | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run one of scripts/ that keep their state in a place."""
    return subprocess.run(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=dict(os.environ) if var is None else {**os.environ, "VOLFS_VAR": str(var)},
    )


def describe(var: Path) -> Services:
    """Services that were started in this place."""
    place = script.Place(var)
    portal = f"127.0.0.1:{script.read_state(place)['iscsi_port']}"
    accounts = script.chap_accounts(place)
    return Services(
        var=place.var,
        ceph_conf=place.conf,
        user="volfs",
        keyring=place.keyring("client.volfs"),
        admin_keyring=place.keyring("client.admin"),
        pools=script.POOLS,
        portal=portal,
        chap_secrets=place.chap,
        luns={lun.name: describe_lun(place, portal, lun, accounts[lun.name]) for lun in script.LUNS},
        environment=place.environment(),
    )


def describe_lun(place: Any, portal: str, lun: Any, accounts: list[tuple[str, str]]) -> Lun:
    initiator, target = [*(Account(*account) for account in accounts), None, None][:2]
    return Lun(
        portal=portal,
        iqn=lun.iqn,
        size=lun.size,
        sector_size=lun.sector_size,
        readonly=lun.readonly,
        backing=place.luns / lun.name,
        initiator=initiator,
        target=target,
    )


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    with running_services() as services:
        yield services


@contextlib.contextmanager
def running_services() -> Iterator[Services]:
    """Ceph and iSCSI target, up and proven; stopped at the end unless they were running before."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # tgtadm, losetup
    for service, programs in (("ceph", script.DAEMONS[1:]), ("iscsi", ("tgtd",)), ("ceph", script.TOOLS)):
        for program in programs:
            if not shutil.which(program):
                skip_or_fail(service, f"{program} is not installed (scripts/setup)")
    var = Path(os.environ.get("VOLFS_VAR") or TOP / "var")
    var.mkdir(parents=True, exist_ok=True)
    with (var / "services.users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        ran_before = services_command("status").returncode == 0
        started = services_command("start")
        if started.returncode:  # installed, but it does not work: never a reason to skip
            pytest.fail(started.stderr.strip(), pytrace=False)
        described = describe(var)
        try:
            yield described
        finally:
            disconnect(described)
        if not ran_before and is_last(users):
            services_command("stop")


def is_last(users: IO[str]) -> bool:
    """Whether no other test session uses the services; one that did not start them leaves them running."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def image(
    services: Services,
    size: int,
    *,
    pool: str = "volumes",
    name: str = "",
    namespace: str = "",
    options: tuple[str, ...] = (),
) -> Iterator[Image]:
    """A new image; `options` go to `rbd create` (--image-feature, --object-size, --data-pool, ...)."""
    made = Image(services, pool, name or f"test-{secrets.token_hex(4)}", size, namespace)
    if options:
        services.run("rbd", "create", "--size", f"{size}B", *options, made.spec)
    else:
        import rbd

        with services.open_pool(pool, namespace) as opened:
            rbd.RBD().create(opened, made.name, size)
    try:
        yield made
    finally:
        remove_image(made)


def remove_image(image: Image) -> None:
    """Waits for the watch of a client that was killed to run out."""
    import rbd

    deadline = time.monotonic() + WATCH_SECONDS
    with image.services.open_pool(image.pool, image.namespace) as pool:
        try:
            rbd.RBD().remove(pool, image.name)
        except rbd.ImageNotFound:
            return  # the test removed it
        except rbd.Error:  # it has snapshots, or a watcher
            pass
        else:
            return
    image.services.run("rbd", "snap", "purge", "--no-progress", image.spec)
    while image.watchers() and time.monotonic() < deadline:
        time.sleep(0.5)
    image.services.run("rbd", "rm", "--no-progress", image.spec)


@contextlib.contextmanager
def namespace(services: Services, pool: str = "volumes") -> Iterator[str]:
    """A new namespace of a pool; has to be empty at the end."""
    name = f"ns-{secrets.token_hex(4)}"
    services.run("rbd", "namespace", "create", f"{pool}/{name}")
    try:
        yield name
    finally:
        services.run("rbd", "namespace", "remove", f"{pool}/{name}")


@contextlib.contextmanager
def lun(
    services: Services, size: int, *, sector_size: int = 512, chap: str = "", readonly: bool = False
) -> Iterator[Lun]:
    """A new target with one LUN, zero-filled; chap is "" (open), "one-way" or "mutual"."""
    users = {"": (), "one-way": ("initiator",), "mutual": ("initiator", "target")}[chap]
    name = f"test-{secrets.token_hex(4)}"
    accounts = [(f"{name}-{user}", secrets.token_hex(8)) for user in users]
    tid = 1000 + secrets.randbelow(30000)
    place = script.Place(services.var)
    new = script.Lun(name, size, sector_size=sector_size, readonly=readonly)
    tgtadm = ("tgtadm", "--lld", "iscsi", "--op", "delete", "--mode")
    try:
        script.add_target(script.Runner(place), tid, new, accounts)
        yield describe_lun(place, services.portal, new, accounts)
    finally:
        # By force: a test that killed the daemon left its session behind.
        services.run(*tgtadm, "target", "--force", "--tid", str(tid))
        for user, _secret in accounts:
            services.run(*tgtadm, "account", "--user", user)
        (place.luns / name).unlink()


@contextlib.contextmanager
def loop(directory: Path, size: int, *, sector_size: int = 512) -> Iterator[Path]:
    """A new loop device on a sparse file."""
    if os.geteuid() != 0:
        skip_or_fail("root", "loop devices are root's")
    backing = directory / f"loop-{secrets.token_hex(4)}"
    with backing.open("wb") as file:
        file.truncate(size)
    losetup = ["losetup", "--find", "--show", "--sector-size", str(sector_size), str(backing)]
    attached = subprocess.run(losetup, capture_output=True, text=True, check=False)
    if attached.returncode:
        skip_or_fail("root", f"no loop device: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        backing.unlink()


ImageFactory = Callable[..., Image]
LunFactory = Callable[..., Lun]
LoopFactory = Callable[..., Path]


@pytest.fixture
def new_image(services: Services) -> Iterator[ImageFactory]:
    """new_image(size, pool=, name=, namespace=, options=): see `image`."""
    with contextlib.ExitStack() as stack:
        yield lambda size=64 * MIB, **how: stack.enter_context(image(services, size, **how))


@pytest.fixture
def new_namespace(services: Services) -> Iterator[Callable[..., str]]:
    """new_namespace(pool=): ask for it before new_image, so that it outlives the images in it."""
    with contextlib.ExitStack() as stack:
        yield lambda **how: stack.enter_context(namespace(services, **how))


@pytest.fixture
def new_lun(services: Services) -> Iterator[LunFactory]:
    """new_lun(size, sector_size=, chap=, readonly=): see `lun`."""
    with contextlib.ExitStack() as stack:
        yield lambda size=64 * MIB, **how: stack.enter_context(lun(services, size, **how))


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[LoopFactory]:
    """loop_device(size, sector_size=): see `loop`."""
    with contextlib.ExitStack() as stack:
        yield lambda size=64 * MIB, **how: stack.enter_context(loop(tmp_path, size, **how))


@pytest.fixture
def rbd_image(new_image: ImageFactory) -> Image:
    """One of 64 MiB."""
    return new_image()
