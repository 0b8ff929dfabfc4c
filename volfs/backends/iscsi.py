"""Driver `iscsi`: LUNs of iSCSI targets through libiscsi, without the kernel's initiator and without root.

Unless a setting or a connection info asks for the kernel's: then it opens volumes, through os-brick. What is only
looked at never goes through the kernel, so that `ls` leaves no session.

Directories are targets, files are LUNs by number. To list a target means to log in: it tells of its LUNs only in a
normal session, which is logged out again at once.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import shutil
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import msgspec
import trio

from volfs.backends import iscsi_source
from volfs.backends.base import Backend, BackendVolume, Directory, Entry, Source, VolumeInfo
from volfs.backends.brick_target import Target, make_target
from volfs.backends.brick_volume import Connections, open_connected
from volfs.backends.iscsi_disk import Disk, find_disk, list_luns, probe
from volfs.backends.iscsi_login import Login, discover, log_in, resolve
from volfs.backends.iscsi_session import SenseError, Session
from volfs.backends.iscsi_source import IscsiSettings, IscsiSource, is_iscsi_name
from volfs.backends.iscsi_volume import IscsiVolume
from volfs.errors import BackendError, SourceError, VolfsError, VolumeNotFound

log = logging.getLogger(__name__)

THREADS = 4  # for host names to be resolved
DEVICE_THREADS = 16  # requests under way at once on what the kernel has connected
CONNECTING = 8  # volumes that the kernel connects or disconnects at once
SHORT_SESSIONS = 4  # under way at once, of those that only list or describe
REMEMBER_SECONDS = 1.0  # a target's name is believed so long, for all the paths that lead through it
LONG_AGO = float("-inf")
ACCOUNTS = ("chap_username", "chap_password", "mutual_chap_username", "mutual_chap_password")
INITIATOR_FILE = Path("/etc/iscsi/initiatorname.iscsi")


class IscsiBackend(Backend):
    """Targets behind portals. Several portals are ways to the same storage, tried in order."""

    driver = "iscsi"
    settings_type = IscsiSettings
    describes = ("vendor", "product", "serial", "sector_size", "target", "portal")
    settings: IscsiSettings

    def __init__(self, name: str, settings: IscsiSettings) -> None:
        super().__init__(name, settings)
        self._threads = trio.CapacityLimiter(THREADS)
        self._short_sessions = trio.CapacityLimiter(SHORT_SESSIONS)
        self._device_threads = trio.CapacityLimiter(DEVICE_THREADS)
        self._connections = Connections(trio.CapacityLimiter(CONNECTING))
        self._discovering = trio.Lock()
        self._targets: tuple[str, ...] = ()
        self._discovered_at = LONG_AGO

    @classmethod
    def parse_url(cls, rest: str, environment: Mapping[str, str]) -> IscsiSource:
        return iscsi_source.parse_url(rest, environment)

    @classmethod
    def parse_prefix(cls, rest: str, environment: Mapping[str, str]) -> tuple[IscsiSettings, tuple[str, ...]]:
        return iscsi_source.parse_prefix(rest, environment)

    @classmethod
    def parse_connection(
        cls, protocol: str, data: Mapping[str, Any], environment: Mapping[str, str]
    ) -> IscsiSource:
        return iscsi_source.parse_connection(data)

    @classmethod
    def settings_for(cls, source: Source) -> IscsiSettings:
        assert isinstance(source, IscsiSource)
        return IscsiSettings(
            portals=source.portals,
            chap_username=source.chap_username,
            chap_password=source.chap_password,
            mutual_chap_username=source.mutual_chap_username,
            mutual_chap_password=source.mutual_chap_password,
        )

    def serves(self, source: Source) -> bool:
        return self._has(source) and all(
            getattr(source, key) in ("", getattr(self.settings, key)) for key in ACCOUNTS
        )

    def settings_like(self, source: Source) -> IscsiSettings | None:
        """Cinder's targets have an account for each volume."""
        if not self._has(source):
            return None
        accounts = {key: getattr(source, key) for key in ACCOUNTS}
        files = {"chap_password_file": "", "mutual_chap_password_file": ""}
        try:
            return msgspec.structs.replace(self.settings, portals=source.portals, **accounts, **files)
        except ValueError as exc:
            raise SourceError(f"{source.url}: {exc}") from exc

    def _has(self, source: Source) -> TypeGuard[IscsiSource]:
        """Whether it is on a target of this backend, whoever may open it."""
        settings = self.settings
        return (
            isinstance(source, IscsiSource)
            and set(source.portals) <= set(settings.portals)
            and (not settings.targets or source.iqn in settings.targets)
        )

    async def list(self, path: Sequence[str]) -> list[Entry]:
        if not path:
            return [Directory(iqn) for iqn in await self._discover()]
        iqn = self._target(path)
        async with self._short_sessions, self._session(self._source(iqn, 0)) as session:
            infos: list[Entry] = []
            errors: list[VolfsError] = []

            async def add(number: int, address: int) -> None:
                try:
                    disk = await probe(session, address)
                except VolumeNotFound:  # unmapped since
                    return
                except SenseError as exc:  # a broken one does not hide the others; `lookup` tells of it
                    log.warning("%s", exc)
                    return
                except VolfsError as exc:
                    errors.append(exc)
                    return
                if disk is not None:
                    source = self._source(iqn, number)
                    infos.append(self._info(source, disk))

            async with trio.open_nursery() as nursery:
                for number, address in (await list_luns(session)).items():
                    nursery.start_soon(add, number, address)
            if errors:
                raise errors[0]
            return infos

    async def lookup(self, path: Sequence[str]) -> Entry:
        iqn = self._target(path[:1])
        if len(path) == 1:
            # One exchange, however many targets there are. (libiscsi cannot ask for a single name.)
            recent = self._discovered_at + REMEMBER_SECONDS > trio.current_time()
            if not (recent and iqn in self._targets) and iqn not in await self._discover():
                raise VolumeNotFound(f"iscsi://{self.settings.portals[0]}: no target {iqn}")
            return Directory(iqn)
        if len(path) > 2 or not re.fullmatch(r"0|[1-9]\d{0,4}", path[1], re.ASCII):
            raise VolumeNotFound(f"{'/'.join(path)}: expected TARGET/LUN")
        return await self.stat(self._source(iqn, int(path[1])))

    async def stat(self, source: Source) -> VolumeInfo:
        assert isinstance(source, IscsiSource)
        listed = msgspec.structs.replace(
            self._source(source.iqn, source.lun),
            read_only=source.read_only,
            paths=source.paths,
            multipath=source.multipath,
        )
        *others, last = source.alternatives
        for other in others:
            try:
                return await self._ask(other, listed)
            except BackendError as exc:
                log.warning("%s; trying another path", exc)
        return await self._ask(last, listed)

    async def _ask(self, source: IscsiSource, listed: IscsiSource) -> VolumeInfo:
        async with self._short_sessions, self._session(source) as session:
            return self._info(listed, await find_disk(session, source.lun))

    async def open(self, source: Source, *, writable: bool) -> BackendVolume:
        assert isinstance(source, IscsiSource)
        if writable and (source.read_only or self.settings.read_only):
            raise BackendError(f"{source.url}: read-only", errno.EROFS)
        if self._by_kernel(source):
            return await open_connected(
                self._connections,
                await self._target_for_kernel(source),
                writable=writable,
                request_timeout=self.settings.timeout,
                threads=self._device_threads,
            )
        async with self._opened(source) as session:
            disk = await find_disk(session, source.lun)
            if writable and disk.mode.write_protected:
                raise BackendError(f"{source.url}: write-protected by the target", errno.EROFS)
            return IscsiVolume(session, disk, writable=writable, timeout=self.settings.timeout)

    def _by_kernel(self, source: IscsiSource) -> bool:
        """Whether the kernel's initiator is to open the volume.

        By the settings, or by a connection info with several targets or LUNs for one volume, or that enforces
        multipath: libiscsi follows one target, whose portals it tries in turn. Cinder tells of several targets only
        where the connector asked for multipath, as for Nova on the same host; so where there is no kernel initiator
        the first target does.
        """
        if self.settings.initiator is not None:
            return self.settings.initiator == "kernel"
        if source.multipath or not source.paths:
            return source.multipath
        if shutil.which("iscsiadm") is None:
            log.warning("%s: iscsiadm is not installed: no multipath, only the first target", source.url)
            return False
        return True

    async def _target_for_kernel(self, source: IscsiSource) -> Target:
        """What os-brick is told. All paths, always: else it would discover them, and leave their records behind."""
        if source.mutual_chap_username or self.settings.mutual_chap_username:
            raise BackendError(
                f"{source.url}: os-brick offers no mutual CHAP with the kernel's initiator", errno.EOPNOTSUPP
            )
        login = await self._login(source)
        paths = source.paths or [(portal, source.iqn, source.lun) for portal in source.portals]
        # iscsiadm shows sessions by address, by which os-brick looks for them.
        portals = [(await resolve(portal, self._threads))[0] for portal, _, _ in paths]
        data: dict[str, object] = {
            "target_portals": portals,
            "target_iqns": [iqn for _, iqn, _ in paths],
            "target_luns": [lun for _, _, lun in paths],
            "access_mode": "ro" if source.read_only or self.settings.read_only else "rw",
            "enforce_multipath": source.multipath,
        }
        if login.username:
            data |= {
                "auth_method": "CHAP",
                "auth_username": login.username,
                "auth_password": str(login.password),
            }
        multipath = source.multipath or bool(source.paths)
        return make_target(source.url, "iscsi", data, self.settings, multipath=multipath)

    async def _discover(self) -> tuple[str, ...]:
        """The targets there are. Who asks while another waits for the answer shares it."""
        if self.settings.targets:
            return self.settings.targets
        asked = trio.current_time()
        async with self._discovering:
            if self._discovered_at <= asked:
                begun = trio.current_time()
                async with self._short_sessions:
                    login = await self._login(self._source("", 0))
                    names = await discover(login, self.settings.timeout, self._threads)
                self._targets = tuple(dict.fromkeys(filter(is_iscsi_name, names)))
                self._discovered_at = begun
        return self._targets

    def _target(self, path: Sequence[str]) -> str:
        iqn = path[0]
        if len(path) > 1 or not is_iscsi_name(iqn) or iqn not in (self.settings.targets or (iqn,)):
            raise VolumeNotFound(f"{'/'.join(path)}: no target of backend {self.name}")
        return iqn

    def _source(self, iqn: str, lun: int) -> IscsiSource:
        return IscsiSource(portals=self.settings.portals, iqn=iqn, lun=lun)

    def _info(self, source: IscsiSource, disk: Disk) -> VolumeInfo:
        return VolumeInfo(
            name=str(source.lun),
            source=source,
            size=disk.size,
            read_only=source.read_only or self.settings.read_only or disk.mode.write_protected,
            identity=f"iscsi {source.iqn} {source.lun}",  # names of targets are unique world-wide
            details={
                "vendor": disk.vendor,
                "product": disk.product,
                "serial": disk.serial,
                "sector_size": str(disk.block_size),
                "target": source.iqn,
                "portal": ", ".join(source.portals),
            },
        )

    @asynccontextmanager
    async def _session(self, source: IscsiSource) -> AsyncIterator[Session]:
        """A session with the source's target, logged out at the end."""
        async with self._opened(source) as session:
            yield session
            await session.aclose(trio.current_time() + self.settings.timeout)

    @asynccontextmanager
    async def _opened(self, source: IscsiSource) -> AsyncIterator[Session]:
        """A session with the source's target, logged out only when the block fails."""
        settings = self.settings
        isid = random.getrandbits(24), random.getrandbits(16)
        login = await self._login(source)
        session = Session(
            source.url,
            partial(log_in, login, source.iqn, isid, settings.timeout, self._threads),
            timeout=settings.timeout,
            reconnect_timeout=settings.reconnect_timeout,
            queue_depth=settings.queue_depth,
        )
        await session.start()
        try:
            yield session
        except BaseException:
            await session.aclose(trio.current_time() + settings.timeout)
            raise

    async def _login(self, source: IscsiSource) -> Login:
        settings = self.settings
        name = settings.initiator_name or await trio.to_thread.run_sync(
            default_initiator_name, limiter=self._threads
        )
        # An account is of one piece: that of the source, or else that of the settings.
        given: IscsiSource | IscsiSettings = source if source.chap_username else settings
        mutual: IscsiSource | IscsiSettings = source if source.mutual_chap_username else settings
        return Login(
            portals=source.portals,
            initiator_name=name,
            username=given.chap_username,
            password=given.chap_password or await self._read_secret(settings.chap_password_file),
            target_username=mutual.mutual_chap_username,
            target_password=mutual.mutual_chap_password
            or await self._read_secret(settings.mutual_chap_password_file),
            header_digest=settings.header_digest,
        )

    async def _read_secret(self, path: str) -> str:
        """Read at each login: the file may change, and the secret need not stay in memory."""
        if not path:
            return ""
        try:
            text = await trio.to_thread.run_sync(Path(path).read_text, limiter=self._threads)
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "not text"
            raise BackendError(f"backend {self.name}: {path}: {reason}", errno.EACCES) from None
        return text.rstrip("\r\n")


def default_initiator_name() -> str:
    """The name that open-iscsi gave this machine: the storage maps LUNs to it. Else one made of the host's name."""
    try:
        text = INITIATOR_FILE.read_text()
    except (OSError, UnicodeDecodeError):
        text = ""
    match = re.search(r"^\s*InitiatorName\s*=\s*(\S+)", text, re.MULTILINE)
    if match and is_iscsi_name(match[1]):
        return match[1]
    host = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")
    return f"iqn.2026-01.org.volfs:{host or 'localhost'}"
