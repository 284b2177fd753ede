"""Where a machine's port is said to ssh: most versions of Nix take none in the address of a machine (2.8 says so loudly)."""

from __future__ import annotations

import os

_DEFAULT = ("~/.ssh/config", "/etc/ssh/ssh_config")


class SshConfig:
    """A file for `ssh -F`, which has all that ssh would have read without it, and what is added before.

    It has no name that must be removed: it is ours, in memory, and ends with us.

    Args:
        options: NIX_SSHOPTS as they are.
    """

    def __init__(self, options: str) -> None:
        self._file = os.memfd_create("ssh_config")
        # The last -F of a command line counts.
        self.options = f"{options} -F /proc/{os.getpid()}/fd/{self._file}".strip()
        """NIX_SSHOPTS for the real program."""
        self._rest = "Host *\n" + "".join(f"Include {file}\n" for file in _chosen(options.split()))
        self.add("")

    def add(self, text: str) -> None:
        """Have `text` in it, which comes first and so counts, in the place of what was added before."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{text}{self._rest}".encode(), 0)


def _chosen(words: list[str]) -> list[str]:
    """The files that ssh would read."""
    files = list(_DEFAULT)
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("-F"):
            file = word[2:] or following
            files = [] if file == "none" else [file]
    return files
