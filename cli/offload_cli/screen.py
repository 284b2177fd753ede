"""`offload vm vnc` and `offload vm screenshot`: a machine's screen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import typer

from offload_cli.complete import vm_names
from offload_cli.connection import open_client
from offload_cli.terminal import print_text, say
from offload_cli.words import known_form
from offloadd.errors import HostError, NotFoundError, ProtocolError

_NAME = typer.Argument(metavar="NAME", callback=known_form, autocompletion=vm_names, help="The machine's name.")
_VIEWERS = {"vncviewer": "127.0.0.1::", "remote-viewer": "vnc://127.0.0.1:"}
"""In the words of TigerVNC's and its relatives' vncviewer(1) and of remote-viewer(1)."""
_PNG = b"\x89PNG\r\n\x1a\n"


def add_to(app: typer.Typer) -> None:
    """These are commands of `offload vm`."""
    for command in (vnc, screenshot):
        app.command()(command)


def vnc(
    name: str = _NAME,
    listen: int | None = typer.Option(
        None, "--listen", min=1, max=65535, metavar="PORT", help="Let viewers of yours in at 127.0.0.1:PORT, until Ctrl-C."
    ),
    only_print: bool = typer.Option(False, "--print", help="Only print the socket's path."),
) -> None:
    """Look at a machine's screen, in a VNC viewer.

    It is on a Unix socket that only you can reach.  Where there is a display, vncviewer or remote-viewer is started; else it is
    said how to.

    \b
    Examples:
      offload vm vnc childhurd
      offload vm vnc childhurd --listen 5900
    """
    socket = Path(_screen(name))
    if only_print:
        print_text(str(socket))
    elif listen is not None:
        _relay(socket, listen, name)
    elif (viewer := _find_viewer()) and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        _run_viewer(viewer, socket)
    else:
        say(f"{'no display' if viewer else 'no viewer'} here; what shows {name}'s screen:")
        print_text(
            f"vncviewer {socket}    # TigerVNC's\noffload vm vnc {name} --listen 5900    # and any viewer, of 127.0.0.1:5900"
        )


def _screen(name: str) -> str:
    with open_client() as client:
        machine: dict[str, Any] = client.get(f"/v1/machines/{name}")
    if not machine.get("instance"):
        raise NotFoundError("does not run", subject=name, hint=f"offload vm start {name}")
    if not machine.get("vnc_socket"):
        raise NotFoundError("has no screen", subject=name, hint=f"its console is text: offload vm console {name}")
    return str(machine["vnc_socket"])


def _find_viewer() -> tuple[str, str] | None:
    """A viewer, and what is before the port in its argument."""
    for name, address in _VIEWERS.items():
        if found := shutil.which(name):
            return found, address
    return None


def _run_viewer(viewer: tuple[str, str], socket: Path) -> None:
    """Until its user closes it.  Only some viewers take a socket's path, all of them a port."""
    from offload_cli.relay import listen_local, serve

    program, address = viewer
    with closing(listen_local(0)) as listener:
        threading.Thread(target=serve, args=(listener, socket, say), daemon=True).start()
        try:
            status = subprocess.run([program, f"{address}{listener.getsockname()[1]}"], check=False).returncode
        except OSError as exc:
            raise HostError(f"does not run: {exc.strerror}", subject=program) from exc
    if status:
        raise HostError(f"ended with status {status}", subject=program, hint="another viewer? --listen PORT lets it in")


def _relay(socket: Path, port: int, name: str) -> None:
    from offload_cli.relay import listen_local, serve

    with closing(listen_local(port)) as listener:
        say(f"{name}'s screen is at 127.0.0.1:{listener.getsockname()[1]}, for programs of yours; Ctrl-C ends this")
        serve(listener, socket, say)


def screenshot(
    name: str = _NAME,
    output: Path | None = typer.Option(None, "--output", "-o", metavar="FILE", help="Else NAME.png; - is standard output."),
) -> None:
    """Write what a machine's screen shows now into a PNG file.

    \b
    Examples:
      offload vm screenshot childhurd
      offload vm screenshot childhurd -o - | display
    """
    with open_client() as client:
        picture = client.get_bytes(f"/v1/machines/{name}/screenshot")
    if not picture.startswith(_PNG):
        raise ProtocolError("the daemon sent no PNG", subject=name)
    if output == Path("-"):
        sys.stdout.flush()
        sys.stdout.buffer.write(picture)
        return
    path = output or Path(f"{name}.png")
    try:
        path.write_bytes(picture)
    except OSError as exc:
        raise HostError(f"cannot be written: {exc.strerror}", subject=str(path)) from exc
    say(f"{path}: {len(picture)} bytes")
