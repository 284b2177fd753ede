"""The program that a setup writes for build daemons."""

import subprocess
from pathlib import Path

from offloadd.setup.steps import wrapper


def test_a_wrapper_quotes(tmp_path: Path) -> None:
    program = tmp_path / "hook"
    program.write_bytes(wrapper(["printf", "%s.", "it's $HOME"], {"A": "x'y", "HOME": ""}))
    done = subprocess.run(["sh", program, "a b", ""], capture_output=True, text=True, check=True)
    assert done.stdout == "it's $HOME.a b.."
