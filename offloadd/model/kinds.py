"""All kinds of machine, by the word that a machine's file has for them."""

from __future__ import annotations

from offloadd.model.childhurd import Childhurd
from offloadd.model.machine import BinfmtMachine, BuildVm, EmulatedVm, LocalMachine, Machine, SshMachine

KINDS: dict[str, type[Machine]] = {
    "local": LocalMachine,
    "binfmt": BinfmtMachine,
    "build-vm": BuildVm,
    "childhurd": Childhurd,
    "emulated-vm": EmulatedVm,
    "ssh": SshMachine,
}
