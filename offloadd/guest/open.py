"""From a running QEMU to a guest that we can talk to: through our agent, or, where others made the disk, over the network."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import structlog
import trio

from offloadd.bridge import Bridge
from offloadd.errors import AgentError, BootError, StalledError
from offloadd.guest.agent import Agent, open_agent
from offloadd.guest.secret_root import SecretRoot
from offloadd.guest.secret_service import (
    ProcessStream,
    SecretLimits,
    deliver_secrets,
    read_secret_root,
    receive_hello,
    send_secrets,
)
from offloadd.guest.ssh import Guest, check_host_key, open_ssh
from offloadd.model.machine import SECRETS_PORT
from offloadd.nursery import open_narrow_nursery
from offloadd.vm.instance import Instance, while_running

log = structlog.get_logger()

T = TypeVar("T")
Phase = Callable[[str], None]

CLOCK_TOLERANCE_S = 120.0
"""As for the clock at the start of a build; no Linux clock is younger than its boot."""
SECRETS_S = 60.0
SSHD_S = 150.0
"""The guest gives up before that, if it is an honest one."""
STALLED = "kthread timer wakeup didn't happen"
"""What Linux's RCU prints (kernel/rcu/tree_stall.h) when a processor has stood idle for 21 s beside a timer that ran out: no
interrupts of its timer come any more.  Seen twice under TCG, before its kernels booted on one processor (`plan/argv.py`)."""
STALL_CHECK_S = 1.0
_NO_TIME = 1 << 40
"""Seconds that no clock shows."""
_LATE_S = 1.0
"""After which a clock that a guest was told at its start is told again."""


async def boot_twice(boot: Callable[[], Awaitable[T]], tell: Phase) -> T:
    """Do it, and once more when the guest's kernel stalls: that is an accident of one boot.

    Raises:
        StalledError: it stalled again; and whatever `boot` raises.
    """
    try:
        return await boot()
    except StalledError as exc:
        # Its console's log makes room for that of the next.
        log.warning("a guest has stalled", machine=exc.subject, console=exc.detail)
        tell(f"{exc}; booting it once more")
    return await boot()


@asynccontextmanager
async def open_guest(instance: Instance, phase: Phase, *, adopted: bool = False) -> AsyncIterator[Agent]:
    """Wait for the guest's agent.

    Args:
        phase: is told what is waited for.
        adopted: an earlier daemon was connected before.
    Raises:
        BootError: the guest ended, or was not ready within the machine's limit; with its console's last lines.
        StalledError: its kernel says that it will never be.
        AgentError, ProtocolError: it is not the guest that it should be.
    """
    async with open_agent(instance.files.agent, instance.name) as agent:
        await greet(instance, agent, phase, adopted=adopted)
        yield agent


async def greet(instance: Instance, agent: Agent, phase: Phase, *, adopted: bool = False) -> None:
    """The same where the connection was made before."""
    limit_s = instance.record.plan.boot_timeout_s
    phase("waiting for the guest")
    async with while_running(instance, BootError), open_narrow_nursery() as nursery:
        if not adopted:
            nursery.start_soon(_watch_for_stall, instance)
        with trio.move_on_after(limit_s) as limit:
            await agent.greet(adopted=adopted)
        nursery.cancel_scope.cancel()
        if limit.cancelled_caught:
            raise BootError(
                f"not ready after {limit_s:.0f} s: its agent gave no hello",
                subject=instance.record.plan.machine,
                detail=instance.console_tail(),
                hint=f"offload vm logs {instance.record.plan.machine}; a slow host may need a longer boot-timeout",
            )


async def _watch_for_stall(instance: Instance) -> None:
    while STALLED not in instance.console_tail(lines=200):  # noqa: ASYNC110 - nothing tells that a file has grown
        await trio.sleep(STALL_CHECK_S)
    raise StalledError(
        "its kernel gets no interrupts of a timer",
        subject=instance.record.plan.machine,
        detail=instance.console_tail(),
        hint=f"try again; offload vm logs {instance.record.plan.machine}",
    )


async def personalize(instance: Instance, agent: Agent) -> None:
    """Make the guest another machine than all others: entropy, address, machine id; and set its clock to the plan's date.

    An address that nobody sees, of a build without the network, stays as it is: to change it costs an emulated guest 30 ms.

    Raises:
        AgentError, ProtocolError: it cannot be done; the clock does not show the date.
    """
    await _personalize(instance, agent, None)


async def wake(instance: Instance, agent: Agent, phase: Phase) -> None:
    """`greet` and `personalize` a guest that goes on from where it was saved: it answers both at once."""
    await _personalize(instance, agent, phase)


async def _personalize(instance: Instance, agent: Agent, phase: Phase | None) -> None:
    record = instance.record
    address = bytes([0x52, 0x54, 0x00]) + secrets.token_bytes(3)  # QEMU's prefix
    is_seen = record.plan.network or record.purpose == "machine"
    moment = record.clock()
    asked = agent.ask(
        "identify",
        seed=secrets.token_hex(64),
        machine_id=secrets.token_hex(16),
        mac=address.hex(":") if is_seen else "",
        date=moment,
    )
    if phase:
        await greet(instance, agent, phase)
    check_clock(await agent.answer("identify", asked), moment, agent.machine)
    if record.clock() - moment > _LATE_S:
        await set_clock(agent, record.clock())


async def set_clock(agent: Agent, moment: float) -> None:
    """Set the guest's clock, and read it back.

    Raises:
        AgentError: it does not show what it was set to.
    """
    check_clock(await agent.call("clock", date=moment), moment, agent.machine)


def check_clock(said: dict[str, object], moment: float, machine: str) -> None:
    """AgentError: an answer does not have that clock in it."""
    clock, uptime = _seconds(said.get("clock")), _seconds(said.get("uptime", 0.0))
    # Next to 1970 it shows how long the guest has run.
    latest = None if uptime is None else max(moment, uptime) + CLOCK_TOLERANCE_S
    if clock is None or latest is None or not moment - CLOCK_TOLERANCE_S <= clock <= latest:
        raise AgentError(f"its clock does not show what it was set to, but {repr(said.get('clock'))[:50]}", subject=machine)


def _seconds(said: object) -> float | None:
    """None where no clock shows it: what JSON gives is also NaN, and numbers that no float holds."""
    return said if isinstance(said, int | float) and not isinstance(said, bool) and 0 <= said < _NO_TIME else None


async def install_secrets(agent: Agent, root: Path, *, without: str | None = None) -> None:
    """Copy the files of a secret root into the guest.

    Args:
        without: the beginning of the names of those that stay here.
    Raises:
        ConfigError: a file of it cannot be sent.
        AgentError, ProtocolError: the guest does not take them.
    """
    found = await trio.to_thread.run_sync(read_secret_root, root)
    files = [file for file in found if without is None or not file.name.startswith(without)]
    with trio.move_on_after(SECRETS_S):
        async with agent.open_process("secrets") as process:
            stream = ProcessStream(process)
            if not await receive_hello(stream):
                raise AgentError("the secret service gave no hello", subject=agent.machine)
            await send_secrets(stream, files)
            if await process.wait():
                raise AgentError("the guest did not install its secrets", subject=agent.machine)
            return
    raise AgentError(f"the guest did not install its secrets within {SECRETS_S:.0f} s", subject=agent.machine)


async def start_sshd(agent: Agent) -> None:
    """Have the guest listen for logins.

    Raises:
        AgentError: it does not.
    """
    with trio.move_on_after(SSHD_S):
        status, _ = await agent.run("sshd")
        if not status:
            return
    raise AgentError("sshd does not listen", subject=agent.machine, hint="offload vm console")


@asynccontextmanager
async def open_by_ssh(
    instance: Instance, secrets: SecretRoot, bridge: Bridge, phase: Phase, *, adopted: bool = False
) -> AsyncIterator[Guest | None]:
    """Give a guest without our agent its secrets, and log in: then it has taken them.

    Args:
        phase: is told what is waited for.
        adopted: an earlier daemon may have given them already.
    Returns:
        The login; None where the guest has no account for us: its sshd has shown its host key then.
    Raises:
        ConfigError: a file of the secret root cannot be sent.
        BootError: the guest ended, was not ready within the machine's limit, or its clock does not show its date.
        ProtocolError, SshError: it is not the guest that it should be.
    """
    admission = _Admission(instance, secrets, bridge, phase)
    limit_s = instance.record.plan.boot_timeout_s
    async with AsyncExitStack() as stack:
        guest: Guest | None = None
        async with while_running(instance, BootError):
            with trio.move_on_after(limit_s) as limit:
                guest = await admission.wait(stack, adopted=adopted)
            if limit.cancelled_caught:
                raise BootError(
                    f"not ready after {limit_s:.0f} s: {admission.waits_for}",
                    subject=instance.name,
                    detail=instance.console_tail(),
                    hint=f"offload vm console {instance.record.plan.machine}; a slow host may need a longer boot-timeout",
                )
        yield guest


class _Admission:
    """The way from a guest that has just been started to one that we are logged in to."""

    def __init__(self, instance: Instance, secrets: SecretRoot, bridge: Bridge, phase: Phase) -> None:
        self.waits_for = "its secret service gave no hello"
        self._instance = instance
        self._secrets = secrets
        self._bridge = bridge
        self._phase = phase

    async def wait(self, stack: AsyncExitStack, *, adopted: bool) -> Guest | None:
        if not adopted:
            await self._deliver()
            return await self._log_in(stack)
        async with open_narrow_nursery() as nursery:
            nursery.start_soon(self._deliver)
            guest = await self._log_in(stack)
            nursery.cancel_scope.cancel()
        return guest

    async def _deliver(self) -> None:
        self._phase("waiting for its secret service")
        plan, secrets = self._instance.record.plan, self._secrets
        limits = SecretLimits(retries=plan.secret_retries, handshake_timeout_s=plan.secret_handshake_timeout_s)
        port = self._instance.port(SECRETS_PORT)
        try:
            await deliver_secrets(
                port,
                secrets.root,
                machine=self._instance.name,
                limits=limits,
                withheld=secrets.withheld,
                heard=lambda: self._phase("sending its secrets"),
            )
        except BootError as exc:
            exc.detail = exc.detail or self._instance.console_tail()
            raise
        self.waits_for = "it took its secrets, and then nobody could log in"
        self._phase("waiting for sshd")

    async def _log_in(self, stack: AsyncExitStack) -> Guest | None:
        port = self._instance.ssh_port
        if not self._secrets.has_account:
            await check_host_key(self._bridge, port, self._secrets)
            return None
        guest = await stack.enter_async_context(open_ssh(self._bridge, port, self._secrets))
        await _check_shown_clock(guest, self._instance)
        return guest


async def _check_shown_clock(guest: Guest, instance: Instance) -> None:
    """BootError: the guest has moved its clock.  Nothing is said of one that does not know `date`."""
    status, output = await guest.run("date +%s")
    expected, text = instance.record.clock(), output.strip()
    if status or not text.isdigit() or len(text) > 15 or abs(int(text) - expected) <= CLOCK_TOLERANCE_S:
        return
    raise BootError(
        f"its clock shows {int(text)} s since 1970, not {expected:.0f}",
        subject=instance.name,
        hint="systemd and NTP move an old clock forward; systemd takes the kernel argument systemd.clock_usec=MICROSECONDS",
    )
