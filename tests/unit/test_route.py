"""Which machine takes a build, and why the others do not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.breaker import Breaker
from offloadd.errors import NoMachineError
from offloadd.model.childhurd import Childhurd
from offloadd.model.kinds import KINDS
from offloadd.model.machine import BuildVm, EmulatedVm, Machine
from offloadd.model.quantity import check_clock_holds
from offloadd.model.state import MachineMode
from offloadd.route import Cost, Decision, Emulation, MachineFacts, Needs, find_route

from .plans import day

X86, ARM, S390, HURD = "x86_64-linux", "aarch64-linux", "s390x-linux", "i586-gnu"
NOW = 1_700_000_000.0
MANDATORY: dict[str, dict[str, Any]] = {
    "local": {},
    "binfmt": {},
    "build-vm": {"image": "debian"},
    "childhurd": {"image": "hurd-guix"},
    "emulated-vm": {"image": "debian", "systems": [ARM]},
    "ssh": {"systems": [X86], "host": "h", "host_key": "ssh-ed25519 AAAA", "private_key": "/k"},
}


def machine(name: str, kind: str = "local", **fields: Any) -> Machine:
    return KINDS[kind].model_validate({"kind": kind, "name": name, **MANDATORY[kind], **fields})


def facts(system: str = X86, **changes: Any) -> MachineFacts:
    return MachineFacts(**{"systems": (system,), "running": True, **changes})


def needs(**changes: Any) -> Needs:
    return Needs(**{"system": X86, "name": "hello", **changes})


def route(asked: Needs, *known: tuple[Machine, MachineFacts]) -> Decision:
    return find_route(asked, [machine for machine, _ in known], {machine.name: about for machine, about in known}, NOW)


def names(decision: Decision) -> list[str]:
    return [candidate.machine.name for candidate in decision.candidates]


def obstacle(asked: Needs, what: Machine, known: MachineFacts) -> str:
    """Why the one machine cannot; empty when it can."""
    decision = route(asked, (what, known))
    assert len(decision.candidates) + len(decision.passed_over) == 1
    return decision.passed_over.get(what.name, "")


# Can it?


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (facts(ARM), "builds aarch64-linux, not x86_64-linux"),
        (facts(systems=(ARM, S390)), "builds aarch64-linux, s390x-linux, not x86_64-linux"),
        (facts(systems=()), "builds nothing, not x86_64-linux"),
        (facts(missing={X86: "no KVM today"}), "no KVM today"),
        (facts(systems=(), missing={X86: "no KVM today"}), "no KVM today"),
        (facts(missing={ARM: "no such thing"}), ""),
        (facts(fault="qemu-system-x86_64 is not installed"), "qemu-system-x86_64 is not installed"),
    ],
)
def test_the_system_type(known: MachineFacts, reason: str) -> None:
    assert obstacle(needs(), machine("m"), known) == reason


def test_a_machine_of_which_nothing_is_known_is_passed_over() -> None:
    assert find_route(needs(), [machine("m")], {}, NOW).passed_over == {"m": "nothing is known of it yet"}


def test_a_disk_of_somebody_elses() -> None:
    known = facts(takes_builds=False)
    own = "boots from a disk of its own (debian), in which there is no agent of ours: "
    assert obstacle(needs(), machine("m", "build-vm"), known) == own + "no builds of ours go there"
    sent = machine("m", "build-vm", daemons=["guix", "nix"])
    assert obstacle(needs(), sent, known) == own + "only builds of guix-daemon and nix-daemon go there"
    assert obstacle(needs(machine="m", keep_machine=True), sent, known).startswith(own)


def test_a_childhurd_that_is_its_users_alone() -> None:
    own = machine("childhurd", "childhurd", offloading=False)
    told = obstacle(needs(system=HURD), own, facts(HURD, takes_builds=False))
    assert told == "takes no builds (`offloading: false` in its file)"


def test_what_is_not_linux_is_not_for_qemu_user() -> None:
    binfmt = (machine("binfmt", "binfmt"), facts(ARM, emulation=Emulation.USER))
    hurd = (machine("childhurd", "childhurd"), facts(HURD, emulation=Emulation.FULL, running=False))
    local, vm = (machine("local"), facts()), (machine("arm", "emulated-vm"), facts(ARM))
    decision = route(needs(system=HURD), binfmt, hurd, local, vm)
    assert names(decision) == ["childhurd"]
    assert decision.candidates[0].why == "full emulation, has to boot, 1 of 1 slot free"
    assert decision.passed_over["binfmt"] == "GNU/Hurd is another kernel: qemu-user runs only Linux programs"
    assert decision.unrelated == ("arm", "local")
    assert route(needs(system=ARM), binfmt, hurd, local).unrelated == ("childhurd", "local")


def test_a_childhurd_builds_with_what_it_has() -> None:
    plain, known = machine("h", "childhurd"), facts(HURD)
    guix = machine("h", "childhurd", features=["guix", "gcc", "make"])
    asked = needs(system=HURD, packages=frozenset({"gcc", "make"}))
    assert obstacle(asked, plain, known) == "has no environments, and its features do not name gcc, make"
    assert obstacle(asked, guix, known) == ""
    debian = needs(system=HURD, debian=True)
    assert obstacle(debian, plain, known) == ""
    assert "Guix's packages, not Debian's" in obstacle(debian, guix, known)
    assert obstacle(debian, machine("h", "childhurd", features=["guix", "debian"]), known) == ""


def test_a_childhurd_that_keeps_its_disk_is_built_in() -> None:
    kept = machine("h", "childhurd", options=["-vga", "none"])
    known = facts(HURD, running=False, stateful=True)
    assert "whose clock is not moved" in obstacle(needs(system=HURD, date=day("2020-01-01")), kept, known)
    assert obstacle(needs(system=HURD, date=day("2020-01-01")), machine("h", "childhurd"), facts(HURD)) == ""
    for started, why in ((True, "runs"), (False, "has to be started")):
        found = route(needs(system=HURD), (kept, facts(HURD, running=False, stateful=True, started=started))).candidates[0]
        assert found.why == f"native, {why}, 1 of 1 slot free"
        assert found.cost.cold is not started


def test_a_hurds_load_is_one_too_high() -> None:
    def overloaded(load: float) -> bool:
        return route(needs(system=HURD), (machine("h", "childhurd"), facts(HURD, load=load))).candidates[0].cost.overloaded

    assert (overloaded(1.8), overloaded(1.81)) == (False, True)


def test_features() -> None:
    asked = needs(features=frozenset({"kvm", "big", "gpu"}))
    assert obstacle(asked, machine("m", features=["big", "kvm", "gpu", "more"]), facts()) == ""
    assert obstacle(asked, machine("m", features=["big"]), facts()) == "lacks the features gpu, kvm"
    assert obstacle(needs(features=frozenset({"kvm"})), machine("m"), facts()) == "lacks the feature kvm"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"date": day("2020-01-01")}, "date"),
        ({"cpu": "Haswell"}, "CPU"),
        ({"kernel": "6.1"}, "kernel"),
        ({"date": day("2020-01-01"), "cpu": "max"}, "date and CPU"),
    ],
)
def test_only_a_vm_has_another_date_cpu_or_kernel(kind: str, asked: dict[str, Any], words: str) -> None:
    reason = obstacle(needs(**asked), machine("m", kind), facts())
    assert reason == ("" if kind in ("build-vm", "childhurd", "emulated-vm") else f"is no VM: its {words} cannot be chosen")


def test_a_date_is_held_by_the_clock_of_the_system_type_and_of_the_machine() -> None:
    two = facts(systems=("i686-linux", X86))
    asked = needs(date=day("2050-01-01"))
    assert obstacle(asked, machine("m", "build-vm"), facts()) == ""
    assert "i686-linux" in obstacle(asked, machine("m", "build-vm", systems=["i686-linux", X86]), two)
    asked = needs(date=day("2050-01-01"), system="i686-linux")
    assert "2038-01-19" in obstacle(asked, machine("m", "build-vm", systems=[X86, "i686-linux"]), two)
    assert "2038-01-19" in obstacle(needs(date=day("2050-01-01"), system=S390), machine("m", "emulated-vm"), facts(S390))


@pytest.mark.parametrize(
    ("kernel", "asked", "reason"),
    [
        ("6.1.0-56-cloud-amd64", "6.1", ""),
        ("6.1.0-56-cloud-amd64", "6.1.0-56-cloud-amd64", ""),
        ("6.1.0-56-cloud-amd64", "6.1.", ""),
        ("", "6.1", ""),
        ("6.10.3", "6.1", "has kernel 6.10.3, not 6.1"),
        ("6.1", "6.1.0", "has kernel 6.1, not 6.1.0"),
        ("5.10.0", "6.1", "has kernel 5.10.0, not 6.1"),
    ],
)
def test_a_kernel_that_is_known_must_be_the_one_that_was_asked_for(kernel: str, asked: str, reason: str) -> None:
    assert obstacle(needs(kernel=asked), machine("m", "build-vm"), facts(kernel=kernel)) == reason


def test_the_network() -> None:
    assert "network" in obstacle(needs(network=True), machine("m"), facts())
    assert obstacle(needs(network=True), machine("m", network=True), facts()) == ""


@pytest.mark.parametrize(
    ("kind", "fields", "known", "reason"),
    [
        ("local", {}, None, ""),
        ("local", {}, 4096, ""),
        ("local", {}, 4095, "has 4095 MiB of memory, not 4096"),
        ("build-vm", {"memory-size": 4096}, 1024, ""),
        ("build-vm", {"memory-size": 2048}, None, "has 2048 MiB of memory, not 4096"),
        ("emulated-vm", {"memory-size": 2048}, 65536, "has 2048 MiB of memory, not 4096"),
    ],
)
def test_memory_is_what_is_known_or_what_a_vm_is_given(
    kind: str, fields: dict[str, Any], known: int | None, reason: str
) -> None:
    assert obstacle(needs(memory_mib=4096), machine("m", kind, **fields), facts(memory_mib=known)) == reason


def test_disk() -> None:
    asked = needs(disk=20 << 30)
    assert obstacle(asked, machine("m"), facts(disk_free=20 << 30)) == ""
    assert obstacle(asked, machine("m"), facts(disk_free=None)) == ""
    assert obstacle(asked, machine("m"), facts(disk_free=0)) == "has 0 B of disk free, not 20.0 GiB"


def test_a_quirk_passes_over_user_emulation_alone() -> None:
    asked = needs(quirk="died of SIGILL under qemu-user")
    reason = obstacle(asked, machine("m", "binfmt"), facts(emulation=Emulation.USER))
    assert reason == "died of SIGILL under qemu-user (to try it again: offload quirks forget hello)"
    assert obstacle(asked, machine("m", "emulated-vm"), facts(emulation=Emulation.FULL)) == ""
    assert obstacle(asked, machine("m"), facts()) == ""
    assert obstacle(needs(), machine("m", "binfmt"), facts(emulation=Emulation.USER)) == ""


# May it?


def test_drained_and_offline() -> None:
    assert obstacle(needs(), machine("m"), facts(mode=MachineMode.DRAINED)) == "is drained (offload machine resume m)"
    assert obstacle(needs(), machine("m"), facts(mode=MachineMode.OFFLINE)) == "is offline (offload machine resume m)"


@pytest.mark.parametrize(
    ("breaker", "busy", "reason"),
    [
        (Breaker(2), 0, ""),
        (Breaker(3, NOW + 90), 0, "is left alone until 2023-11-14T22:14:50Z (another 1m30s) after 3 failures in a row"),
        (Breaker(4, NOW), 0, ""),
        (Breaker(4, NOW), 1, "is being tried with one build after 4 failures in a row"),
        (Breaker(3, 1e300), 0, ""),
    ],
)
def test_the_breaker(breaker: Breaker, busy: int, reason: str) -> None:
    assert obstacle(needs(), machine("m", parallel_builds=4), facts(breaker=breaker, busy=busy)) == reason


def test_what_it_cannot_comes_before_what_it_may_not() -> None:
    assert obstacle(needs(), machine("m"), facts(ARM, mode=MachineMode.OFFLINE)).startswith("builds")
    asked = needs(machine="other")
    assert obstacle(asked, machine("m"), facts(mode=MachineMode.OFFLINE)).startswith("is offline")
    assert obstacle(asked, machine("m"), facts()) == "other was asked for"


# Cost


RANKS: list[tuple[str, tuple[Machine, MachineFacts], tuple[Machine, MachineFacts]]] = [
    # The second of each pair is better in every later part of the cost, and by name.
    ("overloaded", (machine("z", "ssh"), facts(emulation=Emulation.FULL)), (machine("a", "ssh"), facts(load=0.9))),
    ("emulation", (machine("z"), facts(busy=9)), (machine("a"), facts(emulation=Emulation.USER))),
    ("emulation", (machine("z"), facts(emulation=Emulation.USER)), (machine("a"), facts(emulation=Emulation.FULL))),
    ("full", (machine("z"), facts(running=False)), (machine("a"), facts(busy=1))),
    ("cold", (machine("z", parallel_builds=4), facts(busy=3)), (machine("a", parallel_builds=4), facts(running=False))),
    (
        "slot_load",
        (machine("z", speed=0.1, parallel_builds=4), facts(busy=1)),
        (machine("a", parallel_builds=4), facts(busy=2)),
    ),
    (
        "slot_load",
        (machine("z", speed=0.1, parallel_builds=4), facts(busy=1)),
        (machine("a", parallel_builds=2), facts(busy=1)),
    ),
    ("slot_load", (machine("z", speed=0.1), facts(busy=2)), (machine("a"), facts(busy=3))),
    ("slowness", (machine("z", speed=2), facts()), (machine("a", speed=1.5), facts(environments=frozenset({"e"})))),
    ("stranger", (machine("z"), facts(environments=frozenset({"e"}))), (machine("a"), facts(environments=frozenset({"f"})))),
    ("name", (machine("a"), facts()), (machine("b"), facts())),
]


@pytest.mark.parametrize(("part", "better", "worse"), RANKS)
def test_the_parts_of_the_cost_in_their_order(
    part: str, better: tuple[Machine, MachineFacts], worse: tuple[Machine, MachineFacts]
) -> None:
    for known in ((better, worse), (worse, better)):
        decision = route(needs(environment="e"), *known)
        assert names(decision) == [better[0].name, worse[0].name]
        assert decision.passed_over == {}
        first, second = (candidate.cost for candidate in decision.candidates)
        assert first < second
        assert next(name for name in Cost._fields if getattr(first, name) != getattr(second, name)) == part


@pytest.mark.parametrize(
    ("load", "threshold", "overloaded"), [(0.8, 0.8, False), (0.81, 0.8, True), (9, None, False), (None, 0.8, False)]
)
def test_a_load_above_the_threshold(load: float | None, threshold: float | None, overloaded: bool) -> None:
    decision = route(needs(), (machine("m", overload_threshold=threshold), facts(load=load)))
    assert decision.candidates[0].cost.overloaded is overloaded


# What the user wishes


def test_the_machine_that_was_asked_for_and_who_else_could() -> None:
    known = [(machine("a"), facts()), (machine("b"), facts(load=99)), (machine("c"), facts(ARM))]
    decision = route(needs(machine="b"), *known)
    assert decision.best().name == "b"
    assert names(decision) == ["b"]
    assert decision.passed_over == {"a": "b was asked for", "c": "builds aarch64-linux, not x86_64-linux"}


def test_preferred_names_and_kinds_come_first_in_the_order_of_the_wish() -> None:
    known = [
        (machine("a"), facts()),
        (machine("b", "ssh"), facts(running=False)),
        (machine("c", "ssh"), facts(load=5)),
        (machine("d", "build-vm"), facts(emulation=Emulation.FULL)),
        (machine("e", "ssh"), facts(ARM)),
    ]
    assert names(route(needs(), *known)) == ["a", "b", "d", "c"]
    assert names(route(needs(prefer=("ssh",)), *known)) == ["b", "c", "a", "d"]
    assert names(route(needs(prefer=("d", "ssh")), *known)) == ["d", "b", "c", "a"]
    assert names(route(needs(prefer=("c", "ssh", "c")), *known)) == ["c", "b", "a", "d"]
    assert names(route(needs(prefer=("e", "nobody")), *known)) == ["a", "b", "d", "c"]


# What is told


def test_why_in_one_line() -> None:
    known = facts(busy=1, environments=frozenset({"e"}))
    assert route(needs(), (machine("m", parallel_builds=2), known)).candidates[0].why == "native, 1 of 2 slots free"
    decision = route(
        needs(prefer=("m",), environment="e"), (machine("m", speed=0.2), facts(load=1.5, environments=frozenset({"e"})))
    )
    assert decision.candidates[0].why == (
        "preferred, overloaded (load 1.50 for each core), native, 1 of 1 slot free, speed 0.2, has the environment"
    )
    decision = route(needs(), (machine("m"), facts(emulation=Emulation.FULL, running=False, breaker=Breaker(3, NOW))))
    assert decision.candidates[0].why == "full emulation, not running, 1 of 1 slot free, on trial after 3 failures"
    assert "no slot free, 2 waiting" in route(needs(), (machine("m"), facts(busy=3))).candidates[0].why


@pytest.mark.parametrize(
    ("keep", "known", "why"),
    [
        (False, {"running": True}, "has a template"),
        (False, {"running": True, "started": True}, "has a template"),
        (False, {"running": False, "started": True}, "has to boot"),
        (False, {"running": False}, "has to boot"),
        (True, {"running": False, "started": True}, "runs"),
        (True, {"running": True, "started": True}, "runs"),
        (True, {"running": True, "started": False}, "has to be started"),
    ],
)
@pytest.mark.parametrize("kind", ["build-vm", "emulated-vm"])
def test_how_a_vm_comes_to_a_build(kind: str, keep: bool, known: dict[str, bool], why: str) -> None:
    system = X86 if kind == "build-vm" else ARM
    found = route(needs(system=system, keep_machine=keep), (machine("m", kind), facts(system, **known))).candidates[0]
    assert found.why == f"native, {why}, 1 of 1 slot free"
    assert found.cost.cold is (why in ("has to boot", "has to be started"))


def test_a_build_that_keeps_its_machine_goes_where_one_runs() -> None:
    started = (machine("z", "build-vm"), facts(running=False, started=True))
    known = [(machine("a", "build-vm"), facts()), started]
    assert names(route(needs(keep_machine=True), *known)) == ["z", "a"]
    assert names(route(needs(), *known)) == ["a", "z"]


@pytest.mark.parametrize("kind", ["local", "ssh", "binfmt"])
def test_only_a_virtual_machine_can_be_kept(kind: str) -> None:
    assert obstacle(needs(), machine("m", kind), facts()) == ""
    told = obstacle(needs(keep_machine=True), machine("m", kind), facts())
    assert told == "is no virtual machine: there is nothing to keep"


def test_as_json() -> None:
    known = [(machine("a", "ssh"), facts(emulation=Emulation.USER)), (machine("c"), facts(ARM)), (machine("b"), facts(ARM))]
    told = route(needs(), *known).to_json()
    assert json.loads(json.dumps(told)) == told
    assert (told["system"], told["machine"], [*told["passed_over"]]) == (X86, "a", ["b", "c"])
    assert (told["kinds"], told["unrelated"], told["hint"]) == ({"b": "local", "c": "local"}, ["b", "c"], "")
    assert told["candidates"] == [
        {
            "machine": "a",
            "kind": "ssh",
            "why": "user emulation, 1 of 1 slot free",
            "wish": 0,
            "overloaded": False,
            "emulation": "user",
            "full": False,
            "cold": False,
            "slot_load": 0.0,
            "slowness": 1.0,
            "stranger": True,
        }
    ]
    assert route(needs()).to_json() == {
        "system": X86,
        "machine": None,
        "candidates": [],
        "passed_over": {},
        "kinds": {},
        "unrelated": [],
        "hint": "offload machine list",
    }


def refusal(asked: Needs, *known: tuple[Machine, MachineFacts]) -> NoMachineError:
    with pytest.raises(NoMachineError) as caught:
        route(asked, *known).best()
    return caught.value


def test_nobody_can_and_every_reason_is_told() -> None:
    error = refusal(needs(), (machine("b"), facts(ARM)), (machine("a"), facts(fault="is broken")))
    assert (error.subject, error.what) == ("hello", "no machine can do this build")
    assert error.detail == "a: is broken\nb: builds aarch64-linux, not x86_64-linux"
    assert error.hint == "offload machine list"
    assert refusal(needs()).hint == "offload machine list"


def test_the_one_that_was_asked_for_tells_its_own_reason_first() -> None:
    error = refusal(needs(machine="m"), (machine("a"), facts()), (machine("m"), facts(fault="is broken")))
    assert error.what == "m cannot do this build"
    assert error.detail == "m: is broken\na: m was asked for"
    assert error.hint == "without --machine it could go to a"
    others = [(machine(name), facts()) for name in "dcba"]
    error = refusal(needs(machine="m"), (machine("m"), facts(fault="is broken")), *others)
    assert error.hint == "without --machine it could go to a, b, c and others"


def test_a_hint_where_one_command_helps() -> None:
    missing = "qemu-aarch64 is not registered: offload binfmt register aarch64"
    unregistered = (machine("binfmt", "binfmt"), facts(systems=(), missing={ARM: missing}))
    local, vm = (machine("local"), facts()), (machine("vm", "emulated-vm"), facts(ARM, fault="qemu is not installed"))
    error = refusal(needs(system=ARM), unregistered, local)
    assert (error.hint, error.detail) == (
        "offload binfmt register aarch64-linux",
        f"binfmt: {missing}\nlocal: builds x86_64-linux, not aarch64-linux",
    )
    assert refusal(needs(system=ARM), unregistered, local, vm).hint == "offload machine list"
    assert refusal(needs(system=ARM, machine="binfmt"), unregistered, vm).hint == "offload binfmt register aarch64-linux"
    drained = (machine("b"), facts(mode=MachineMode.DRAINED))
    assert refusal(needs(), drained, (machine("a"), facts(ARM))).hint == "offload machine resume b"


def test_a_hint_for_the_hurd() -> None:
    binfmt, local = (machine("binfmt", "binfmt"), facts(ARM)), (machine("local"), facts())
    set_up = "offload image set hurd-guix FILE-OR-URL"
    empty = facts(HURD, fault="its image hurd-guix is not set up", remedy=set_up)
    error = refusal(needs(system=HURD), binfmt, local, (machine("childhurd", "childhurd"), empty))
    assert error.hint == set_up
    assert "childhurd: its image hurd-guix is not set up\n" in error.detail
    error = refusal(needs(system="x86_64-gnu"), binfmt, local, (machine("childhurd", "childhurd"), empty))
    assert error.hint == "declare a machine of kind childhurd that builds for x86_64-gnu: docs/childhurd.md"


def test_a_hint_to_who_has_the_feature() -> None:
    hurd = (machine("childhurd", "childhurd", features=["guix"]), facts(HURD))
    local, binfmt = (machine("local"), facts()), (machine("b", "binfmt"), facts(missing={X86: "this host runs it by itself"}))
    asked = needs(features=frozenset({"guix"}))
    assert refusal(asked, hurd, local, binfmt).hint == "childhurd has guix, and builds for i586-gnu: -s i586-gnu"
    assert refusal(asked, local, binfmt).hint == "offload machine list"


# Properties: whatever the machines are and whatever is asked

SYSTEMS = ["i686-linux", X86, ARM, S390, HURD]
KERNELS = ["", "6.1.0", "6.10.3", "5.10.1"]
DATES = [None, None, None, day("2020-01-01"), day("2050-01-01"), day("2100-01-01")]
FEATURES = st.frozensets(st.sampled_from(["kvm", "big", "gpu"]), max_size=2)
BREAKERS = st.sampled_from([Breaker(), Breaker(), Breaker(2), Breaker(3, NOW + 60), Breaker(3, NOW), Breaker(5, 1e300)])


@st.composite
def machines_of(draw: st.DrawFn, name: str) -> Machine:
    kind = draw(st.sampled_from(list(KINDS)))
    fields: dict[str, Any] = {
        "features": draw(FEATURES),
        "network": draw(st.booleans()),
        "parallel-builds": draw(st.integers(1, 3)),
        "speed": draw(st.sampled_from([0.2, 1.0, 2.0])),
        "overload-threshold": draw(st.sampled_from([None, 0.8])),
    }
    if kind == "childhurd":
        fields |= {"memory-size": draw(st.sampled_from([1024, 4096]))}
    if kind in ("build-vm", "emulated-vm"):
        fields |= {"memory-size": draw(st.sampled_from([1024, 4096])), "date": None}
        systems = [[X86], ["i686-linux", X86]] if kind == "build-vm" else [[ARM], [S390], [ARM, "armhf-linux"]]
        fields["systems"] = draw(st.sampled_from(systems))
    return machine(name, kind, **fields)


FACTS = st.builds(
    MachineFacts,
    systems=st.lists(st.sampled_from(SYSTEMS), unique=True, max_size=4).map(tuple),
    emulation=st.sampled_from(Emulation),
    missing=st.dictionaries(st.sampled_from(SYSTEMS), st.just("not now"), max_size=1),
    fault=st.sampled_from(["", "", "", "is broken"]),
    mode=st.sampled_from([MachineMode.ONLINE, *MachineMode]),
    breaker=BREAKERS,
    running=st.booleans(),
    started=st.booleans(),
    stateful=st.sampled_from([False, False, True]),
    busy=st.integers(0, 4),
    load=st.sampled_from([None, 0.1, 3.0]),
    memory_mib=st.sampled_from([None, 1024, 4096]),
    disk_free=st.sampled_from([None, 0, 1 << 40]),
    environments=st.sampled_from([frozenset[str](), frozenset({"e"})]),
    kernel=st.sampled_from(KERNELS),
)
NEEDS = st.builds(
    Needs,
    system=st.sampled_from(SYSTEMS),
    name=st.just("hello"),
    date=st.sampled_from(DATES),
    cpu=st.sampled_from([None, None, "max"]),
    kernel=st.sampled_from([None, None, None, "6.1", "5"]),
    features=st.one_of(st.just(frozenset[str]()), FEATURES),
    network=st.booleans(),
    memory_mib=st.sampled_from([None, 2048]),
    disk=st.sampled_from([None, 1 << 30]),
    environment=st.sampled_from(["", "e"]),
    machine=st.sampled_from([None, None, None, "m0", "m1"]),
    prefer=st.lists(st.sampled_from(["m0", "m2", *KINDS]), max_size=3).map(tuple),
    keep_machine=st.booleans(),
    quirk=st.sampled_from(["", "", "died of SIGILL"]),
)
Park = list[tuple[Machine, MachineFacts]]


@st.composite
def parks(draw: st.DrawFn) -> Park:
    return [(draw(machines_of(f"m{number}")), draw(FACTS)) for number in range(draw(st.integers(0, 6)))]


def lacks(asked: Needs, what: Machine, known: MachineFacts) -> Iterable[str]:
    """What stands in the issue, one by one, without the router's code."""
    vm = isinstance(what, (BuildVm, Childhurd, EmulatedVm))
    if asked.system not in set(known.systems) - set(known.missing):
        yield "system"
    if known.fault:
        yield "fault"
    if not set(asked.features) <= set(what.features):
        yield "features"
    if not vm and (asked.date, asked.cpu, asked.kernel) != (None, None, None):
        yield "vm"
    if not vm and asked.keep_machine:
        yield "nothing to keep"
    if asked.date and vm:
        for system in (asked.system, what.systems[0]):
            try:
                check_clock_holds(asked.date, system)
            except ValueError:
                yield "clock"
    if asked.kernel and vm and known.kernel:
        wanted = asked.kernel.split(".")
        if known.kernel.split(".")[: len(wanted)] != wanted:
            yield "kernel"
    if asked.network and not what.network:
        yield "network"
    if asked.date and known.stateful:
        yield "own clock"
    memory = what.memory_size if isinstance(what, (BuildVm, Childhurd, EmulatedVm)) else known.memory_mib
    if None not in (asked.memory_mib, memory) and (asked.memory_mib or 0) > (memory or 0):
        yield "memory"
    if None not in (asked.disk, known.disk_free) and (asked.disk or 0) > (known.disk_free or 0):
        yield "disk"
    if asked.quirk and known.emulation == 1:
        yield "quirk"
    if known.mode != "online":
        yield "mode"
    failed, until = known.breaker.failures, known.breaker.open_until
    if failed >= 3 and (NOW < until < NOW + 7200 or known.busy):
        yield "breaker"
    if asked.machine not in (None, what.name):
        yield "asked"


@given(NEEDS, parks())
def test_a_candidate_is_who_lacks_nothing_and_each_machine_is_told_once(asked: Needs, park: Park) -> None:
    decision = route(asked, *park)
    fit = {what.name for what, known in park if not list(lacks(asked, what, known))}
    assert set(names(decision)) == fit
    assert sorted([*names(decision), *decision.passed_over]) == sorted(what.name for what, _ in park)
    assert all(decision.passed_over.values())
    assert all(candidate.why for candidate in decision.candidates)
    if fit:
        assert decision.best().name == names(decision)[0]
        costs = [candidate.cost for candidate in decision.candidates]
        assert costs == sorted(costs)
        assert len(set(costs)) == len(costs)
    else:
        with pytest.raises(NoMachineError) as caught:
            decision.best()
        assert len(caught.value.detail.splitlines()) == len(park)
        assert caught.value.hint


@given(NEEDS, parks(), st.randoms(use_true_random=False))
def test_the_order_of_the_files_does_not_matter(asked: Needs, park: Park, chance: random.Random) -> None:
    shuffled = park[:]
    chance.shuffle(shuffled)
    first, second = route(asked, *park), route(asked, *shuffled)
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())


@given(NEEDS, parks(), st.data())
def test_one_more_machine_takes_no_route_away(asked: Needs, park: Park, data: st.DataObject) -> None:
    more = (data.draw(machines_of("new")), data.draw(FACTS))
    before, after = route(asked, *park), route(asked, *park, more)
    assert [name for name in names(after) if name != "new"] == names(before)
    if before.candidates:
        assert after.best().name in (before.best().name, "new")


@given(NEEDS, parks())
def test_a_wish_ranks_and_never_refuses(asked: Needs, park: Park) -> None:
    decision = route(asked, *park)
    plain = route(Needs(**{name: getattr(asked, name) for name in Needs.__slots__ if name != "prefer"}), *park)
    assert set(names(decision)) == set(names(plain))
    preferred = [candidate.cost.wish for candidate in decision.candidates]
    assert preferred == sorted(preferred)
    rest = [name for name, wish in zip(names(decision), preferred, strict=True) if wish == 0]
    assert rest == [name for name in names(plain) if name in rest]
