"""welltuned serve: the Runs beneath a folder in a browser, live while they train."""

import argparse
import secrets
import socket
from importlib.util import find_spec
from pathlib import Path

from rich.markup import escape

from welltuned.cli.terminal import console
from welltuned.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(arguments: argparse.Namespace) -> int:
    folder, host = Path(arguments.folder), arguments.host
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder), mend="give one that holds runs")
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not installed", mend="pip install 'welltuned[serve]'")
    import uvicorn

    from welltuned.report.live import app

    local = host in LOOPBACK
    token = None if local else secrets.token_urlsafe(18)
    hosts = frozenset(("127.0.0.1", "localhost", "[::1]")) if local else frozenset[str]()
    listening = _listening(host, arguments.port)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    console.print(f"[bold]{escape(address)}[/] shows the runs beneath {escape(str(folder))}; Ctrl-C ends it.")
    if not local:
        console.print("Other machines can reach it: whoever has the address with its token can read your runs.")
    control = None
    if arguments.allow_start:
        from welltuned.report.control import Control

        control = Control(folder)
        console.print("Runs can be started, stopped and asked from its pages.")
    config = uvicorn.Config(app(folder, hosts, token, control), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; 0 takes a free port."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        mend = "give another --port, or 0 for any that is free"
        raise InputError(f"{host}:{port} cannot be listened on ({error.strerror})", mend=mend) from error
    made.listen(128)
    return made
