"""A build in a GNU/Hurd guest, over SSH with what the guest has.

Debian's build dependencies are installed by the guest's own apt, where the machine has a network: our key is root's there too,
for that one command (images/guest/hurd).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import trio

from offloadd.builder.job import Job, Listener, Report
from offloadd.builder.outputs import OutputsReceiver
from offloadd.builder.plain import PlainProcess, PlainShell, run_plain_build
from offloadd.errors import BuildFailedError, BuildTimeoutError, MachineLostError, SshError
from offloadd.model.quantity import format_duration
from offloadd.nursery import open_narrow_nursery
from offloadd.place.place import Place
from offloadd.place.vm import describe
from offloadd.vm.console import clean
from offloadd.vm.instance import Instance, while_running

INSTALL_S = 3600.0
"""For the guest's apt: it fetches package lists, then packages, then unpacks them on an emulated processor."""
INSTALL = "install-packages"
"""Whatever is asked for, root's key starts that program and no other."""
MAX_LOG = 16 << 20
"""Characters."""
_LAST_LINES = 20

LogIn = Callable[[], AbstractAsyncContextManager[PlainShell]]


@asynccontextmanager
async def open_in_childhurd(
    instance: Instance, shell: PlainShell, *, own: bool, log_in_as_root: LogIn, packages: tuple[str, ...] = ()
) -> AsyncIterator[Place]:
    """A place in a childhurd that runs.

    Args:
        own: it was booted for this build alone.
        log_in_as_root: where packages are installed.
        packages: what is installed there before the first step, as dependencies of Debian's.
    Raises:
        MachineLostError: the instance ended under the build.
    """

    async def run(job: Job, outputs: OutputsReceiver, listener: Listener) -> Report:
        if packages:
            async with log_in_as_root() as root:
                await install_packages(root, packages, listener.log)
        return await run_plain_build(shell, job, outputs, listener, thrown_away=own)

    async with while_running(instance, MachineLostError):
        yield Place(run=run, clock=instance.record.clock, facts=describe(instance) | {"own_vm": own})


async def install_packages(root: PlainShell, packages: tuple[str, ...], log: Callable[[str], None]) -> None:
    """Have the guest install packages.

    Args:
        root: a login as root.
        log: is given what apt says.
    Raises:
        BuildFailedError: it cannot.
        BuildTimeoutError: nor in time.
        SshError: the connection broke.
    """
    said = ""

    async def send(process: PlainProcess) -> None:
        # One that ended without reading all of it has said why.
        with suppress(SshError):
            await process.send("".join(f"{package}\n" for package in packages).encode())
            await process.send_eof()

    log(f"installing {len(packages)} packages and what they need with the guest's apt\n")
    with trio.move_on_after(INSTALL_S):
        async with root.open_process(INSTALL) as process, open_narrow_nursery() as nursery:
            nursery.start_soon(send, process)
            nursery.start_soon(_drain, process)
            # What it does is told on standard error.
            while piece := await process.receive_error():
                text = piece.decode(errors="replace")
                said += text
                if len(said) > MAX_LOG:
                    raise BuildFailedError("its apt says more than anybody reads")
                log(text)
            status = await process.wait()
            nursery.cancel_scope.cancel()
        if status:
            lines = clean(said).splitlines()[-_LAST_LINES:]
            what = f"the guest's apt cannot install what the build needs: exit status {status}"
            raise BuildFailedError(what, detail="\n".join(lines), hint="not every package of Debian's is there for GNU/Hurd")
        return
    raise BuildTimeoutError(f"the guest's apt did not install what the build needs within {format_duration(INSTALL_S)}")


async def _drain(process: PlainProcess) -> None:
    """Nothing is said there; a guest that does so all the same would wait for us."""
    with suppress(SshError):
        while await process.receive():
            pass
