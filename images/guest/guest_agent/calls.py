"""Calls of the host: short, and answered at once."""

import _signal
import os
import time

from build_service.clock import set_clock
from build_service.disks import find_disk
from build_service.kernel import MS_NODEV, MS_NOSUID, MS_RDONLY, Kernel

from guest_agent.identity import seed, set_mac, set_machine_id, set_rtc


def clock(given):
    """The clock, set to `date` (seconds since 1970) first when that is given."""
    if given.get("date") is not None:
        set_clock(given["date"])
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


def mount(given):
    """Show the squashfs on the disk `serial` at `path`, read-only, for as long as this machine lives.

    What is read of it stays in memory, and so does what an emulator has translated of its programs.
    """
    os.makedirs(given["path"], exist_ok=True)
    Kernel().mount(find_disk("/sys", given["serial"]), given["path"], "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
    return {}


def power_off(given):
    """What the power button does."""
    os.kill(1, _signal.SIGUSR1)
    return {}


CALLS = {"clock": clock, "identify": identify, "mount": mount, "power-off": power_off}
