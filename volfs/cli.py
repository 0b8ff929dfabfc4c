"""The volfs command: arguments in, exit codes out. What it does is in the modules a Python program would call.

Each command imports them when it runs: `volfs --help`, or the copy of an ordinary file, loads no more than it needs.

Exit codes: 0 done; 1 it failed (or `verify` found a difference); 2 the command line, a source or the configuration
is wrong; 130 interrupted. Errors are one line on stderr; a traceback means a bug.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from typing import Any, NoReturn

import click

from volfs.backends import caller_environment, environment_variables
from volfs.errors import ConfigError, SourceError, error_text

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage, source or configuration."


def _seconds(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter(f"expected a number of seconds, not {value:g}", context, option)
    return value


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress")
socket_option = click.option("--socket", metavar="PATH", help="Control socket of the daemon")
conf_option = click.option("--conf", metavar="PATH", help="Ceph configuration, as CEPH_CONF")
user_option = click.option("--id", "user", metavar="USER", help="Ceph user, as in CEPH_ARGS='--id USER'")


@click.group(no_args_is_help=False)
def app() -> None:
    """Block volumes of Ceph RBD, iSCSI and local storage as regular files."""


def main() -> None:
    """Entry point of the volfs command."""
    try:
        # Click's own main() adds a line to stderr when it is interrupted.
        with app.make_context("volfs", sys.argv[1:]) as context:
            app.invoke(context)
        sys.stdout.flush()  # here, where an error of it still has an exit code of ours
        sys.exit(0)
    except click.exceptions.Exit as exc:  # after the help
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except click.ClickException as exc:
        wrong = exc.ctx if isinstance(exc, click.UsageError) else None
        command = wrong.command_path if wrong else "volfs"
        text = exc.format_message().rstrip(".")
        _fail(f"{text}{'' if text.endswith('?') else ';'} see {command} --help", WRONG_USE)
    except (SourceError, ConfigError) as exc:
        _fail(error_text(exc), WRONG_USE)
    except OSError as exc:
        if isinstance(exc, BrokenPipeError):  # `volfs ls | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        _fail(error_text(exc), FAILED)


@app.command(epilog=f"Example: volfs mount /mnt rbd:volumes --daemon. {CODES}")
@click.argument("mountpoint")
@click.argument("prefixes", metavar="[SOURCE-PREFIX]...", nargs=-1)
@click.option("--config", "-c", metavar="FILE", envvar="VOLFS_CONFIG", show_envvar=True, help="volfs.toml")
@click.option(
    "options", "-o", metavar="OPTIONS", default="", help="allow_other, ro, uid=, gid=, mode=, read_ahead="
)
@click.option("--daemon", is_flag=True, help="Return when I/O works, and serve on")
@socket_option
@click.option(
    "--exit-idle",
    type=float,
    metavar="SECONDS",
    callback=_seconds,
    help="End when nothing was attached or open for so long",
)
@conf_option
@user_option
@click.option("--verbose", "-v", is_flag=True, help="Log each failed request")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--first-request", is_flag=True, hidden=True)
def mount(
    mountpoint: str,
    prefixes: tuple[str, ...],
    config: str | None,
    options: str,
    daemon: bool,
    socket: str | None,
    exit_idle: float | None,
    conf: str | None,
    user: str | None,
    verbose: bool,
    ready_fd: int | None,
    first_request: bool,
) -> None:
    """Show volumes as files below MOUNTPOINT, until unmounted.

    MOUNTPOINT: an empty directory. SOURCE-PREFIX: rbd:[POOL], iscsi://PORTAL, block:/DIR, file:/DIR.
    """
    from volfs import config as configuration
    from volfs import control, mounting

    if first_request and (refused := mounting.refuse_request(sys.stdin.buffer.readline())):
        sys.stdout.buffer.write(control.encode(refused))
        sys.exit(WRONG_USE)
    _ceph_environment(conf, user)
    settings = configuration.Config()
    if config is not None:
        settings = configuration.load(config)
        for warning in configuration.exposed_secrets(config, settings):
            print(f"volfs: warning: {warning}", file=sys.stderr)
    settings = configuration.add_prefixes(settings, prefixes, os.environ)
    settings = configuration.add_options(settings, options)
    what = ", ".join([*settings.backends, "attached"])
    line = f"{mountpoint}: ready ({what})"
    if daemon:
        arguments = [os.path.abspath(mountpoint), *prefixes, *(["-o", options] if options else [])]
        arguments += ["--config", os.path.abspath(config)] if config is not None else []
        arguments += ["--exit-idle", str(exit_idle)] if exit_idle is not None else []
        mounting.serve_in_background([*arguments, *(["-v"] if verbose else [])], socket)
        print(line)
        return

    def ready() -> None:
        print(line, flush=True)
        if ready_fd is not None:
            mounting.tell_parent(ready_fd)

    mounting.log_to_stderr(verbose=verbose)
    if mounting.serve(settings, mountpoint, socket_path=socket, exit_idle=exit_idle, ready=ready):
        sys.exit(FAILED)  # the daemon has logged each


@app.command(epilog=f"Example: volfs umount /mnt. {CODES}")
@click.argument("mountpoint")
@click.option("--force", is_flag=True, help="Even while files are open")
def umount(mountpoint: str, force: bool) -> None:
    """Unmount, and return when everything has reached the backends."""
    from volfs import api

    api.unmount(os.path.abspath(mountpoint), force=force)


@app.command(epilog=f"Example: volfs attach rbd:volumes/disk-1. {CODES}")
@click.argument("source", required=False)
@click.option("--connection-info", metavar="FILE", help="A Cinder connection info as JSON, - for stdin")
@click.option("--name", help="File name; by default the volume's own")
@click.option("--hold", is_flag=True, help="Stay, and detach when this process ends")
@json_option
@socket_option
@conf_option
@user_option
def attach(
    source: str | None,
    connection_info: str | None,
    name: str | None,
    hold: bool,
    as_json: bool,
    socket: str | None,
    conf: str | None,
    user: str | None,
) -> None:
    """Attach a volume, print its path, and hold it until `volfs detach`. Starts a daemon when there is none.

    SOURCE: rbd:POOL/IMAGE, iscsi://PORTAL/IQN/LUN, block:/DEV, file:/PATH.
    """
    from volfs import api

    _ceph_environment(conf, user)
    if (source is None) == (connection_info is None):
        raise SourceError("attach: expected either a SOURCE or --connection-info")
    what: Any = source if connection_info is None else _read_json(connection_info)
    attached, client = api.attach(what, name, hold=hold, socket_path=socket)
    facts = {key: getattr(attached, key) for key in ("path", "name", "source", "driver", "size")}
    print(json.dumps(facts) if as_json else attached.path, flush=True)
    if hold:
        client.wait_closed(None)  # as long as the user lets us
    client.close()


@app.command(epilog=f"Example: volfs detach disk-1. {CODES}")
@click.argument("name")
@click.option(
    "--wait",
    type=float,
    metavar="SECONDS",
    callback=_seconds,
    default=5.0,
    show_default=True,
    help="For open files to be closed",
)
@socket_option
def detach(name: str, wait: float, socket: str | None) -> None:
    """Detach a volume, and return when its backend has let go of it.

    NAME: what it is attached as, its path or its URL.
    """
    from volfs import api

    api.detach(name, wait=wait, socket_path=socket)


@app.command(epilog=f"Example: volfs ls rbd:volumes. {CODES}")
@click.argument("what", metavar="[SOURCE-PREFIX|PATH]", required=False)
@json_option
@socket_option
@conf_option
@user_option
def ls(what: str | None, as_json: bool, socket: str | None, conf: str | None, user: str | None) -> None:
    """List volumes, without opening them.

    SOURCE-PREFIX: rbd:[POOL], iscsi://PORTAL, block:/DIR, file:/DIR. PATH: on a mount, by default the mountpoint.
    """
    from volfs import api, report

    _ceph_environment(conf, user)
    rows = report.listing(what or api.status(socket_path=socket).mountpoint, os.environ)
    print(json.dumps(rows) if as_json else report.table(rows))


@app.command(epilog=f"Example: volfs info rbd:volumes/disk-1. {CODES}")
@click.argument("what", metavar="SOURCE|PATH")
@json_option
@conf_option
@user_option
def info(what: str, as_json: bool, conf: str | None, user: str | None) -> None:
    """Tell what is known of a volume.

    SOURCE: its URL. PATH: on a volfs mount.
    """
    from volfs import report

    _ceph_environment(conf, user)
    facts = report.facts(what, os.environ)
    print(json.dumps(facts) if as_json else report.lines(facts))


@app.command(
    epilog=f"Example: volfs copy rbd:volumes/disk-1 iscsi://san/iqn.2026-01.org.example:disk/1. {CODES}"
)
@click.argument("source")
@click.argument("target")
@click.option("--verify", is_flag=True, help="Read both again and compare")
@click.option("--resume", is_flag=True, help="Keep a journal, and go on where that ends if there is one")
@click.option("--journal", metavar="FILE", help="The journal of --resume; else one in the state directory")
@quiet_option
@json_option
@conf_option
@user_option
def copy(
    source: str,
    target: str,
    verify: bool,
    resume: bool,
    journal: str | None,
    quiet: bool,
    as_json: bool,
    conf: str | None,
    user: str | None,
) -> None:
    """Copy a volume's content. The target must be large enough; it is not created, unless it is an ordinary file.

    SOURCE and TARGET: a volume's URL, a path on a volfs mount, a block device or an ordinary file.

    With --resume, the first time as well, the same command goes on where it was interrupted or killed. It refuses when
    SOURCE or TARGET has changed meanwhile.
    """
    from volfs import endpoint, progress

    if journal is not None and not resume:
        raise click.UsageError("--journal is for --resume")
    _ceph_environment(conf, user)
    done: list[endpoint.Summary] = []
    with progress.show("copy", quiet=quiet) as shown:
        if resume:
            from volfs import resuming

            done.append(resuming.copy(source, target, journal_path=journal, progress=shown))
        else:
            done.append(endpoint.copy(source, target, progress=shown))
    if verify:
        # Opened anew, so that nothing cached is taken for what the storage has.
        with progress.show("verify", quiet=quiet) as shown:
            done.append(endpoint.verify(source, target, progress=shown))
    print(json.dumps(done[-1].as_dict()) if as_json else "\n".join(map(str, done)))


@app.command(
    epilog="Example: volfs verify rbd:volumes/disk-1 disk-1.raw. "
    "Exit codes: 0 same, 1 different or failed, 2 wrong usage or source."
)
@click.argument("source")
@click.argument("target")
@quiet_option
@json_option
@conf_option
@user_option
def verify(source: str, target: str, quiet: bool, as_json: bool, conf: str | None, user: str | None) -> None:
    """Compare a volume with its copy, which may be larger.

    SOURCE and TARGET: a volume's URL, a path on a volfs mount, a block device or an ordinary file.
    """
    from volfs import endpoint, progress

    _ceph_environment(conf, user)
    with progress.show("verify", quiet=quiet) as shown:
        summary = endpoint.verify(source, target, progress=shown)
    print(json.dumps(summary.as_dict()) if as_json else summary)


@app.command(epilog=f"Example: volfs status --json. {CODES}")
@json_option
@socket_option
def status(as_json: bool, socket: str | None) -> None:
    """Tell what the daemon serves."""
    import msgspec

    from volfs import api, report

    reply = api.status(socket_path=socket)
    print(json.dumps(msgspec.to_builtins(reply)) if as_json else report.status(reply))


def _ceph_environment(conf: str | None, user: str | None) -> None:
    """--conf and --id are what CEPH_CONF and CEPH_ARGS say, for this process and those it starts.

    These may work elsewhere, so the paths in there become absolute; what is set to nothing is not set.
    """
    if conf:
        os.environ["CEPH_CONF"] = conf
    if user:
        os.environ["CEPH_ARGS"] = f"{os.environ.get('CEPH_ARGS', '')} --id {shlex.quote(user)}".strip()
    given = caller_environment(os.environ)
    for name in environment_variables():
        os.environ.pop(name, None)
    os.environ.update(given)


def _read_json(path: str) -> Any:
    try:
        if path == "-":
            info = json.load(sys.stdin)
        else:
            with open(path) as file:
                info = json.load(file)
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{path}: expected a connection info as JSON: {exc}") from exc
    if not isinstance(info, dict):
        raise SourceError(f"{path}: expected a connection info, an object, not {type(info).__name__}")
    return info


def _fail(text: str, code: int) -> NoReturn:
    print(f"volfs: {text}", file=sys.stderr)
    sys.exit(code)
