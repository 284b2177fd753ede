"""A childhurd has the devices, at the same places, and the forwardings that the command line of Guix's manual makes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import trio

from offloadd.model.childhurd import Childhurd
from offloadd.plan.machine import BootFiles, plan_vm
from offloadd.vm.ports import parse_usernet
from tests.ports import own_childhurd_ports

from .bare_qemu import Bench

LEFT_OUT = {"ide-cd", "floppy", "isa-parallel"}
"""What QEMU adds by itself, and no childhurd has a use for."""


def manuals_words(disk: Path, number: int | None, kind: str) -> list[str]:
    """Guix's manual, *hurd-vm-configuration*: `net-options`, `options`, `image`, and -M q35 for the 64-bit one."""
    step = 1000 * (number or 0)
    forwards = {11004: 1004, 10022: 22, 15900: 5900}
    hostfwd = "".join(f",hostfwd=tcp:127.0.0.1:{host + step}-:{guest}" for host, guest in forwards.items())
    machine = ["-M", "q35"] if kind == "hurd64-qcow2" else []
    return [
        *("qemu-system-x86_64", *machine, "-m", "512"),
        *("--device", "rtl8139,netdev=net0", "--netdev", f"user,id=net0{hostfwd}"),
        *("--snapshot", "--hda", str(disk), "--no-reboot"),
    ]


def ask_manuals(words: list[str]) -> dict[str, str]:
    """What the manual's QEMU says of itself, before its first instruction."""
    questions = ("info qtree", "info usernet")
    done = subprocess.run(
        [*words, "-S", "-display", "none", "-monitor", "stdio"],
        input="\n".join([*questions, "quit"]) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = re.split(r"^.*\(qemu\).*$", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(questions, answers, strict=False))


def devices(tree: str) -> dict[str, str]:
    """Device -> where it is, from `info qtree`: its bus, and there its address or unit."""
    found: dict[str, str] = {}
    buses: list[tuple[int, str]] = []
    device = ""
    for line in tree.splitlines():
        text, depth = line.strip(), len(line) - len(line.lstrip())
        buses = [(at, name) for at, name in buses if at < depth]
        if text.startswith("bus: "):
            buses.append((depth, text.removeprefix("bus: ")))
        elif text.startswith("dev: "):
            device = text.removeprefix("dev: ").split(",")[0]
            found[device] = buses[-1][1] if buses else ""
        elif place := re.match(r"class .*, (addr \S+),|(unit = \d+) ", text):
            found[device] += f" {place[1] or place[2]}"
    return found


@pytest.mark.parametrize("kind", ["hurd-qcow2", "hurd64-qcow2"])
@pytest.mark.parametrize("number", [None, 1, 2])
async def test_is_the_machine_of_the_manual(bench: Bench, number: int | None, kind: str) -> None:
    disk = bench.root / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    fields = {"kind": "childhurd", "name": f"childhurd{number or ''}", "image": "hurd", "type": kind, "memory-size": 512}
    declared = Childhurd.model_validate(fields | ({"id": number} if number else {}))
    plan = plan_vm(declared, bench.plan().qemu, BootFiles(image="hurd", digest="d", disk=disk, disk_size=1 << 20))

    with own_childhurd_ports():
        theirs = await trio.to_thread.run_sync(ask_manuals, manuals_words(disk, number, kind))
        async with bench.open(plan, cores=(0,)) as instance:
            tree = await instance._qmp.human("info qtree")
            usernet = await instance._qmp.human("info usernet")

    expected, found = devices(theirs["info qtree"]), devices(tree)
    assert found["ide-hd"] == "ide.0 unit = 0"
    assert re.search(r" addr \S+$", found["rtl8139"])
    assert found == {device: place for device, place in expected.items() if device not in LEFT_OUT}
    step = 1000 * (number or 0)
    assert parse_usernet(usernet) == parse_usernet(theirs["info usernet"])
    assert parse_usernet(usernet) == {1004: 11004 + step, 22: 10022 + step, 5900: 15900 + step}
    bench.assert_nothing_left()
