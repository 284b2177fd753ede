"""What offload needs from this host: each thing with its state, what it is for, and the command that mends it.

Nothing is changed and nothing is started; what can be wrong is looked at in the same way as the daemon does.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import shutil
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import trio

from offloadd.binfmt.emulator import PACKAGE, find_emulated
from offloadd.binfmt.status import Status, find_usable, read_status
from offloadd.config.library import Library, load_library
from offloadd.daemon.host_memory import HostMemory, read_host_memory
from offloadd.daemon.keeping import ROOM, Want
from offloadd.debian import find_mirrors
from offloadd.errors import ConfigError, OffloadError
from offloadd.host import native_systems
from offloadd.image.store import ImageStore
from offloadd.model.image import FileImage, ImageRecipe
from offloadd.model.quantity import format_size
from offloadd.paths import Paths, find_paths
from offloadd.plan.argv import InstanceFiles
from offloadd.process import program_environment, read_program
from offloadd.template.store import TemplateStore
from offloadd.vm.accelerator import Verdict
from offloadd.vm.memory import open_memory, seal_memory
from offloadd.vm.qemu import find_qemu

LEAST_DISK = 10 << 30
"""Bytes: an image, some environments, and the disks of guests."""
LONGEST_SOCKET = 107
"""Bytes: sun_path has 108 (unix(7)), and its end takes one."""
_BUILD_INSTANCE = "build-01234567"
_LIMIT_S = 60.0


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """Works, but slower or with less."""
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    purpose: str = ""
    remedy: str = ""
    """A command, or what else is to be done; empty when there is nothing to mend."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that must be in PATH."""

    name: str
    package: str
    purpose: str
    without: State = State.MISSING


QEMU = "qemu-system-x86_64"
PROGRAMS = (
    Program(name="mmdebstrap", package="mmdebstrap", purpose="the root file systems of images and environments"),
    Program(name="mke2fs", package="e2fsprogs", purpose="an image's file system"),
    Program(name="qemu-img", package="qemu-utils", purpose="disks of others that are grown or changed", without=State.WARNING),
    Program(name="sqfstar", package="squashfs-tools", purpose="an environment's disk"),
    Program(name="arch-test", package="arch-test", purpose="environments of other architectures", without=State.WARNING),
    Program(name="zstd", package="zstd", purpose="disks of others that are compressed so", without=State.WARNING),
    Program(name="ssh", package="openssh-client", purpose="`offload vm ssh` and `exec`", without=State.WARNING),
)


def examine_host(paths: Paths | None = None) -> list[Requirement]:
    """Look at everything.  Starts an event loop: for the command line."""
    return trio.run(examine, paths or find_paths())


async def examine(paths: Paths) -> list[Requirement]:
    """Every requirement, in the order in which a person mends them."""
    rows = [check_python(), await check_qemu(), *(check_program(program) for program in PROGRAMS)]
    if os.geteuid() != 0:
        rows += [await check_namespaces(), check_program(NEWUIDMAP), check_subordinate_ids()]
    library, configuration = check_configuration(paths)
    rows += [
        configuration,
        await check_mirror(library),
        check_disk(paths.cache),
        check_memory(library),
        *check_warm(library, read_host_memory()),
        check_templates(paths.cache / "templates"),
        check_cores(library),
        check_binfmt(read_status(), find_emulated(native_systems()), native_systems()),
        check_kvm(paths.accelerator),
        check_sockets(paths, library),
        *(await check_images(paths, library)),
        check_daemon(paths.socket),
    ]
    return rows


def check_python() -> Requirement:
    return Requirement(name="python", state=State.OK, found=platform.python_version(), purpose="offload itself; 3.11 or newer")


async def check_qemu() -> Requirement:
    row = Requirement(name=QEMU, state=State.OK, found="", purpose="the virtual machines")
    try:
        binary = await find_qemu(QEMU)
    except OffloadError as exc:
        return replace(row, state=State.MISSING, found=exc.what, remedy=install("qemu-system-x86"))
    return replace(row, found=f"{binary.version}, {len(binary.cpu_models)} CPU models")


def install(package: str) -> str:
    """The command that installs a Debian package."""
    return f"{sudo()}apt-get install {package}"


def sudo() -> str:
    return "" if os.geteuid() == 0 else "sudo "


def check_program(program: Program) -> Requirement:
    found = shutil.which(program.name, path=program_environment()["PATH"])
    row = Requirement(name=program.name, state=State.OK, found=found or "not installed", purpose=program.purpose)
    return row if found else replace(row, state=program.without, remedy=install(program.package))


NEWUIDMAP = Program(name="newuidmap", package="uidmap", purpose="mmdebstrap without root: the owners of files")


async def check_namespaces() -> Requirement:
    row = Requirement(name="user namespaces", state=State.OK, found="can be made", purpose="mmdebstrap without root")
    try:
        await read_program(["unshare", "--user", "--map-root-user", "true"])
    except OffloadError as exc:
        remedy = _namespace_remedy(Path("/proc/sys"))
        return replace(row, state=State.MISSING, found=f"cannot be made: {exc.what}", remedy=remedy)
    return row


_NAMESPACE_SWITCHES = (
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ("user.max_user_namespaces", "0", "10000"),
)
"""Name, the value that forbids, a value that allows: Debian's own switch, AppArmor's (Ubuntu), the kernel's limit."""


def _namespace_remedy(sysctl: Path) -> str:
    for name, forbids, allows in _NAMESPACE_SWITCHES:
        file = sysctl / name.replace(".", "/")
        if file.exists() and file.read_text().strip() == forbids:
            return f"sudo sysctl --write {name}={allows}"
    return "inside a container: allow it to make user namespaces, or run offload as root"


def check_subordinate_ids(files: Iterable[Path] = (Path("/etc/subuid"), Path("/etc/subgid"))) -> Requirement:
    """subuid(5): lines NAME:FIRST:COUNT, where the name may be the user's number."""
    row = Requirement(name="subordinate ids", state=State.OK, found="", purpose="mmdebstrap without root: its users")
    name = _user()
    texts = [file.read_text() if file.exists() else "" for file in files]
    mine = [[line for line in text.splitlines() if line.split(":")[0] in (name, str(os.geteuid()))] for text in texts]
    if all(mine):
        return replace(row, found=mine[0][0])
    taken = [line.split(":") for text in texts for line in text.splitlines() if line.count(":") == 2]
    first = max([100_000, *(int(part[1]) + int(part[2]) for part in taken if part[1].isdigit() and part[2].isdigit())])
    ids = f"{first}-{first + 65535}"
    remedy = f"sudo usermod --add-subuids {ids} --add-subgids {ids} {name}"
    return replace(row, state=State.MISSING, found=f"none for {name}", remedy=remedy)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def check_configuration(paths: Paths) -> tuple[Library | None, Requirement]:
    """What is declared, None when something is wrong with it."""
    row = Requirement(name="configuration", state=State.OK, found="", purpose="machines and images")
    try:
        library = load_library(paths.library)
    except ConfigError as exc:
        found = "\n".join(map(str, exc.problems))
        return None, replace(row, state=State.MISSING, found=found, remedy=f"mend the files; yours are in {paths.config}")
    return library, replace(row, found=f"{_count(len(library.machines), 'machine')}, {_count(len(library.images), 'image')}")


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


async def check_mirror(library: Library | None) -> Requirement:
    row = Requirement(name="Debian mirror", state=State.OK, found="", purpose="the packages of images and environments")
    recipes = [image for image in library.images.values() if isinstance(image, ImageRecipe)] if library else []
    suites = sorted({recipe.suite for recipe in recipes if recipe.mirror is None})
    try:
        with trio.fail_after(_LIMIT_S):
            mirrors = [mirror for suite in suites for mirror in await find_mirrors(suite)]
    except OffloadError as exc:
        return replace(row, state=State.MISSING, found=exc.what, remedy=exc.hint or "set up apt's sources: man sources.list")
    except trio.TooSlowError:
        return replace(row, state=State.MISSING, found="apt does not answer", remedy=f"{sudo()}apt-get update")
    return replace(row, found=", ".join(dict.fromkeys(mirror.uri for mirror in mirrors)) or "named by the recipes")


def check_disk(cache: Path, least: int = LEAST_DISK) -> Requirement:
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    found = f"{format_size(free)} free in {existing}"
    row = Requirement(name="disk", state=State.OK, found=found, purpose="images, environments, templates")
    remedy = f"offload image gc; or set XDG_CACHE_HOME to a larger disk ({format_size(least)} is comfortable)"
    return row if free >= least else replace(row, state=State.WARNING, remedy=remedy)


def check_memory(library: Library | None, meminfo: Path = Path("/proc/meminfo")) -> Requirement:
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free_mib = int(lines["MemAvailable"].split()[0]) // 1024
    row = Requirement(name="memory", state=State.OK, found=f"{format_size(free_mib << 20)} available", purpose="the guests")
    large = [machine.name for machine in (library.vms.values() if library else ()) if machine.memory_size > free_mib]
    if not large:
        return row
    remedy = f"lower memory-size of {', '.join(large)}, or end other programs"
    return replace(row, state=State.WARNING, found=f"{row.found}, less than {', '.join(large)} has", remedy=remedy)


def check_warm(library: Library | None, memory: HostMemory) -> list[Requirement]:
    """Whether the clones that machines want to have waiting fit beside everything else; nothing when none does."""
    machines = [machine for machine in (library.vms.values() if library else ()) if machine.warm and machine.template]
    if not machines:
        return []
    wants = [
        Want(machine=machine.name, kind="warm", digest="", count=machine.warm, memory_mib=machine.memory_size, used=0.0)
        for machine in machines
    ]
    needed, room = sum(want.count * want.cost for want in wants), memory.available - memory.total // ROOM
    found = f"{_count(sum(want.count for want in wants), 'clone')} may need {format_size(needed)}"
    row = Requirement(name="waiting clones", state=State.OK, found=found, purpose="`warm` of machines: guests at once")
    if needed <= room:
        return [row]
    names = ", ".join(machine.name for machine in machines)
    found += f", and there is room for {format_size(max(room, 0))}: fewer will wait"
    return [replace(row, state=State.WARNING, found=found, remedy=f"lower `warm` of {names}, or end other programs")]


def check_templates(root: Path) -> Requirement:
    """Whether guests can be clones, and what is kept for that."""
    row = Requirement(
        name="templates", state=State.OK, found="", purpose="a fresh guest for each build in a fraction of a second"
    )
    try:
        memory = open_memory("offload-doctor", 1)
        try:
            seal_memory(memory)
        finally:
            os.close(memory)
    except OSError as exc:
        remedy = "allow memfd_create(2) with seals: a container may forbid it; until then each guest is booted"
        return replace(row, state=State.WARNING, found=f"sealed memory cannot be made: {exc.strerror}", remedy=remedy)
    found = TemplateStore(root).list()
    size = sum(template.size_on_disk() for template in found)
    return replace(row, found=f"{len(found)} made, {format_size(size)} (offload template list)" if found else "none made yet")


def check_cores(library: Library | None) -> Requirement:
    cores = len(os.sched_getaffinity(0))
    wanted = max((machine.cpu_count for machine in library.vms.values()), default=1) if library else 1
    shared = f"; {wanted} vCPUs share them" if wanted > cores else ""
    return Requirement(name="cores", state=State.OK, found=f"{cores}{shared}", purpose="the guests' CPUs are pinned to them")


def check_kvm(verdict: Path, device: Path = Path("/dev/kvm")) -> Requirement:
    """Without KVM everything works, several times slower."""
    row = Requirement(name="KVM", state=State.WARNING, found="", purpose="fast guests; without it TCG is used, which is slow")
    if not device.exists():
        remedy = "switch virtualization on in the firmware, or nested virtualization in the host of this VM"
        return replace(row, found=f"there is no {device}", remedy=remedy)
    if not os.access(device, os.R_OK | os.W_OK):
        remedy = f"sudo usermod --append --groups kvm {_user()}, and log in again"
        return replace(row, found=f"{device} may not be opened by {_user()}", remedy=remedy)
    kept = _read_verdict(verdict)
    if kept is None:
        return replace(row, state=State.OK, found=f"{device} exists; the first start of a machine tries it")
    if kept.accelerator == "kvm":
        return replace(row, state=State.OK, found=f"works: {kept.reason}")
    return replace(row, found=f"does not work, TCG is used: {kept.reason}")


def _read_verdict(file: Path) -> Verdict | None:
    """What the probe found; an earlier boot's verdict says nothing."""
    try:
        kept = Verdict(**json.loads(file.read_text()))
        return kept if kept.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip() else None
    except (OSError, ValueError, TypeError):
        return None


def check_binfmt(status: Status, installed: Sequence[str], native: Sequence[str]) -> Requirement:
    """Whether programs of other architectures run here.  Not needed for builds of this host's own, nor in VMs.

    Args:
        installed: the systems whose emulator is there.
        native: those that need none.
    """
    row = Requirement(name="binfmt", state=State.WARNING, found="", purpose="builds for other architectures without a VM")
    usable = find_usable(status, native)
    broken = [usable.missing[name] for name in usable.missing if status.find(name) is not None]
    found = ", ".join(usable.systems) or ("nothing is registered" if status.mounted else "binfmt_misc is not mounted")
    if broken:
        return replace(row, found="\n".join([found, *broken]), remedy=f"{sudo()}offload binfmt register --force")
    if usable.systems:
        return replace(row, state=State.OK, found=found)
    if not installed:
        return replace(row, found="no emulator is installed", remedy=install(PACKAGE))
    return replace(row, found=found, remedy=f"{sudo()}offload binfmt register")


def check_sockets(paths: Paths, library: Library | None) -> Requirement:
    """Whether every socket that we will make has a path that the kernel takes."""
    instances = [_BUILD_INSTANCE, *(library.vms if library else ())]
    files = [InstanceFiles(paths.instances / name) for name in instances]
    sockets = {path: "XDG_STATE_HOME" for file in files for path in (file.qmp, file.console)}
    sockets[paths.socket] = "XDG_RUNTIME_DIR"
    longest = max(sockets, key=lambda path: len(os.fsencode(path)))
    length = len(os.fsencode(longest))
    purpose = "the ways to QEMU and to the daemon"
    if length <= LONGEST_SOCKET:
        found = f"at most {length} of {LONGEST_SOCKET} bytes"
        return Requirement(name="socket paths", state=State.OK, found=found, purpose=purpose)
    found = f"{longest} has {length} bytes, {LONGEST_SOCKET} are allowed"
    remedy = f"set {sockets[longest]} to a shorter path"
    return Requirement(name="socket paths", state=State.MISSING, found=found, purpose=purpose, remedy=remedy)


def _image_purpose(library: Library, name: str) -> str:
    """GNU/Hurd's images say for which systems: nobody else builds for those."""
    systems = {machine.systems[0] for machine in library.vms.values() if machine.image == name and machine.kind == "childhurd"}
    return f"GNU/Hurd: builds for {', '.join(sorted(systems))}" if systems else "what machines boot from"


async def check_images(paths: Paths, library: Library | None) -> list[Requirement]:
    """The images that machines need; a machine's first start makes what is missing."""
    if library is None:
        return []
    store, rows = ImageStore(paths.cache / "images"), []
    for name in sorted({machine.image for machine in library.vms.values()}):
        row = Requirement(name=f"image {name}", state=State.OK, found="", purpose=_image_purpose(library, name))
        declared = library.image(name)
        if isinstance(declared, FileImage) and not declared.is_set_up:
            rows.append(replace(row, state=State.WARNING, found="not set up", remedy=f"offload image set {name} FILE-OR-URL"))
            continue
        try:
            digest = await store.digest(declared, library.folders[name])
            image = store.find(digest)
        except OffloadError as exc:
            remedy = "mend the files" if isinstance(exc, ConfigError) else f"offload image build --rebuild {name}"
            rows.append(replace(row, state=State.WARNING, found=exc.what, remedy=remedy))
            continue
        # Nobody needs the images of all architectures.
        missing = replace(row, found="not built yet: the first start of a machine makes it")
        rows.append(replace(row, found=f"{digest[:12]}, made {image.made}") if image else missing)
    return rows


def check_daemon(path: Path) -> Requirement:
    row = Requirement(name="daemon", state=State.OK, found="not running; it starts by itself", purpose="owns the machines")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return row
    return replace(row, found=f"running, {path}")
