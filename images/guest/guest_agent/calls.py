"""Calls of the host: short, and answered at once."""

import _signal
import os
import time

from guest_agent.identity import seed, set_mac, set_machine_id, set_rtc


def clock(given):
    """The clock, set to `date` (seconds since 1970) first when that is given."""
    if given.get("date") is not None:
        # Linux has no clock that is younger than the boot.
        time.clock_settime(time.CLOCK_REALTIME, max(given["date"], time.monotonic() + 0.01))
        set_rtc(time.gmtime())
    return {"clock": time.time(), "uptime": time.monotonic()}


def identify(given):
    """Be another machine than the one that was saved."""
    seed(bytes.fromhex(given["seed"]))
    set_machine_id(given["machine_id"])
    if given.get("mac"):
        try:  # noqa: SIM105  contextlib is slow to import
            set_mac("eth0", bytes.fromhex(given["mac"].replace(":", "")))
        except OSError:
            # A machine without a network has no address.
            pass
    return clock(given)


def power_off(given):
    """What the power button does."""
    os.kill(1, _signal.SIGUSR1)
    return {}


CALLS = {"clock": clock, "identify": identify, "power-off": power_off}
