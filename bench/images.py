"""Making an image, against the bare mmdebstrap call."""

from __future__ import annotations

import os
import subprocess

import trio

from bench.measure import Budget, Row, Series, in_turn, time_program
from bench.workplace import Workplace
from offloadd.config.library import load_library
from offloadd.debian import Mirror, find_mirrors
from offloadd.model.image import ImageRecipe
from offloadd.process import Progress

IMAGE = "debian"
LIMIT_S = 600


def measure_image(place: Workplace, budget: Budget, tell: Progress) -> list[Row]:
    """The rows for making the default image in `place`, whose cache is its own."""
    ours, bare, lean = Series("offload image build"), Series("mmdebstrap"), Series("mmdebstrap, INITRD=No")
    recipe = load_library(place.paths.library).image(IMAGE)
    assert isinstance(recipe, ImageRecipe)
    tar = place.paths.cache.parent / "bare.tar"
    argv = _bare_call(recipe, str(tar), trio.run(_find_mirrors, recipe))
    place.run("vm", "list")  # the daemon is started beforehand
    for number in budget.rounds():
        for name in in_turn(number, "bare", "ours", "lean"):
            tell(f"image {number + 1}, {name}", None)
            if name == "ours":
                ours.seconds.append(place.run("image", "build", "--rebuild", IMAGE, limit_s=LIMIT_S))
                continue
            extra = {"INITRD": "No"} if name == "lean" else {}
            (lean if extra else bare).seconds.append(time_program(argv, env=os.environ | extra, limit_s=LIMIT_S))
            tar.unlink()
    call = "the bare `mmdebstrap` call with the same packages and mirror, to a tar"
    build = f"`offload image build --rebuild` : {call}"
    return [
        Row(name="image build", compares=build, ours=ours, base=bare, target=1.3),
        Row(name="image build, less", compares=f"{build}, told to make no initramfs", ours=ours, base=lean),
    ]


async def _find_mirrors(recipe: ImageRecipe) -> tuple[Mirror, ...]:
    return await find_mirrors(recipe.suite, override=recipe.mirror)


def _bare_call(recipe: ImageRecipe, tar: str, mirrors: tuple[Mirror, ...]) -> list[str]:
    """What a person would type."""
    argv = ["mmdebstrap", "--variant=minbase", f"--mode={'root' if os.geteuid() == 0 else 'unshare'}"]
    argv += [f"--architectures={recipe.architecture}", f"--include={','.join((recipe.kernel, *recipe.packages))}"]
    argv += [f"--aptopt={line}" for line in _apt_options()]
    return [*argv, recipe.suite, tar, *(mirror.line() for mirror in mirrors)]


def _apt_options() -> list[str]:
    """What the host's apt needs to reach its mirror."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    return [line for line in dump.splitlines() if "::Proxy" in line or line.startswith("Acquire::Check-")]
