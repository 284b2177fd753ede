"""Nothing left open: from a declared machine to the exact command line of its QEMU.  Pure functions of frozen values."""
