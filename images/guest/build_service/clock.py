"""The system's clock, set to a build's date."""

import errno
import time

SLACK_S, MOST_S = 0.01, 60.0


def set_clock(date):
    """Set it to `date` (seconds since 1970), or as close to that as the kernel allows; OSError when it cannot be set.

    Linux has no clock that is younger than the boot (settimeofday: EINVAL), so that 1970-01-01T00:00:00 comes a few seconds
    late.  A machine that stood still since its age was asked for is older by now: then it gets more time.
    """
    slack = SLACK_S
    while True:
        youngest = time.monotonic() + slack
        try:
            time.clock_settime(time.CLOCK_REALTIME, max(date, youngest))
        except OSError as exc:
            if exc.errno != errno.EINVAL or date > youngest or slack > MOST_S:
                raise
            slack *= 4
        else:
            return
