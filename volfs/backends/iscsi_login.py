"""How an iSCSI session begins: addresses, TCP, login with CHAP, discovery; and what its failures mean.

A connection is a libiscsi `Context`. Here it is driven by the very task that asks for it, step by step, until the
login is through; from then on it belongs to a `Session` (iscsi_session.py). Facts are from RFC 7143.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from volfs.backends.base import deadline
from volfs.errors import BackendError, VolfsError, VolumeNotFound

if TYPE_CHECKING:
    from volfs.native.libiscsi import Command, Context

T = TypeVar("T")

DEFAULT_PORT = 3260
REDIRECTS = 4  # a target may send an initiator on to another portal; not round in circles, though

# Status class and detail of a login response (RFC 7143 11.13.5), to errno. Others: EPROTO.
LOGIN_ERRNOS = {
    0x0201: errno.EACCES,  # authentication failure
    0x0202: errno.EACCES,  # authorization failure: not for this initiator name
    0x0206: errno.EBUSY,  # too many connections
    0x0300: errno.EREMOTEIO,
    0x0301: errno.EAGAIN,  # service unavailable
    0x0302: errno.EAGAIN,  # out of resources
}
NOT_FOUND = frozenset({0x0203, 0x0204})  # target not found, target removed


@dataclass(frozen=True)
class Login:
    """Who logs in, where, and how both sides prove themselves. A user name of "" means without CHAP."""

    portals: tuple[str, ...]  # "address:port", tried in this order
    initiator_name: str
    username: str = ""
    password: str = ""
    target_username: str = ""
    target_password: str = ""
    header_digest: str = "none"

    def __repr__(self) -> str:  # without the secrets
        return f"Login({', '.join(self.portals)} as {self.initiator_name})"


def libiscsi() -> Any:
    """The compiled module. It is imported when first used: a machine without libiscsi serves other drivers."""
    try:
        from volfs.native import libiscsi
    except ImportError as exc:
        # Either what was compiled does not find its shared library, or nothing was compiled.
        what = (
            "apt install libiscsi7"
            if ".so" in str(exc)
            else "apt install libiscsi-dev, and install volfs again"
        )
        raise BackendError(f"the iscsi driver needs libiscsi ({what}): {exc}", errno.EOPNOTSUPP) from exc
    return libiscsi


async def log_in(
    login: Login, target: str, isid: tuple[int, int], timeout: float, threads: trio.CapacityLimiter
) -> Context:
    """A logged-in normal session with the target, through the first portal that lets us in.

    `isid` names the session on our side: as long as an older one with the same is there, the target must end it and
    all its tasks before it lets the new one in (session reinstatement, RFC 7143 6.3.5).
    """

    async def attempt(address: str) -> Context:
        return await _log_in(login, target, isid, address)

    return await _first_answer(login.portals, attempt, f"target {target}", timeout, threads)


async def discover(login: Login, timeout: float, threads: trio.CapacityLimiter) -> list[str]:
    """The names of the targets that the first portal that answers offers us (SendTargets, RFC 7143 appendix C)."""

    async def attempt(address: str) -> list[str]:
        context = await _log_in(login, None, (0, 0), address)
        try:
            command = context.discover()
            await _drive(context, command, f"iscsi portal {address}: discovery")
            if command.result is None:
                raise BackendError(f"iscsi portal {address}: discovery: {command.error}", errno.EPROTO)
            await _drive(context, context.logout(), f"iscsi portal {address}: logout")
            return [name for name, _ in command.result]
        finally:
            context.close()

    return await _first_answer(login.portals, attempt, "discovery", timeout, threads)


async def _first_answer(
    portals: Sequence[str],
    attempt: Callable[[str], Awaitable[T]],
    doing: str,
    timeout: float,
    threads: trio.CapacityLimiter,
) -> T:
    """Try one portal after the other; each gets its share of the time, so that a silent one leaves some for the next.

    "Not found" counts only when every portal says so: one that we could not ask may have had it.
    """
    end = trio.current_time() + timeout
    first: VolfsError | None = None
    for left, portal in zip(range(len(portals), 0, -1), portals, strict=True):
        try:
            with deadline((end - trio.current_time()) / left, f"iscsi portal {portal}: {doing}"):
                return await _first_address(portal, attempt, threads)
        except VolfsError as exc:
            if first is None or isinstance(first, VolumeNotFound):
                first = exc
    assert first is not None  # a Login has at least one portal
    raise first


async def _first_address(
    portal: str, attempt: Callable[[str], Awaitable[T]], threads: trio.CapacityLimiter
) -> T:
    """A host name may have several addresses, the first of which leads nowhere."""
    *others, last = await resolve(portal, threads)
    for address in others:
        try:
            return await attempt(address)
        except BackendError:
            continue
    return await attempt(last)


async def _log_in(login: Login, target: str | None, isid: tuple[int, int], address: str) -> Context:
    library = libiscsi()
    for _ in range(REDIRECTS):
        try:
            context: Context = library.Context(
                login.initiator_name,
                target_name=target,
                header_digest=login.header_digest,
                isid=isid,
                username=login.username,
                password=login.password,
                # Targets that do not ask us for CHAP at discovery cannot prove themselves either (it is one exchange),
                # and nothing but names is at stake there.
                target_username=login.target_username if target else "",
                target_password=login.target_password if target else "",
            )
            try:
                command = context.connect(address)
                await _drive(context, command, f"iscsi portal {address}: connect")
                if command.status != library.GOOD:
                    raise connection_error(command.error or "", f"iscsi portal {address}: connect")
                command = context.login()
                await _drive(context, command, f"iscsi portal {address}: login")
                if command.status == library.GOOD:
                    connected, context = context, None  # type: ignore[assignment]
                    return connected
                if command.status != library.REDIRECT:
                    raise _login_error(command.error or "", login, target, address)
                address = context.redirected_to.partition(",")[0]
            finally:
                if context is not None:
                    context.close()
        except OSError as exc:
            if isinstance(exc, VolfsError):
                raise
            if exc.errno == errno.EIO:  # libiscsi could not even begin, and only its text says why
                raise connection_error(exc.strerror or "", f"iscsi portal {address}: connect") from exc
            raise BackendError(f"iscsi portal {address}: {exc.strerror}", exc.errno) from exc
    raise BackendError(f"iscsi portal {address}: redirected {REDIRECTS} times", errno.ELOOP)


async def _drive(context: Context, command: Command, doing: str) -> None:
    """Move bytes until the step has finished; its `status` tells how. BackendError when the connection breaks."""
    library = libiscsi()
    while command.status == library.PENDING:
        # libiscsi must not be told that a socket is writable before it is: it would take it for connected.
        if context.writing:
            await trio.lowlevel.wait_writable(context.fd)
            context.service(library.POLLOUT)
        else:
            await trio.lowlevel.wait_readable(context.fd)
            context.service(library.POLLIN)
        if context.lost and command.status in (library.PENDING, library.CANCELLED):
            raise connection_error(context.error, doing)


def connection_error(text: str, doing: str) -> BackendError:
    """What libiscsi says of a broken connection, with the errno that its text ends in.

    The text is only replaced, never cleared: one that does not speak of the connection is left from an earlier event,
    and the peer has simply hung up.
    """
    if not re.search(r"connect|errno|socket|digest|PDU|opcode|itt:|[Rr]eject", text):
        return BackendError(f"{doing}: the other side closed the connection", errno.ECONNRESET)
    match = re.search(r"(?:errno:|socket :|\()(\d+)", text)
    number = int(match.group(1)) if match else 0
    if number not in errno.errorcode:
        return BackendError(f"{doing}: {text}", errno.ECONNRESET)
    return BackendError(f"{doing}: {os.strerror(number)}", number)


def _login_error(text: str, login: Login, target: str | None, address: str) -> VolfsError:
    who = f"iscsi portal {address}: target {target}" if target else f"iscsi portal {address}: discovery"
    match = re.search(r"Status: .*\((\d+)\)", text)
    text = text.removeprefix("Failed to log in to target. Status: ")
    if match is None and "CHAP" in text:
        return BackendError(f"{who}: the target did not prove itself by mutual CHAP: {text}", errno.EACCES)
    status = int(match.group(1)) if match else 0
    if status in NOT_FOUND:
        return VolumeNotFound(f"{who}: no such target, or not for {login.initiator_name}")
    number = LOGIN_ERRNOS.get(status, errno.EPROTO)
    if number == errno.EACCES:
        how = f"CHAP user {login.username!r}" if login.username else "without CHAP"
        return BackendError(f"{who}: login refused ({how}, initiator {login.initiator_name}): {text}", number)
    return BackendError(f"{who}: login failed: {text}", number)


def split_portal(portal: str) -> tuple[str, int]:
    """Address (without brackets) and port of "address[:port]", IPv6 in brackets. ValueError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)(%\w+)?\]|([\w.-]+))(?::(\d{1,5}))?", portal, re.ASCII)
    try:
        if match is None:
            raise ValueError
        six, scope, name, port = match.groups()
        if six:
            ipaddress.IPv6Address(six)
        number = int(port or DEFAULT_PORT)
        if not 0 < number < 65536:
            raise ValueError
    except ValueError:
        raise ValueError(f"{portal!r}: expected ADDRESS[:PORT], with an IPv6 address in brackets") from None
    return (six + (scope or "")) if six else name, number


def normal_portal(portal: str) -> str:
    """The portal with its port, so that equal ones compare equal. ValueError."""
    address, port = split_portal(portal)
    if "%" not in address:  # a scope is the name of an interface
        address = address.lower()
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def resolve(portal: str, threads: trio.CapacityLimiter) -> list[str]:
    """The numeric addresses of a portal, in the resolver's order."""
    address, port = split_portal(portal)
    try:
        # The usual case, without a thread. (libiscsi would ask the resolver by itself, with the loop standing still.)
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):  # a label too long for a name
        try:
            found = await trio.to_thread.run_sync(
                lambda: socket.getaddrinfo(address, port, type=socket.SOCK_STREAM),
                limiter=threads,
                abandon_on_cancel=True,
            )
        except (OSError, UnicodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise BackendError(f"iscsi portal {portal}: {reason}", errno.EHOSTUNREACH) from exc
    hosts = [str(sockaddr[0]) for *_, sockaddr in found]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]
