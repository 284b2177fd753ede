"""What makes one clone of a saved guest another machine than its siblings: entropy, MAC address, machine id."""

import _socket
import fcntl
import os
import sys

# linux/random.h: _IOW('R', 3, int[2]) and _IO('R', 7); linux/rtc.h: _IOW('p', 0x0a, struct rtc_time), nine ints.
RNDADDENTROPY, RNDRESEEDCRNG, RTC_SET_TIME = 0x40085203, 0x5207, 0x4024700A
if os.uname().machine.startswith(("ppc", "mips")):
    # Their directions differ.
    RNDADDENTROPY, RNDRESEEDCRNG, RTC_SET_TIME = 0x80085203, 0x20005207, 0x8024700A
SIOCSIFHWADDR = 0x8924
ARPHRD_ETHER = 1
MACHINE_ID = "/run/machine-id"
"""Where the image's /etc/machine-id leads."""


# Arguments of ioctls are bytearrays, which Python tries first: the error that it makes of bytes costs as much as the rest.
def seed(entropy):
    """Have the kernel's random numbers depend on `entropy` from here on."""
    size = len(entropy).to_bytes(4, sys.byteorder)
    bits = (8 * len(entropy)).to_bytes(4, sys.byteorder)
    device = os.open("/dev/urandom", os.O_RDWR)
    try:
        fcntl.ioctl(device, RNDADDENTROPY, bytearray(bits + size + entropy))
        # Otherwise the generator goes on for minutes with what all clones have in common.
        fcntl.ioctl(device, RNDRESEEDCRNG)
    finally:
        os.close(device)


def set_mac(interface, address):
    """Give the interface another address (6 bytes)."""
    request = interface.encode().ljust(16, b"\0") + ARPHRD_ETHER.to_bytes(2, sys.byteorder) + address
    endpoint = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        fcntl.ioctl(endpoint.fileno(), SIOCSIFHWADDR, bytearray(request.ljust(40, b"\0")))
    finally:
        endpoint.close()


def set_rtc(now):
    """Set the hardware's clock, by which programs may set the system's: a saved guest has that of its saving."""
    fields = (now.tm_sec, now.tm_min, now.tm_hour, now.tm_mday, now.tm_mon - 1, now.tm_year - 1900, 0, 0, 0)
    try:
        device = os.open("/dev/rtc0", os.O_RDONLY)
    except OSError:
        # Not every machine has one.
        return
    try:
        fcntl.ioctl(device, RTC_SET_TIME, bytearray(b"".join([field.to_bytes(4, sys.byteorder) for field in fields])))
    except OSError:
        # Nor does each keep every year.
        pass
    finally:
        os.close(device)


def set_machine_id(text):
    # All are of the same length: the one that was saved is written over.
    file = os.open(MACHINE_ID, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, text.encode() + b"\n")
    finally:
        os.close(file)
