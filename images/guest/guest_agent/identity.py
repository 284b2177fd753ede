"""What makes one clone of a saved guest another machine than its siblings: entropy, MAC address, machine id."""

import _socket
import fcntl
import os
import sys

# linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7), on all architectures but those whose directions differ.
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
RNDADDENTROPY_OTHER, RNDRESEEDCRNG_OTHER = 0x80085203, 0x20005207
"""POWER, MIPS."""
# linux/rtc.h: _IOW('p', 0x0a, struct rtc_time), nine ints.
RTC_SET_TIME, RTC_SET_TIME_OTHER = 0x4024700A, 0x8024700A
SIOCSIFHWADDR = 0x8924
ARPHRD_ETHER = 1
MACHINE_ID = "/run/machine-id"
"""Where the image's /etc/machine-id leads."""


def seed(entropy):
    """Have the kernel's random numbers depend on `entropy` from here on."""
    size = len(entropy).to_bytes(4, sys.byteorder)
    bits = (8 * len(entropy)).to_bytes(4, sys.byteorder)
    other = _has_other_numbers()
    device = os.open("/dev/urandom", os.O_RDWR)
    try:
        fcntl.ioctl(device, RNDADDENTROPY_OTHER if other else RNDADDENTROPY, bits + size + entropy)
        # Otherwise the generator goes on for minutes with what all clones have in common.
        fcntl.ioctl(device, RNDRESEEDCRNG_OTHER if other else RNDRESEEDCRNG)
    finally:
        os.close(device)


def set_mac(interface, address):
    """Give the interface another address (6 bytes)."""
    request = interface.encode().ljust(16, b"\0") + ARPHRD_ETHER.to_bytes(2, sys.byteorder) + address
    endpoint = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        fcntl.ioctl(endpoint.fileno(), SIOCSIFHWADDR, request.ljust(40, b"\0"))
    finally:
        endpoint.close()


def set_rtc(now):
    """Set the hardware's clock, by which programs may set the system's: a saved guest has that of its saving."""
    fields = (now.tm_sec, now.tm_min, now.tm_hour, now.tm_mday, now.tm_mon - 1, now.tm_year - 1900, 0, 0, 0)
    request = RTC_SET_TIME_OTHER if _has_other_numbers() else RTC_SET_TIME
    try:
        device = os.open("/dev/rtc0", os.O_RDONLY)
    except OSError:
        # Not every machine has one.
        return
    try:
        fcntl.ioctl(device, request, b"".join(field.to_bytes(4, sys.byteorder) for field in fields))
    except OSError:
        # Nor does each keep every year.
        pass
    finally:
        os.close(device)


def _has_other_numbers():
    """Whether ioctls are numbered as on POWER and MIPS."""
    return os.uname().machine.startswith(("ppc", "mips"))


def set_machine_id(text):
    with open(MACHINE_ID, "w") as file:
        file.write(text + "\n")
