"""Builds that take minutes, side by side and beside the tests of another worker: see the fixture `long`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

from tests.conftest import REPOSITORY, World

HELLO = {
    # system type: architecture, machine, word size
    "x86_64-linux": ("amd64", "local", 64),
    "i686-linux": ("i386", "local", 32),
    "aarch64-linux": ("arm64", "binfmt", 64),
}
LIMIT_S = 2400
"""A guard: where no environment is kept yet, one of a foreign architecture takes minutes."""
EXAMPLE = REPOSITORY / "examples/mbedtls/offload.yaml"


def one_suite_undated(recipe: str) -> str:
    """The example with the faster of its two suites, and without its date, which `--date` gives where it is wanted."""
    for old, new in {
        "date: auto\n": "",
        "test_suite_ssl test_suite_x509parse": "test_suite_x509parse",
        "-O1": "-O0",
        "(ssl|x509parse)": "x509parse",
    }.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    return recipe


@dataclass(frozen=True)
class LongBuilds:
    """Builds that take minutes, side by side: each alone would leave a core idle."""

    folder: Path
    hello: Future[CompletedProcess[str]]
    today: Future[CompletedProcess[str]]
    then: Future[CompletedProcess[str]]


@contextmanager
def start_long_builds(world: World, folder: Path) -> Iterator[LongBuilds]:
    """Start them; leaving the block ends those that still run."""
    undated = folder / "mbedtls"
    undated.mkdir()
    (undated / "offload.yaml").write_text(one_suite_undated(EXAMPLE.read_text()))
    systems = [word for system in HELLO for word in ("-s", system)]
    with ThreadPoolExecutor() as pool:

        def start(*arguments: str | Path) -> Future[CompletedProcess[str]]:
            return pool.submit(world.run, "build", *arguments, status=None, limit_s=LIMIT_S)

        try:
            yield LongBuilds(
                folder,
                hello=start(*systems, "-o", folder / "hello", "hello"),
                today=start("-o", folder / "today", undated),
                then=start("--date", "auto", "-o", folder / "then", undated),
            )
        finally:
            world.stop_daemon()
