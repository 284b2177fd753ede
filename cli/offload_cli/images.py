"""`offload image`."""

from __future__ import annotations

import time

import typer

from offload_cli.complete import image_names
from offload_cli.connection import open_client, show_work
from offload_cli.image_set import set_
from offload_cli.show import image_text, images_table
from offload_cli.terminal import print_json, print_text, say
from offload_cli.words import json_option, known_form
from offloadd.model.quantity import format_duration, format_size

app = typer.Typer(help="The images that machines boot from.", no_args_is_help=True, rich_markup_mode=None)

app.command("set")(set_)

_NAME = typer.Argument(
    metavar="NAME", callback=known_form, autocompletion=image_names, help="The image's name, or the beginning of its digest."
)


@app.command("list")
def list_(as_json: bool = json_option()) -> None:
    """List the images that are described and those that were made.

    \b
    Example:
      offload image list
    """
    with open_client() as client:
        rows = client.get("/v1/images")
    if as_json:
        print_json(rows)
    else:
        print_text(images_table(rows, time.time()))


@app.command()
def build(
    name: str = typer.Argument(metavar="NAME", callback=known_form, autocompletion=image_names, help="The image's name."),
    rebuild: bool = typer.Option(False, "--rebuild", help="Make it again, although it is there."),
    as_json: bool = json_option(),
) -> None:
    """Make an image, unless it is there: then it is checked.

    \b
    Example:
      offload image build debian
    """
    began = time.monotonic()
    with open_client() as client:
        query = "?rebuild=true" if rebuild else ""
        image = show_work(client, f"/v1/images/{name}/build{query}", f"image {name}")
    if as_json:
        print_json(image)
    else:
        took = format_duration(time.monotonic() - began)
        say(f"image {name} is ready: {image['digest'][:12]}, {format_size(image['size_on_disk'])}, after {took}")


@app.command()
def show(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Show an image.

    \b
    Example:
      offload image show debian
    """
    with open_client() as client:
        image = client.get(f"/v1/images/{name}")
    if as_json:
        print_json(image)
    else:
        print_text(image_text(image, time.time()))


@app.command()
def rm(name: str = _NAME, as_json: bool = json_option()) -> None:
    """Remove an image; it is made again when a machine needs it.

    \b
    Example:
      offload image rm debian
    """
    with open_client() as client:
        digests = client.delete(f"/v1/images/{name}")
    if as_json:
        print_json(digests)
    else:
        say(f"removed {', '.join(digest[:12] for digest in digests)}")


@app.command()
def gc(as_json: bool = json_option()) -> None:
    """Remove what nobody needs: images that no description names and no machine uses, environments that no build used
    lately, and templates that no machine would use.

    \b
    Example:
      offload image gc
    """
    with open_client() as client:
        gone = client.post("/v1/images/gc")
    if as_json:
        print_json(gone)
    else:
        *counts, last = (f"{len(digests)} {kind if len(digests) != 1 else kind[:-1]}" for kind, digests in gone.items())
        say(f"removed {', '.join(counts)} and {last}")


def add_to(commands: typer.Typer) -> None:
    """Add the group `offload image`."""
    commands.add_typer(app, name="image")
