"""Our build hooks between build daemons, which are played here, and programs that stand for the real guix and nix."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from ..conftest import REPOSITORY, World
from .foreign_hooks import GUIX, NIX

HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGN1cnZlIG9mIGEga2V5IHRoYXQgbm9ib2R5IGhh"
ARGUMENTS = ["offload", "x86_64-linux", "3600", "false", "86400"]


@pytest.fixture(scope="module")
def world(make_world: Callable[[], World]) -> World:
    """A world with two remote machines, which are taken to run; nobody ever connects to them."""
    made = make_world()
    for name, more in {
        "tower": "daemons: [guix, nix]\nspeed: 2\nfeatures: [kvm]\n",
        "attic": "daemons: [guix]\nsystems: [i686-linux]\n",
    }.items():
        folder = made.root / "config/offload/machines"
        folder.mkdir(parents=True, exist_ok=True)
        systems = "" if "systems" in more else "systems: [x86_64-linux]\n"
        where = f"host: 127.0.0.1\nport: 9\nhost-key: {HOST_KEY}\nprivate-key: /keys/{name}\n"
        (folder / f"{name}.yaml").write_text(f"kind: ssh\nname: {name}\n{where}{systems}{more}")
    for name, text in {"guix": GUIX, "nix": NIX}.items():
        program = made.root / name
        program.write_text(text.format(python=sys.executable))
        program.chmod(0o755)
    made.run("machine", "list")  # starts the daemon
    return made


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """Guix's directory, without machines of the user's own."""
    folder = tmp_path / "guix"
    folder.mkdir()
    (folder / "acl").write_text("(acl)")
    return folder


class Asked:
    """A hook and the build daemon's ends of its pipes."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.to, self.said, self.log = process, process.stdin, process.stdout, log

    def tell(self, data: bytes) -> None:
        self.to.write(data)
        self.to.flush()

    def _send_last(self, data: bytes) -> None:
        self.to.write(data)
        self.to.close()

    def reply(self) -> str:
        """The next line that is a reply."""
        while line := self.said.readline():
            if line.startswith(b"# "):
                return line.decode().strip()
        return ""

    def end(self, last: bytes = b"") -> tuple[int, dict[str, Any], bytes]:
        """No more from us: its status, what the real program saw, and the build's log."""
        sender = threading.Thread(target=self._send_last, args=(last,))
        sender.start()
        said = self.said.read().decode()
        sender.join()
        status = self.process.wait(timeout=30)
        seen = [json.loads(line[5:]) for line in said.splitlines() if line.startswith("SEEN ")]
        return status, seen[0] if seen else {}, self.log.read()


@contextmanager
def hook(world: World, *arguments: str, **env: str) -> Iterator[Asked]:
    """Start a hook as a build daemon does: stdin and stdout+stderr are pipes, descriptor 4 takes the build's log."""
    from_log, to_log = os.pipe()
    put_there = f"import os, sys; os.dup2({to_log}, 4); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", put_there, "-m", "offload_cli", *arguments]
    process = subprocess.Popen(
        command,
        env={**world.env, "OFFLOAD_GUIX": str(world.root / "guix"), "OFFLOAD_NIX": str(world.root / "nix"), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[to_log],
        cwd="/",
    )
    os.close(to_log)
    with os.fdopen(from_log, "rb") as log:
        try:
            yield Asked(process, log)
        finally:
            process.kill()
            process.wait()


def guix_hook(world: World, configuration: Path, **env: str) -> Any:
    return hook(world, "guix-hook", *ARGUMENTS, GUIX_CONFIGURATION_DIRECTORY=str(configuration), **env)


def guix_request(name: str = "hello", *, system: str = "x86_64-linux", features: str = "", local: int = 1) -> bytes:
    return f"{local} {system} /gnu/store/{name}.drv {features}\n".encode()


def test_anything_else_becomes_guix(world: World) -> None:
    with hook(world, "guix-hook", "authenticate", "--help-me", "a b") as asked:
        assert asked.said.read() == b"guix authenticate --help-me a b\n"
        assert asked.process.wait() == 7


def test_accepted_build_is_done_by_guix_with_that_machine_alone(world: World, configuration: Path, tmp_path: Path) -> None:
    (configuration / "machines.scm").write_text('(list (build-machine (private-key "/theirs")))')
    with guix_hook(world, configuration, TMPDIR=str(tmp_path)) as asked:
        asked.tell(guix_request(features="kvm"))
        assert asked.reply() == "# accept"
        inputs = b"/gnu/store/input " * 20_000
        status, seen, log = asked.end(inputs + b"\n/gnu/store/output \n")
    assert status == 0
    assert seen["keys"] == ["/keys/tower"]
    assert seen["request"] == ["1", "x86_64-linux", "/gnu/store/hello.drv", "kvm"]
    assert (seen["inputs"], seen["outputs"], seen["more"]) == (inputs.decode() + "\n", "/gnu/store/output \n", "")
    assert seen["arguments"] == ARGUMENTS
    assert seen["acl"] == "(acl)"
    assert seen["folder"] != str(configuration)
    assert seen["mode"] == 0o700
    assert log == b"the build's log\n"
    assert not list(tmp_path.glob("offload-hook-*"))


def test_what_a_killed_hook_leaves_is_removed_by_the_next(world: World, configuration: Path, tmp_path: Path) -> None:
    with guix_hook(world, configuration, TMPDIR=str(tmp_path)) as killed:
        killed.tell(guix_request("one"))
        assert killed.reply() == "# accept"
        [left] = tmp_path.glob("offload-hook-*")
        [own] = tmp_path.glob("guix")
    assert left.exists()
    with guix_hook(world, configuration, TMPDIR=str(tmp_path)) as asked:
        reply = "# postpone"
        while reply == "# postpone":
            asked.tell(guix_request("two"))
            reply = asked.reply()
        assert not left.exists()
        assert (own / "acl").read_text() == "(acl)"
        assert asked.end(b"in \nout \n")[0] == 0
    assert not list(tmp_path.glob("offload-hook-*"))


def test_a_build_is_not_lost_when_there_is_no_room_for_its_configuration(world: World, configuration: Path) -> None:
    with guix_hook(world, configuration, TMPDIR="/proc/nothing") as asked:
        for _ in range(2):
            asked.tell(guix_request())
            assert asked.reply() == "# decline"
        assert asked.end()[0] == 0


def test_a_build_is_not_lost_when_what_was_made_for_it_cannot_be_removed(
    world: World, configuration: Path, tmp_path: Path
) -> None:
    with guix_hook(world, configuration, TMPDIR=str(tmp_path)) as asked:
        asked.tell(guix_request())
        assert asked.reply() == "# accept"
        [made] = tmp_path.glob("offload-hook-*")
        (made / "folder").mkdir()
        assert asked.end(b"in \nout \n")[0] == 0


def test_without_the_real_program_builds_are_declined(world: World, configuration: Path, tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    with guix_hook(world, configuration, OFFLOAD_GUIX=nothing) as asked:
        asked.tell(guix_request())
        assert asked.reply() == "# decline"
    with hook(world, "nix-hook", "3", OFFLOAD_NIX=nothing) as asked:
        asked.tell(nix_settings() + nix_request())
        assert asked.reply() == "# decline"


@pytest.mark.parametrize("status", [1, 100, 101])
def test_status_is_guixs(world: World, configuration: Path, status: int) -> None:
    with guix_hook(world, configuration, STATUS=str(status)) as asked:
        asked.tell(guix_request())
        assert asked.reply() == "# accept"
        assert asked.end(b"in \nout \n")[0] == status


def test_copied_key_is_named(world: World, configuration: Path) -> None:
    copy = configuration / "offload/ssh/tower"
    copy.parent.mkdir(parents=True)
    copy.write_text("secret")
    with guix_hook(world, configuration) as asked:
        asked.tell(guix_request())
        assert asked.reply() == "# accept"
        assert asked.end(b"in \nout \n")[1]["keys"] == [str(copy)]


def test_lease_ends_with_the_build(world: World, configuration: Path) -> None:
    """One slot: the second waits until the first has done, in the same process."""
    with guix_hook(world, configuration) as first, guix_hook(world, configuration) as second:
        first.tell(guix_request("one"))
        assert first.reply() == "# accept"
        for _ in range(2):
            second.tell(guix_request("two", local=0))
            assert second.reply() == "# postpone"
        assert first.end(b"in \nout \n")[0] == 0
        reply = "# postpone"
        while reply == "# postpone":  # the daemon sees the closed connection a moment later
            second.tell(guix_request("two", local=0))
            reply = second.reply()
        assert reply == "# accept"


def test_lease_ends_with_a_killed_hook(world: World, configuration: Path) -> None:
    with guix_hook(world, configuration) as first:
        first.tell(guix_request())
        assert first.reply() == "# accept"
        first.process.kill()
    with guix_hook(world, configuration) as second:
        reply = "# postpone"
        while reply == "# postpone":
            second.tell(guix_request())
            reply = second.reply()
        assert reply == "# accept"


def test_a_loaded_machine_postpones_and_is_asked_again(world: World, configuration: Path) -> None:
    with guix_hook(world, configuration) as asked:
        for name, reply in [("load", "# postpone"), ("load", "# postpone"), ("hello", "# accept")]:
            asked.tell(guix_request(name))
            assert asked.reply() == reply


def test_what_no_machine_of_ours_builds_is_the_users(world: World, configuration: Path) -> None:
    """First without machines of his own, then with one: the same real program answers several requests."""
    foreign = guix_request(system="aarch64-linux")
    with guix_hook(world, configuration) as asked:
        for request in (foreign, guix_request(features="big-parallel"), b"nonsense\n", b"\xff\xfe\n"):
            asked.tell(request)
            assert asked.reply() == "# decline"
        assert asked.end()[0] == 0
    (configuration / "machines.scm").write_text('(list (build-machine (private-key "/theirs")))')
    with guix_hook(world, configuration) as asked:
        asked.tell(b"nonsense\n")
        assert asked.reply() == "# decline"
        asked.tell(foreign)
        assert asked.reply() == "# accept"
        status, seen, log = asked.end(b"in \nout \n")
    assert (status, seen["keys"], seen["folder"], log) == (0, ["/theirs"], str(configuration), b"the build's log\n")


@pytest.mark.parametrize("machines", [True, False])
def test_without_a_daemon_it_is_plain_guix(world: World, configuration: Path, machines: bool) -> None:
    if machines:
        (configuration / "machines.scm").write_text('(list (build-machine (private-key "/theirs")))')
    with guix_hook(world, configuration, OFFLOAD_SOCKET=str(configuration / "nobody")) as asked:
        asked.tell(guix_request())
        assert asked.reply() == ("# accept" if machines else "# decline")
        assert not world.env.get("OFFLOAD_SOCKET")


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str) -> bytes:
    data = text.encode()
    return number(len(data)) + data + bytes(-len(data) % 8)


def strings(texts: list[str]) -> bytes:
    return number(len(texts)) + b"".join(map(string, texts))


def nix_settings(**settings: str) -> bytes:
    default = {"builders": "", "system": "x86_64-linux", "max-jobs": "1", "system-features": "kvm", "note": "ä"}
    pairs = {**default, **settings}.items()
    return b"".join(number(1) + string(name) + string(value) for name, value in pairs) + number(0)


def nix_request(system: str = "x86_64-linux", *features: str, willing: int = 1) -> bytes:
    return string("try") + number(willing) + string(system) + string("/nix/store/hello.drv") + strings(list(features))


def test_nix_accepted_build_is_done_by_nix_with_our_line(world: World) -> None:
    with hook(world, "nix-hook", "3", STATUS="5") as asked:
        asked.tell(nix_settings() + nix_request("x86_64-linux", "kvm"))
        assert asked.reply() == "# accept"
        status, seen, log = asked.end(strings(["/nix/store/input"] * 10_000) + strings(["out"]))
    assert status == 5
    assert seen["arguments"] == ["__build-remote", "3"]
    builders = seen["settings"]["builders"].split()
    assert builders[:3] == ["ssh-ng://offload@127.0.0.1", "x86_64-linux", "/keys/tower"]
    assert seen["ssh_config"].startswith("Host 127.0.0.1\n  Port 9\nHost *\nInclude ~/.ssh/config\n")
    assert seen["settings"]["note"] == "ä"
    assert seen["request"] == [1, "x86_64-linux", "/nix/store/hello.drv", ["kvm"]]
    assert (len(seen["inputs"]), seen["outputs"]) == (10_000, ["out"])
    assert log == b"the build's log\n"


def test_nix_is_asked_again_after_its_own_no_for_ever(world: World) -> None:
    """`nix __build-remote` without machines says decline-permanently, which would keep ours from the next build."""
    with hook(world, "nix-hook", "3") as asked:
        asked.tell(nix_settings())
        for _ in range(2):
            asked.tell(nix_request("aarch64-linux"))
            assert asked.reply() == "# decline"
        asked.tell(nix_request())
        assert asked.reply() == "# accept"


def test_nix_builds_here_when_all_slots_are_taken_and_it_can(world: World) -> None:
    with hook(world, "nix-hook", "3") as first, hook(world, "nix-hook", "3") as second:
        first.tell(nix_settings() + nix_request())
        assert first.reply() == "# accept"
        second.tell(nix_settings() + nix_request(willing=0))
        assert second.reply() == "# postpone"
        second.tell(nix_request(willing=1))
        assert second.reply() == "# decline"


def test_nix_without_a_daemon_is_plain_nix(world: World, tmp_path: Path) -> None:
    nobody = str(tmp_path / "nobody")
    with hook(world, "nix-hook", "3", OFFLOAD_SOCKET=nobody) as asked:
        asked.tell(nix_settings() + nix_request())
        assert asked.reply() == "# decline-permanently"
    with hook(world, "nix-hook", "3", OFFLOAD_SOCKET=nobody) as asked:
        asked.tell(nix_settings(builders="ssh://theirs x86_64-linux") + nix_request())
        assert asked.reply() == "# accept"
        seen = asked.end(strings([]) + strings(["out"]))[1]
    assert seen["settings"]["builders"] == "ssh://theirs x86_64-linux"
    assert seen["ssh_config"] == "Host *\nInclude ~/.ssh/config\nInclude /etc/ssh/ssh_config\n"


def test_nix_with_its_own_machines_may_be_asked_before_ours(world: World) -> None:
    """The real program that has them answers again and again; another one gets ours."""
    with hook(world, "nix-hook", "3", NIX_SSHOPTS="-p 7 -F /theirs") as asked:
        asked.tell(nix_settings(builders="ssh://theirs x86_64-linux"))
        for _ in range(2):
            asked.tell(nix_request("aarch64-linux"))
            assert asked.reply() == "# decline"
        asked.tell(nix_request())
        assert asked.reply() == "# accept"
        seen = asked.end(strings([]) + strings(["out"]))[1]
    assert seen["settings"]["builders"].startswith("ssh-ng://offload@127.0.0.1 ")
    assert seen["ssh_options"][:-1] == ["-p", "7", "-F", "/theirs", "-F"]
    assert seen["ssh_config"].endswith("Host *\nInclude /theirs\n")


def test_a_real_program_that_is_not_needed_is_gone(world: World, tmp_path: Path) -> None:
    program = tmp_path / "nix"
    program.write_text(f"#!/bin/sh\necho $$ >>{tmp_path}/pids\nexec sleep 600\n")
    program.chmod(0o755)
    with hook(world, "nix-hook", "3", OFFLOAD_NIX=str(program)) as first, hook(world, "nix-hook", "3") as second:
        second.tell(nix_settings() + nix_request())
        assert second.reply() == "# accept"
        first.tell(nix_settings() + nix_request(willing=0))
        assert first.reply() == "# postpone"
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().endswith("\n"):
            time.sleep(0.02)  # pytest has a time limit
        assert first.end() == (0, {}, b"")
    (started,) = (tmp_path / "pids").read_text().split()
    assert not Path("/proc", started).exists()


def test_nix_that_sends_nonsense_is_told(world: World) -> None:
    with hook(world, "nix-hook", "3") as asked:
        asked.tell(number(1) + b"\xff" * 64)
        asked.to.close()
        said = asked.said.read()
    assert said.endswith(b"# decline-permanently\n")
    assert b"Traceback" not in said


def test_both_are_commands_with_help(world: World) -> None:
    assert {"guix-hook", "nix-hook"} <= set(world.run("--help").stdout.split())
    assert "GUIX" in world.run("guix-hook", "--help").stdout
    assert "build-hook" in world.run("nix-hook", "--help").stdout


def test_hooks_load_little() -> None:
    """Each request of a build daemon waits for their start."""
    heavy = {"dataclasses", "pathlib", "subprocess", "typing", "typer"}
    loaded = "import offload_cli.entry, offloadd.hook.guix, offloadd.hook.nix"
    code = f"import sys; sys.path[:0] = sys.argv[1:]; {loaded}; print({heavy} & {{*sys.modules}})"
    roots = [str(REPOSITORY), str(REPOSITORY / "cli")]
    # Without site: the .pth files of an installation load what they like.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, *roots], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
