"""Templates, the guests of machines and `keep-machine` over the daemon's real socket, without a guest."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offloadd.client import Client
from offloadd.errors import NoMachineError, NotFoundError, UsageError
from offloadd.model.machine import BuildVm
from offloadd.plan.machine import DISKS_OF_A_CLONE
from offloadd.template.freeze import MANIFEST
from offloadd.template.key import machine_facts
from offloadd.vm.record import InstanceRecord, read_record, write_record

from ..unit.plans import plan
from ..unit.test_templates import place_template
from .test_daemon import Daemon, daemon, left_over, make_daemon, request

__all__ = ["daemon", "make_daemon"]

MONTH_S = 31 * 24 * 3600
FILE = {"kind": "build-vm", "name": "vm", "image": "debian", "qemu": "/bin/false"}


def place(daemon: Daemon, client: Client, digest: str, **changes: Any) -> Path:
    """A template as the daemon would make it for the machine `vm` now, but for the changes."""
    image = next(row["digest"] for row in client.get("/v1/images") if row["name"] == "debian")
    made_of = machine_facts(BuildVm.model_validate(FILE), image, Path(FILE["qemu"]))
    more = {"cpu": "Haswell", "disk_slots": DISKS_OF_A_CLONE, "accelerator": "tcg", "qemu_version": "7.2"}
    return place_template(daemon.paths.cache / "templates", digest, {**made_of, **more, **changes}, "vm")


def stale(client: Client) -> dict[str, str]:
    """First digit of each template's digest -> why it is of no use."""
    return {row["digest"][0]: row["stale"] for row in client.get("/v1/templates")}


def test_a_template_is_stale_when_its_machine_needs_another(daemon: Daemon) -> None:
    daemon.machine("vm")
    with daemon.start() as client:
        assert client.get("/v1/templates") == []
        place(daemon, client, "a" * 64)
        place(daemon, client, "b" * 64, image_digest="c" * 64)
        assert stale(client) == {"a": "", "b": "made from an older image"}
        (row,) = (row for row in client.get("/v1/templates") if row["digest"] == "a" * 64)
        assert (row["machine"], row["cpu"], row["memory_mib"], row["in_memory"]) == ("vm", "Haswell", 2048, False)
        daemon.machine("vm", "memory-size: 512\n")
        assert stale(client)["a"] == "the machine has another memory-size now"
        (daemon.paths.config / "machines/vm.yaml").unlink()
        assert stale(client)["a"] == "no machine needs it"


def test_garbage_is_what_nobody_would_use_or_has_used(daemon: Daemon) -> None:
    daemon.machine("vm")
    with daemon.start() as client:
        kept = place(daemon, client, "a" * 64)
        gone = [place(daemon, client, "b" * 64, memory_mib=1), place(daemon, client, "c" * 64), place(daemon, client, "d" * 64)]
        long_ago = time.time() - MONTH_S
        os.utime(gone[1] / MANIFEST, (long_ago, long_ago))
        (gone[2] / MANIFEST).write_text("damaged")
        assert client.post("/v1/templates/gc") == ["b" * 64, "c" * 64, "d" * 64]
        assert [path.exists() for path in (kept, *gone)] == [True, False, False, False]
        os.utime(kept / MANIFEST, (long_ago, long_ago))
        assert client.post("/v1/images/gc") == {"images": [], "environments": [], "templates": ["a" * 64]}


def test_remove_by_the_beginning_of_the_digest(daemon: Daemon) -> None:
    daemon.machine("vm")
    with daemon.start() as client:
        directories = [place(daemon, client, digest * 32) for digest in ("ab", "ac")]
        with pytest.raises(UsageError, match="several"):
            client.delete("/v1/templates/a")
        with pytest.raises(NotFoundError, match="no such template"):
            client.delete("/v1/templates/d")
        assert client.delete("/v1/templates/ab")["digest"] == "ab" * 32
        assert [directory.exists() for directory in directories] == [False, True]


def test_what_cannot_be_made_is_told(daemon: Daemon) -> None:
    daemon.machine("broken")
    daemon.machine("booted", "template: false\n")
    with daemon.start() as client:

        def build(**asked: str) -> list[dict[str, Any]]:
            return list(client.stream("POST", "/v1/templates/build", body=asked))

        with pytest.raises(NotFoundError, match="no machine called 'nothing'"):
            build(machine="nothing")
        with pytest.raises(UsageError, match="template: false"):
            build(machine="booted")
        with pytest.raises(UsageError, match="date"):
            build(machine="broken", date="never")
        with pytest.raises(UsageError, match="virtual"):
            build(machine="local")
        last = build(machine="broken")[-1]
        assert (last["event"], last["error"]) == ("error", "HostError")
        assert client.get("/v1/templates") == []


def test_the_router_knows_who_has_a_template(daemon: Daemon) -> None:
    daemon.machine("vm")
    asked = request(date="2020-01-01", machine="vm").to_json()
    with daemon.start() as client:

        def candidate() -> dict[str, Any]:
            (found,) = client.post("/v1/route", asked)["candidates"]
            return dict(found)

        assert (candidate()["cold"], "has to boot" in candidate()["why"]) == (True, True)
        place(daemon, client, "a" * 64, image_digest="b" * 64)
        assert candidate()["cold"]
        place(daemon, client, "c" * 64)
        assert (candidate()["cold"], "has a template" in candidate()["why"]) == (False, True)
        daemon.machine("vm", "template: false\n")
        assert candidate()["cold"]


def test_only_a_machine_without_a_date_of_the_builds_can_be_kept(daemon: Daemon) -> None:
    daemon.machine("vm")
    with daemon.start() as client:
        decision = client.post("/v1/route", request(**{"keep-machine": True}).to_json())
        assert decision["passed_over"]["local"] == "is no virtual machine: there is nothing to keep"
        assert all("has to be started" in found["why"] for found in decision["candidates"])
        with pytest.raises(NoMachineError, match="local cannot"):
            client.create_build(request(**{"keep-machine": True, "machine": "local"}).to_json(), iter([b""]))
        for dated in ({"date": "2020-01-01"}, {"recipe": {"date": "auto"}}):
            with pytest.raises(UsageError, match="has a date"):
                client.create_build(request(**{"keep-machine": True, **dated}).to_json(), iter([b""]))
        assert client.get("/v1/builds") == []


def test_the_guests_of_a_machine_and_their_memory(daemon: Daemon) -> None:
    daemon.machine("vm")
    with daemon.start() as client:
        assert [row["guests"] for row in client.get("/v1/machines", vms=True) if row["name"] == "vm"] == [[]]
        for name, purpose in (("build-0a1b2c3d", "build"), ("warm-1", "warm"), ("vm", "machine")):
            file = left_over(daemon, name, purpose) / "instance.json"
            record = read_record(file)
            assert isinstance(record, InstanceRecord)
            pid = os.getpid() if purpose != "warm" else record.pid
            write_record(file, replace(record, pid=pid, plan=replace(plan("vm"), instance=name)))
        (row,) = (row for row in client.get("/v1/machines", vms=True) if row["name"] == "vm")
        assert [(guest["instance"], guest["purpose"]) for guest in row["guests"]] == [
            ("build-0a1b2c3d", "build"),
            ("warm-1", "warm"),
        ]
        assert row["private_memory"] > 1 << 20
        assert row["guests"][0]["private_memory"] > 1 << 20
        assert row["guests"][1]["private_memory"] is None, "it has just ended"
        assert client.get("/v1/machines/vm")["instance"]["private_memory"] > 1 << 20
