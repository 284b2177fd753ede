"""The whole way of a childhurd: boot, secrets, SSH, a build, its end.

The guest is a stand-in (`hurd_standin`), and beside it the real disk that OFFLOAD_HURD_IMAGE names, where it names one:
`guix system image -t hurd-qcow2`'s as it is, Debian's with OFFLOAD_HURD_CUSTOMIZE=hurd-debian.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from offloadd.daemon.workshop import open_workshop
from offloadd.guest.secret_service import receive_hello
from offloadd.model.state import MachineState
from offloadd.paths import Paths
from offloadd.plan.machine import plan_for_build
from offloadd.vm.instance import open_instance
from offloadd.vm.outcome import Outcome
from tests.conftest import REPOSITORY, World
from tests.ports import own_childhurd_ports
from tests.vm.boot_disk import run
from tests.vm.greeting import write_greeting
from tests.vm.hurd_standin import PARTITION, open_standin
from tests.vm.rfb import press_ctrl_alt_del

IMAGE = os.environ.get("OFFLOAD_HURD_IMAGE", "")
CUSTOMIZE = os.environ.get("OFFLOAD_HURD_CUSTOMIZE", "")
NAME = "childhurd7"
BUILD = ("build", "-s", "i586-gnu")
LIMIT_S = 300.0


@dataclass(frozen=True)
class Hurd:
    """A world with the image `test-hurd`, and the machine childhurd7 that boots from it."""

    world: World
    kernel: str
    """What `uname` says there."""
    has_compiler: bool

    def declare(self, name: str, number: int | None, text: str = "", *, image: str = "test-hurd") -> None:
        features = "debian, gcc, libc6-dev, make" if self.has_compiler else "guix"
        fields = f"kind: childhurd\nimage: {image}\nmemory-size: 512\nfeatures: [{features}]\n{text}"
        path = self.world.root / "config/offload/machines" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fields + (f"id: {number}\n" if number else ""))

    def declare_image(self, name: str, text: str) -> None:
        path = self.world.root / "config/offload/images" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"kind: file\n{text}")

    def exec(self, command: str, name: str = NAME) -> str:
        return self.world.run("vm", "exec", name, "--", "sh", "-c", command).stdout

    def skip_unless(self, able: bool, what: str) -> None:
        """The stand-in is able to do all of it; the image that somebody brought may not be."""
        if not able:
            pytest.skip(f"OFFLOAD_HURD_IMAGE {what}")

    def copy_disk(self, name: str) -> Path:
        """A copy of the disk as machines boot from it, which a test may change."""
        kept = self.world.json("image", "build", "test-hurd")
        [disk] = [file for file in Path(kept["directory"]).iterdir() if file.name.startswith("disk")]
        copy = self.world.root / name
        run("cp", "--reflink=auto", "--sparse=always", disk, copy)
        return copy


@pytest.fixture(scope="module", params=["standin", *(["image"] if IMAGE else [])])
def hurd(make_world: Callable[[], World], request: pytest.FixtureRequest) -> Iterator[Hurd]:
    world = make_world()
    standin = request.param == "standin"
    with open_standin() as disk:
        made = Hurd(world, "Linux" if standin else "GNU", standin or bool(CUSTOMIZE))
        customize = "hurd-debian" if standin else CUSTOMIZE
        path = disk if standin else Path(IMAGE).absolute()
        made.declare_image("test-hurd", f"path: {path}\n" + (f"customize: {customize}\n" if customize else ""))
        made.declare(NAME, 7)
        yield made
    world.run("vm", "stop", NAME, status=None)
    world.assert_nothing_left()
    for image in ("test-hurd", "test-impostor"):
        world.run("image", "rm", image, status=None)


@pytest.fixture(scope="module")
def started(hurd: Hurd, left_alone: Future[Outcome]) -> Hurd:
    hurd.world.run("vm", "start", NAME, limit_s=LIMIT_S)
    return hurd


@pytest.fixture(scope="module")
def left_alone(hurd: Hurd) -> Iterator[Future[Outcome]]:
    """How a guest ends to whose secret service nobody sends anything.  It waits for a minute, beside the other tests."""
    # Directly below /tmp: a socket's path holds 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="offload-", dir="/tmp"))
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(trio.run, leave_alone, hurd, root)
    shutil.rmtree(root)


async def leave_alone(hurd: Hurd, root: Path) -> Outcome:
    world = hurd.world
    paths = Paths(config=world.root / "config/offload", state=root / "s", cache=world.cache / "offload", runtime=root / "r")
    with trio.fail_after(LIMIT_S):
        async with open_workshop(paths, paths.database) as shop:
            library = shop.library()
            plan = await shop.plan(library.vm(NAME), library, lambda *_: None)
            plan = plan_for_build(plan, "alone", date=None, cpu=None, pinned_cpu=True)
            opened = open_instance(
                plan, instances=paths.instances, logs=root / "l", bridge=shop.bridge, cores=[0], purpose="build"
            )
            async with opened as instance:
                while not await hears(instance.port(1004)):
                    await trio.sleep(0.5)
                return await instance.wait_ended()


def in_order(text: str, *phrases: str) -> bool:
    places = [text.find(phrase) for phrase in phrases]
    return -1 not in places and places == sorted(places)


def test_builds_from_a_cold_start(hurd: Hurd, tmp_path: Path) -> None:
    world = hurd.world
    project = REPOSITORY / "examples/hello"
    if not hurd.has_compiler:
        project = world.recipe("words", "steps: [mkdir dist, uname -s >dist/hello]\noutputs: [dist/*]\n")
    assert not world.daemons()

    done = world.run(*BUILD, "-o", tmp_path / "out", project, limit_s=LIMIT_S)

    said, secrets = done.stderr, "==> waiting for its secret service"
    assert in_order(said, f"==> booting {NAME}", secrets, "==> sending its secrets", "==> waiting for sshd", "==> building"), (
        said
    )
    assert in_order(said, "==> building", "==> [1/2]", "==> [2/2]", "==> collecting the outputs"), said
    assert (tmp_path / "out/dist/hello").stat().st_size
    record = json.loads((tmp_path / "out/build.json").read_text())
    assert (record["machine"], record["kind"], record["system"]) == (NAME, "childhurd", "i586-gnu")
    assert (record["state"], record["guest"], record["own_vm"], record["cpu"]) == ("succeeded", "boot", True, "qemu64")
    passed_over = record["route"]["passed_over"]
    assert passed_over["binfmt"] == "GNU/Hurd is another kernel: qemu-user runs only Linux programs"
    assert passed_over["childhurd"] == "its image hurd-guix is not set up"
    if hurd.has_compiler:
        assert "./dist/hello\nhello, " in done.stdout
        assert os.access(tmp_path / "out/dist/hello", os.X_OK)
    world.assert_nothing_left()


def test_runs_with_the_secrets_of_its_machine(started: Hurd) -> None:
    assert started.exec("uname -s") == f"{started.kernel}\n"
    assert started.exec("id -un") == "offloading\n"
    shown = started.world.json("vm", "show", NAME)
    assert shown["instance"]["ports"] == {"22": 17022, "1004": 18004, "5900": 22900}
    root = Path(shown["secret_root"])
    name = "etc/ssh/ssh_host_ed25519_key.pub"
    assert started.exec(f"cat /{name}") == (root / name).read_text()
    assert abs(int(started.exec("date +%s")) - time.time()) < 60


def test_only_the_account_for_builds_can_log_in(started: Hurd) -> None:
    shown = started.world.json("vm", "show", NAME)
    options = ("-F", "none", "-i", shown["client_key"], "-p", "17022", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no")
    known = ("-o", f"UserKnownHostsFile={started.world.root}/known", "-o", "IdentitiesOnly=yes")
    as_root = ["ssh", *options, *known, "root@127.0.0.1", "id -un"]
    tried = subprocess.run(as_root, input="$(id -un)\n", capture_output=True, text=True, timeout=60, check=False)
    assert tried.returncode != 0
    assert "root\n" not in tried.stdout, "its key starts one program, which is no shell"
    no_key = ("-o", "PubkeyAuthentication=no")
    without_key = ["ssh", "-F", "none", *options[4:], *known[:2], *no_key, "offloading@127.0.0.1", "true"]
    refused = subprocess.run(without_key, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert "Permission denied (publickey)" in refused.stderr


def test_a_guest_with_another_host_key_is_refused(started: Hurd) -> None:
    """The one that was sent is the only one: here it is another one that the host expects."""
    public = Path(started.world.json("vm", "show", NAME)["secret_root"]) / "etc/ssh/ssh_host_ed25519_key.pub"
    ecdsa = public.with_name("ssh_host_ecdsa_key.pub")
    before = {path: path.read_text() for path in (public, ecdsa)}
    other = started.world.root / "other"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other)
    try:
        for path in before:
            path.chmod(0o644)
            path.write_text(other.with_suffix(".pub").read_text())
        said = started.world.run("vm", "exec", NAME, "--", "true", status=None)
        assert said.returncode != 0
        assert "host key" in said.stderr.lower()
    finally:
        for path, text in before.items():
            path.write_text(text)
    assert started.exec("echo back") == "back\n"


def test_its_load_and_its_clock_are_read_without_python(started: Hurd) -> None:
    deadline = time.monotonic() + 60
    row: dict[str, float | None] = {"load": None}
    while row["load"] is None:
        assert time.monotonic() < deadline
        [row] = [row for row in started.world.json("machine", "status") if row["name"] == NAME]
    assert row["off_s"] is not None
    assert abs(row["off_s"]) < 10
    assert started.world.json("vm", "show", NAME)["overload_threshold"] == 1.8


def test_its_screen_can_be_seen(started: Hurd, tmp_path: Path) -> None:
    picture = tmp_path / "screen.png"
    started.world.run("vm", "screenshot", NAME, "-o", picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"IEND" in content[-12:]
    path = started.world.run("vm", "vnc", NAME, "--print").stdout.strip()
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(30)
        viewer.connect(path)
        assert viewer.recv(12).startswith(b"RFB 003.")


def test_a_build_can_leave_the_machine_running(started: Hurd, tmp_path: Path) -> None:
    project = started.world.recipe("stays", "steps: [echo $HOME >words, touch /tmp/was-here]\noutputs: [words]\n")
    started.world.run(*BUILD, "--machine", NAME, "--keep-machine", "-o", tmp_path / "out", project, limit_s=LIMIT_S)
    assert (tmp_path / "out/words").read_text()
    assert started.exec("ls /tmp/was-here") == "/tmp/was-here\n"


def test_a_package_of_debian_s_says_what_is_missing_without_a_network(started: Hurd, tmp_path: Path) -> None:
    started.skip_unless(started.has_compiler, "is no Debian, as OFFLOAD_HURD_CUSTOMIZE would say")
    dsc = write_greeting(tmp_path)
    failed = started.world.run(*BUILD, "--machine", NAME, "--keep-machine", dsc, status=1, cwd=tmp_path, limit_s=LIMIT_S)
    assert "Unmet build dependencies: bc" in failed.stdout + failed.stderr


def test_what_it_wrote_is_gone_after_a_restart(started: Hurd) -> None:
    started.exec("echo written >$HOME/file && sync")
    started.world.run("vm", "stop", NAME)
    started.world.run("vm", "start", NAME, limit_s=LIMIT_S)
    assert started.exec("ls $HOME") == ""


def test_a_guest_that_reboots_is_started_again(started: Hurd) -> None:
    started.skip_unless(started.kernel == "Linux", "may not reboot at Ctrl-Alt-Del, as the stand-in does")
    before = started.world.json("vm", "show", NAME)["instance"]["pid"]
    press_ctrl_alt_del(Path(started.world.run("vm", "vnc", NAME, "--print").stdout.strip()))
    deadline = time.monotonic() + LIMIT_S
    while True:
        shown = started.world.json("vm", "show", NAME)
        if shown["state"] == "running" and shown["instance"] and shown["instance"]["pid"] != before:
            break
        assert time.monotonic() < deadline, shown
        assert shown["state"] != "crashed", shown
        time.sleep(0.2)
    assert started.exec("echo again") == "again\n"
    started.world.run("vm", "stop", NAME)


@contextmanager
def running(hurd: Hurd, *names: str) -> Iterator[None]:
    """Start machines side by side; at the end they are stopped."""
    try:
        starting = [hurd.world.start("vm", "start", name) for name in names]
        for process in starting:
            _, err = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, err
        yield
    finally:
        for name in names:
            hurd.world.run("vm", "stop", name, status=None)


def test_two_run_side_by_side_on_the_ports_of_their_ids(hurd: Hurd) -> None:
    hurd.declare("childhurd", None)
    hurd.declare("childhurd1", 1)
    with own_childhurd_ports(), running(hurd, "hurd-vm", "childhurd1"):
        for name, step in (("childhurd", 0), ("childhurd1", 1000)):
            ports = hurd.world.json("vm", "show", name)["instance"]["ports"]
            assert ports == {"22": 10022 + step, "1004": 11004 + step, "5900": 15900 + step}
            with socket.create_connection(("127.0.0.1", 10022 + step), timeout=30) as connection:
                assert connection.recv(4) == b"SSH-"
        keys = {hurd.exec("cat /etc/ssh/ssh_host_ed25519_key.pub", name) for name in ("childhurd", "hurd-vm1")}
        assert len(keys) == 2
    for name in ("childhurd", "childhurd1"):
        (hurd.world.root / f"config/offload/machines/{name}.yaml").unlink()


def test_a_guest_that_gets_no_secrets_reboots(left_alone: Future[Outcome]) -> None:
    """Its own secret service does that, as Guix's: whoever connects here only listens."""
    outcome = left_alone.result(timeout=LIMIT_S)
    assert (outcome.rebooted, outcome.state) == (True, MachineState.STOPPED_BY_GUEST)


async def hears(port: int) -> bool:
    """Whether a secret service says hello; it is left without an answer."""
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            with trio.move_on_after(5):
                return await receive_hello(stream)
    except (OSError, trio.BrokenResourceError):
        pass
    return False


def test_without_snapshot_what_it_writes_stays(hurd: Hurd, tmp_path: Path) -> None:
    disk = hurd.copy_disk("own.disk")
    kind = "qcow2" if disk.read_bytes()[:4] == b"QFI\xfb" else "raw"
    hurd.declare_image("own", f"path: {disk}\nformat: {kind}\n")
    for number in (8, 9):
        hurd.declare(f"childhurd{number}", number, "options: []\n", image="own")
    with running(hurd, "childhurd8"):
        file = hurd.exec("echo written >$HOME/file && echo $HOME/file", "childhurd8").strip()
        second = hurd.world.run("vm", "start", "childhurd9", status=None)
        assert second.returncode != 0
        assert "belongs to another machine that runs" in " ".join(second.stderr.split())
    # Its builds are done in the machine itself, which is started for them.
    project = hurd.world.recipe("inside", f"steps: [cp {file} file]\noutputs: [file]\n")
    hurd.world.run(*BUILD, "--machine", "childhurd8", "-o", tmp_path / "out", project, limit_s=LIMIT_S)
    assert (tmp_path / "out/file").read_text() == "written\n"
    assert hurd.exec(f"cat {file}", "childhurd8") == "written\n"
    # It has written to its disk meanwhile, which makes it no other machine.
    hurd.exec("sync", "childhurd8")
    second = hurd.world.run(*BUILD, "--machine", "childhurd8", "-o", tmp_path / "again", project, limit_s=LIMIT_S)
    assert "building in childhurd8, which goes on running" in second.stderr
    assert (tmp_path / "again/file").read_text() == "written\n"
    tried = hurd.world.json("machine", "test", "childhurd8", status=None)
    assert "keeps its disk" in tried["checks"][0]["text"]
    hurd.world.run("vm", "stop", "childhurd8")


def test_a_package_of_debian_s_is_built_with_what_its_own_apt_installs(hurd: Hurd, tmp_path: Path) -> None:
    hurd.skip_unless(hurd.has_compiler, "is no Debian, as OFFLOAD_HURD_CUSTOMIZE would say")
    hurd.declare("childhurd5", 5, "network: true\n")
    dsc = write_greeting(tmp_path)
    options = ("--machine", "childhurd5", "-o", tmp_path / "out")
    done = hurd.world.run(*BUILD, *options, dsc, limit_s=LIMIT_S)
    assert "Setting up bc" in done.stdout
    [package] = (tmp_path / "out").glob("greeting_1.0_*.deb")
    listing = run("dpkg-deb", "--contents", package)
    assert "./usr/share/greeting/answer" in listing


def test_an_impostor_is_no_machine_of_ours(hurd: Hurd) -> None:
    """It takes the secrets, and its sshd shows another host key."""
    hurd.skip_unless(hurd.kernel == "Linux", "cannot be changed as the stand-in, whose file system's place is known")
    disk = hurd.copy_disk("impostor.disk")
    settings, key = hurd.world.root / "settings", hurd.world.root / "key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    system = f"{disk}?offset={PARTITION}"
    path = "/etc/ssh/sshd_config.d/offload.conf"
    own = (REPOSITORY / "images/guest/hurd/sshd_config").read_text()
    kept = [line for line in own.splitlines() if not line.startswith("HostKey ")]
    settings.write_text("\n".join(["HostKey /etc/ssh/other", *kept, ""]))
    commands = hurd.world.root / "commands"
    mode = "set_inode_field /etc/ssh/other mode 0100600"
    commands.write_text("\n".join([f"rm {path}", f"write {settings} {path}", f"write {key} /etc/ssh/other", mode, ""]))
    run("/sbin/debugfs", "-w", "-f", commands, system)
    hurd.declare_image("test-impostor", f"path: {disk}\nformat: raw\n")
    hurd.declare("childhurd6", 6, image="test-impostor")
    refused = hurd.world.run("vm", "start", "childhurd6", status=None, limit_s=LIMIT_S)
    assert refused.returncode != 0
    assert "host key" in refused.stderr.lower()
    assert hurd.world.json("vm", "show", "childhurd6")["state"] != "running"
