"""The build service in the three ways in which it runs on a host: as root for a spare user, as root of a user namespace with
subordinate ids, and as a user who has none.  The same build finds the same everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from offloadd.environment.recipe import environment_recipe
from offloadd.environment.store import EnvironmentStore

from .test_build_service import EMPTY, Session, exits, mark, processes_named, serve, tar_of, unpack, wait_until_gone
from .test_local_service import CACHE

NOBODY = 65534
SPARE = 61300

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="to become other users, the tests must be root")


@dataclass(frozen=True)
class Way:
    """How the service is started."""

    name: str
    wrapper: tuple[str, ...]
    options: tuple[str, ...]
    state: Path
    environment: str | None

    @property
    def host_user(self) -> int | None:
        """Whom a build is on the host; None: a subordinate of somebody."""
        return {"spare": SPARE, "mapped": 300_000 + 999, "alone": NOBODY}[self.name]


def as_nobody(ids: Path) -> tuple[str, ...]:
    """Words before a command that run it as a user with subordinate ids; this host's own files stay as they are."""
    ids.write_text("nobody:300000:65536\n")
    script = f'mount --bind {ids} /etc/subuid && mount --bind {ids} /etc/subgid && exec "$@"'
    user = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    return ("unshare", "--mount", "sh", "-c", script, "sh", *user)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    for path in (folder, *folder.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    return folder


@pytest.fixture(scope="module", params=["spare", "mapped", "alone"])
def way(request: pytest.FixtureRequest, places: Path) -> Iterator[Way]:
    name = request.param
    folder = places / name
    folder.mkdir()
    (folder / "state").mkdir(mode=0o700)
    wrapper: tuple[str, ...] = ()
    environment = None
    if name != "spare":
        for path in (folder, folder / "state"):
            os.chown(path, NOBODY, NOBODY)
        wrapper = as_nobody(places / "ids")
    if name == "mapped":
        if shutil.which("newuidmap") is None:
            pytest.skip("needs newuidmap")
        wrapper = (*wrapper, "unshare", "--user", "--map-auto", "--map-root-user", "--")
        made = trio.run(EnvironmentStore(CACHE / "environments").ensure, environment_recipe("bookworm", "amd64"))
        shutil.copy(made.path, folder / "root.squashfs")
        environment = str(folder / "root")
        argv = ["unsquashfs", "-no-progress", "-quiet", "-dest", environment, str(folder / "root.squashfs")]
        subprocess.run([*wrapper, *argv], check=True, stdout=subprocess.DEVNULL)
    options = ("--clock", "keep", *(("--user", str(SPARE)) if name == "spare" else ()))
    yield Way(name, wrapper, options, folder / "state", environment)
    shutil.rmtree(folder)


@pytest.fixture
def service(way: Way) -> Iterator[Session]:
    with serve(way.state, *way.options, wrapper=way.wrapper) as session:
        yield session


def test_a_build(way: Way, service: Session, tmp_path: Path) -> None:
    steps = ["id -u; id -g; pwd; touch /build/x /tmp/x /var/tmp/x && echo ok", "cat a > b; chmod 751 b; ln -s b link"]
    service.send_build(tar_of({"a": "hello"}), environment=way.environment, steps=steps, outputs=["b", "link"])
    service.read_all()
    assert exits(service) == [(0, 2)], service.log
    assert service.log.decode().split() == ["1000", "1000", "/build/hello-1", "ok"]
    out = unpack(service, tmp_path)
    assert (out / "b").read_text() == "hello"
    assert (out / "b").stat().st_mode & 0o777 == 0o751


def test_it_can_write_nowhere_else(way: Way, service: Session) -> None:
    places = "/ /etc /usr /usr/bin /var /root /proc/sys/kernel"
    step = f"for place in {places}; do touch $place/hostile 2>/dev/null && echo wrote to $place; done; true"
    service.send_build(EMPTY, environment=way.environment, steps=[step, "grep CapEff /proc/self/status"])
    service.read_all()
    assert service.log == b"CapEff:\t0000000000000000\n"


def owners_of_sleep(words: str) -> set[int]:
    owners = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            if command[0].endswith(b"sleep") and words.encode() in command:
                owners.add(path.stat().st_uid)
        except OSError:
            continue
    return owners


def test_the_host_sees_another_user(way: Way, service: Session) -> None:
    service.send_build(EMPTY, environment=way.environment, steps=[f"echo ready; sleep {mark(8000)}"])
    service.read_log(b"ready")
    deadline = time.monotonic() + 30
    while not (owners := owners_of_sleep(mark(8000))):
        assert time.monotonic() < deadline
    assert owners == {way.host_user}
    service.cancel()


def test_cancelled(way: Way, service: Session) -> None:
    step = (
        f"trap '' TERM HUP INT; (setsid sleep {mark(8100)} &); mkdir -p locked/in; touch locked/in/file; "
        f"chmod 000 locked/in locked; echo ready; while :; do sleep {mark(8101)}; done"
    )
    service.send_build(EMPTY, environment=way.environment, steps=[step])
    service.read_log(b"ready")
    assert str(way.state) not in Path("/proc/self/mountinfo").read_text()
    service.cancel()
    wait_until_gone(mark(8100))
    wait_until_gone(mark(8101))


def test_what_a_hostile_build_leaves_is_removed(way: Way, service: Session) -> None:
    steps = [
        f"(setsid sh -c 'trap \"\" TERM; sleep {mark(8200)}' &); mkfifo fifo",
        "mkdir -p a/b/c; touch a/b/c/d; chmod 000 a/b/c a/b a",
        "ln -s / root; ln -s /etc/shadow s; cp /bin/sh suid; chmod 6755 suid; rm -rf /etc /usr/bin/env /bin || true",
    ]
    service.send_build(EMPTY, environment=way.environment, steps=steps, outputs=["root/etc/passwd"])
    service.read_all()
    assert exits(service) == [(0, 3)]
    assert service.tar.strip(b"\0") == b""
    assert processes_named(mark(8200)) == []
    assert Path("/etc/passwd").exists()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the names of a PC")
def test_the_personality(way: Way, service: Session) -> None:
    service.send_build(EMPTY, environment=way.environment, steps=["uname -m"], personality="linux32")
    service.read_all()
    assert service.log == b"i686\n"


@pytest.mark.parametrize("network", [False, True])
def test_the_network(way: Way, service: Session, network: bool) -> None:
    step = "grep -c : /proc/net/dev; test -r /etc/resolv.conf && cat /etc/resolv.conf"
    service.send_build(EMPTY, environment=way.environment, steps=[step], network=network)
    service.read_all()
    count, _, resolver = service.log.decode().partition("\n")
    assert (int(count) == 1) != network or len(Path("/proc/net/dev").read_text().splitlines()) == 3
    if network and Path("/etc/resolv.conf").exists():
        assert resolver == Path("/etc/resolv.conf").read_text()


def test_a_resolver_behind_a_link(way: Way, places: Path) -> None:
    """As systemd-resolved has it: a link into /run, of which a build sees nothing else."""
    if way.name != "spare":
        pytest.skip("the host's files are exchanged for root alone")
    script = (
        "mount -t tmpfs none /run && mkdir -p /run/resolver && echo nameserver 192.0.2.1 > /run/resolver/file"
        " && touch /run/secret && cp -a /etc /run/etc && ln -sf /run/resolver/file /run/etc/resolv.conf"
        ' && mount --bind /run/etc /etc && exec "$@"'
    )
    with serve(way.state, *way.options, wrapper=("unshare", "--mount", "sh", "-c", script, "sh")) as service:
        service.send_build(EMPTY, steps=["cat /etc/resolv.conf; ls /run"], network=True)
        service.read_all()
        assert service.log == b"nameserver 192.0.2.1\nresolver\n"


def test_a_date_is_refused(way: Way, service: Session) -> None:
    service.send_build(EMPTY, date=1_577_836_800)
    service.read_all()
    assert service.error == "the clock of this host is not a build's to set"


def test_a_file_system_that_holds_no_overlay(way: Way, tmp_path: Path) -> None:
    """The state directory in an overlay, as in a container."""
    if way.name != "spare":
        pytest.skip("one way is enough")
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    overlay = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    script = f'mount -t overlay -o {overlay} none {tmp_path}/merged && mkdir -p {tmp_path}/merged/state && exec "$@"'
    with serve(tmp_path / "merged/state", wrapper=("unshare", "--mount", "sh", "-c", script, "sh")) as service:
        service.send_build(EMPTY, environment="/usr")
        service.read_to_last()
        assert service.error.startswith("cannot mount overlay on /tmp: ")
        assert service.error.endswith("the state directory's file system may not hold one (another overlay, NFS)")


@pytest.mark.parametrize("options", [["--user", "0"], ["--user", "x"], ["--clock", "stop"], ["--surprise", "1"], ["--user"]])
def test_wrong_options(options: list[str], places: Path) -> None:
    program = Path(__file__).parents[2] / "images/guest/build-service"
    done = subprocess.run([program, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: build-service ")
