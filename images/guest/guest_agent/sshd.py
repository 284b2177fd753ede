"""Have init start sshd, and wait until it listens."""

import _signal
import os
import time

LIMIT_S = 120.0
LISTENS = ": 00000000:0016 00000000:0000 0A"
"""What /proc/net/tcp says of a socket that listens on port 22 of all addresses."""


def listens():
    with open("/proc/net/tcp") as file:
        return LISTENS in file.read()


def main(arguments):
    deadline = time.monotonic() + LIMIT_S
    tries = 0
    while not listens():
        if time.monotonic() > deadline:
            os.write(2, b"sshd does not listen\n")
            return 1
        # Init is its parent, and starts it again should it end.  A signal that comes right before it waits is not seen.
        if tries % 50 == 0:
            os.kill(1, _signal.SIGHUP)
        tries += 1
        time.sleep(0.02)
    return 0
