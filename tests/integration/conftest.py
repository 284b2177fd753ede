"""A bench for QEMUs without a system in them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from offloadd.bridge import open_bridge
from offloadd.plan.machine import QemuFacts
from offloadd.vm.qemu import find_qemu

from .bare_qemu import Bench


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for sockets."""
    root = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    yield root
    shutil.rmtree(root)


@pytest.fixture
async def bench(short: Path) -> AsyncIterator[Bench]:
    binary = await find_qemu("qemu-system-x86_64")
    facts = QemuFacts(binary=str(binary.path), version=binary.version, cpu_models=binary.cpu_models, accelerator="tcg")
    async with open_bridge() as bridge:
        made = Bench(short, bridge, facts)
        yield made
        for pid in made.qemus():
            os.kill(pid, signal.SIGKILL)
