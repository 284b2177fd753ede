"""From a running QEMU to a system that we can talk to: secrets delivered, logged in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from offloadd.bridge import Bridge
from offloadd.errors import BootError
from offloadd.guest.secret_root import SecretRoot
from offloadd.guest.secret_service import deliver_secrets
from offloadd.guest.ssh import Guest, open_ssh
from offloadd.model.machine import SECRETS_PORT, SSH_PORT
from offloadd.vm.instance import Instance, while_running

Phase = Callable[[str], None]


@asynccontextmanager
async def open_guest(
    instance: Instance, secrets: SecretRoot, bridge: Bridge, phase: Phase, *, adopted: bool = False
) -> AsyncIterator[Guest]:
    """Deliver the secrets and log in.

    Args:
        phase: is told what is waited for.
        adopted: the guest has its secrets from an earlier daemon.
    Raises:
        BootError: the guest ended, or was not ready within the machine's limit; with its console's last lines.
        SshError, ProtocolError: it is not the guest that it should be.
    """
    limit_s = instance.record.plan.boot_timeout_s
    missing = "sshd did not take a login" if adopted else "the secret service gave no hello"
    guest: Guest | None = None
    async with AsyncExitStack() as stack:
        async with while_running(instance, BootError):
            with trio.move_on_after(limit_s):
                if not adopted:
                    phase("waiting for the secret service")
                    await deliver_secrets(instance.port(SECRETS_PORT), secrets.root, machine=instance.name)
                    missing = "sshd did not take a login after the secrets were sent"
                phase("logging in")
                guest = await stack.enter_async_context(open_ssh(bridge, instance.port(SSH_PORT), secrets))
            if guest is None:
                raise BootError(
                    f"not ready after {limit_s:.0f} s: {missing}",
                    subject=instance.name,
                    detail=instance.console_tail(),
                    hint=f"offload vm logs {instance.record.plan.machine}; a slow host may need a longer boot-timeout",
                )
        yield guest
