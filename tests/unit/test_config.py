"""Files that are wrong: every problem at once, each with its line and field, and nothing but our own errors."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.config.document import Document, field_name, parse_document, read_document
from offloadd.config.library import load_library
from offloadd.config.load import check_document, parse_value
from offloadd.config.shelf import Shelf
from offloadd.config.text import MAX_BYTES
from offloadd.errors import ConfigError, NotFoundError, error_from_json
from offloadd.model.image import ImageRecipe
from offloadd.model.machine import BuildVm, EmulatedVm, SshMachine
from offloadd.model.recipe import BuildRecipe
from offloadd.paths import shipped

MACHINE = "kind: build-vm\nname: m\nimage: debian\n"
IMAGE = "kind: debian\nname: debian\nsuite: bookworm\nkernel: linux-image-cloud-amd64\nsize: 2G\n"
RECIPE = "name: r\nsteps: ['true']\n"


def problems(text: str, kind: type[BuildVm] | type[ImageRecipe] | type[BuildRecipe] = BuildVm) -> list[tuple[int, str, str]]:
    """(line, field, message) of each problem."""
    with pytest.raises(ConfigError) as caught:
        parse_value(text, "f.yaml", kind)
    return [(problem.line, problem.field, problem.message) for problem in caught.value.problems]


def test_defaults_are_those_of_the_manual() -> None:
    machine = parse_value(MACHINE, "f.yaml", BuildVm)
    assert machine.to_json() == {
        "kind": "build-vm",
        "name": "m",
        "image": "debian",
        "qemu": None,
        "cpu": None,
        "cpu-count": 4,
        "memory-size": 2048,
        "date": "2020-01-01T00:00:00Z",
        "port-forwardings": {"11022": 22},
        "systems": ["x86_64-linux"],
        "auto-start": False,
        "daemons": [],
        "idle-timeout": 600.0,
        "parallel-builds": 1,
        "secret-root": None,
        "template": True,
        "warm": 0,
        "network": False,
        "boot-timeout": 180.0,
        "options": [],
        "speed": 1.0,
        "overload-threshold": 0.8,
        "features": [],
    }


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("cpu_count: 4", "cpu_count", "did you mean cpu-count"),
        ("cpu-cuont: 4", "cpu-cuont", "did you mean cpu-count"),
        ("cpu-count: four", "cpu-count", "valid integer"),
        ("cpu-count: 0", "cpu-count", "greater than or equal to 1"),
        ("cpu-count: 256", "cpu-count", "less than or equal to 255"),
        ("cpu-count: 2.0", "cpu-count", "valid integer"),
        ("cpu-count: true", "cpu-count", "valid integer"),
        ("cpu-count: '4'", "cpu-count", "valid integer"),
        ("cpu-count: 0x4", "cpu-count", "valid integer"),
        ("cpu-count:", "cpu-count", "valid integer"),
        ("memory-size: 2G", "memory-size", "valid integer"),
        ("memory-size: 127", "memory-size", "greater than or equal to 128"),
        ("date: 1969-12-31", "date", "before 1970"),
        ("date: 2070-01-01", "date", "2069-12-31"),
        ("date: 2020-13-01", "date", "is not a date"),
        ("date: 2020", "date", "is not a date"),
        ("date: [2020]", "date", "is not a date"),
        ("date: true", "date", "is not a date"),
        ("date: 0001-01-01T00:00:00+14:00", "date", "is not a date"),
        ("date: '@99999999999999999999'", "date", "is not a date"),
        ("port-forwardings: {1004: 1004}", "port-forwardings", "port 22 must be forwarded"),
        ("port-forwardings: {1: 22, 2: 80, 3: 22}", "port-forwardings", "twice"),
        ("port-forwardings: {0: 22, 2: 80}", "port-forwardings[0]", "greater than or equal to 1"),
        ("port-forwardings: {1: 22, 2: 65536}", "port-forwardings[2]", "less than or equal to 65535"),
        ("port-forwardings: [11022]", "port-forwardings", "expected `key: value` lines"),
        ("port-forwardings: {a: 22}", "port-forwardings.a", "valid integer"),
        ("template: 1", "template", "valid boolean"),
        ("warm: -1", "warm", "greater than or equal to 0"),
        ("warm: 65", "warm", "less than or equal to 64"),
        ("warm: true", "warm", "valid integer"),
        ("systems: []", "systems", "must not be empty"),
        ("systems: x86_64-linux", "systems", "expected a list"),
        ("systems: [x86-64-linux]", "systems[0]", "did you mean x86_64-linux"),
        ("systems: [aarch64-linux]", "systems", "cannot be of type aarch64-linux"),
        ("auto-start: yes", "auto-start", "valid boolean"),
        ("auto-start: 1", "auto-start", "valid boolean"),
        ("parallel-builds: 0", "parallel-builds", "greater than or equal to 1"),
        ("secret-root: secrets", "secret-root", "absolute path"),
        ("network: 'true'", "network", "valid boolean"),
        ("boot-timeout: soon", "boot-timeout", "is not a duration"),
        ("boot-timeout: 0", "boot-timeout", "more than zero"),
        ("boot-timeout: .inf", "boot-timeout", "is not a duration"),
        ("boot-timeout: []", "boot-timeout", "is not a duration"),
        ("options: -snapshot", "options", "expected a list"),
        ("options: [5]", "options[0]", "write it in quotes"),
        ("cpu: [Nehalem]", "cpu", "valid string"),
        ("qemu: 7.2", "qemu", "write it in quotes: '7.2'"),
        ("12: 3", "[12]", "unknown key"),
        ("~: 3", "None", "unknown key"),
    ],
)
def test_each_wrong_field_of_a_machine(line: str, field: str, message: str) -> None:
    [(at, name, text)] = problems(MACHINE + "\n" + line + "\n")
    assert name == field
    assert message in text
    assert at == (5 if field not in ("[12]", "None") else 1)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (MACHINE.replace("build-vm", "vm"), "kind", "is not one of 'build-vm'"),
        (MACHINE.replace("name: m", "name: a/b"), "name", "does not have the form"),
        (MACHINE.replace("name: m", "name: ../m"), "name", "does not have the form"),
        (MACHINE.replace("name: m", "name: " + "m" * 65), "name", "does not have the form"),
        (MACHINE.replace("name: m", "name: 7"), "name", "valid string"),
        (MACHINE.replace("image: debian\n", ""), "image", "is missing"),
    ],
)
def test_the_fields_that_a_machine_must_have(text: str, field: str, message: str) -> None:
    [(_, name, found)] = problems(text)
    assert name == field
    assert message in found


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("files: [{path: etc/x, source: x}]", "files[0].path", "does not have the form"),
        ("files: [{path: /etc/../x, source: x}]", "files[0].path", "does not have the form"),
        ("files: [{path: /etc/x, source: x, mode: '4755'}]", "files[0].mode", "does not have the form"),
        ("files: [{path: /etc/x}]", "files[0].source", "is missing"),
        ("files: [x]", "files[0]", "expected `key: value` lines"),
        ("packages: [Vim]", "packages[0]", "does not have the form"),
        ("packages: ['a b']", "packages[0]", "does not have the form"),
        ("packages: [--foo]", "packages[0]", "does not have the form"),
        ("mirror: 1", "mirror", "write it in quotes"),
    ],
)
def test_wrong_fields_of_an_image(line: str, field: str, message: str) -> None:
    [(at, name, text)] = problems(IMAGE + line, ImageRecipe)
    assert (at, name) == (6, field)
    assert message in text


def test_a_mode_needs_no_quotes() -> None:
    recipe = parse_value(IMAGE + "files: [{path: /etc/x, source: x, mode: 0755}]", "f.yaml", ImageRecipe)
    assert recipe.files[0].mode == "0755"


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("version: 1.10", "version", "write it in quotes: '1.1'"),
        ("version: ../../etc", "version", "does not have the form"),
        ("outputs: [/etc/passwd]", "outputs", "leaves the build directory"),
        ("outputs: [a/../../b]", "outputs", "leaves the build directory"),
        ("outputs: ['']", "outputs", "leaves the build directory"),
        ("env: {A B: c}", "env.A B", "does not have the form"),
        ("env: {A: 1}", "env.A", "write it in quotes: '1'"),
        ("sources: [{sha256: " + "0" * 64 + "}]", "sources[0]", "one of url, pypi and debian"),
        ("sources: [{url: 'file:///etc/passwd', sha256: " + "a" * 64 + "}]", "sources[0]", "must begin with https://"),
        ("sources: [{pypi: holidays, sha256: " + "a" * 64 + "}]", "sources[0].pypi", "does not have the form"),
        ("sources: [{pypi: holidays==1, sha256: abc}]", "sources[0].sha256", "does not have the form"),
        ("systems: [i586-gun]", "systems[0]", "unknown system type"),
        ("timeout: -5", "timeout", "is not a duration"),
        ("max-silent-time: never", "max-silent-time", "is not a duration"),
        ("suite: Bookworm", "suite", "does not have the form"),
    ],
)
def test_wrong_fields_of_a_recipe(line: str, field: str, message: str) -> None:
    [(at, name, text)] = problems(RECIPE + line, BuildRecipe)
    assert (at, name) == (3, field)
    assert message in text


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = "kind: build-vm\nname: m\nimag: debian\ncpu-count: 0\n\ndate: never\nports:\n  1: 2\n"
    assert [(line, field) for line, field, _ in problems(text)] == [
        (1, "image"),
        (3, "imag"),
        (4, "cpu-count"),
        (6, "date"),
        (7, "ports"),
    ]


def test_the_text_of_a_problem_has_file_line_and_field() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value(MACHINE + "cpu-count: 0\n", "my/m.yaml", BuildVm)
    assert str(caught.value) == "my/m.yaml:4: cpu-count: input should be greater than or equal to 1, not 0"
    assert caught.value.exit_status == 3
    assert str(error_from_json(caught.value.to_json())) == str(caught.value)


def test_yaml_has_no_surprises() -> None:
    values = parse_document("a: no\nb: 22:22\nc: 010\nd: 2020-01-01\ne: on\nf: 1_000\ng: 7\nh: true\n", "f").values
    assert values == {"a": "no", "b": "22:22", "c": "010", "d": "2020-01-01", "e": "on", "f": "1_000", "g": 7, "h": True}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "stands twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 2\n", 3, "stands twice (first on line 2)"),
        ("a:\n- c: 1\n  c: 2\n", 3, "stands twice"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("a: [1\n", 2, "not valid YAML"),
        ("a: *b\n", 1, "not valid YAML"),
        ("- a\n", 1, "expected `key: value` lines"),
        ("", 1, "expected `key: value` lines"),
        ("just words", 1, "expected `key: value` lines"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("? [a]\n: 1\n", 1, "a key must be a word"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "not valid YAML"),
        ("a: !!int x\n", 0, "not valid YAML"),
        ("a: \x01\n", 0, "not valid YAML"),
        ("a: &x [*x]\n", 0, "nested too deeply"),
        ("a: " + "[" * 5000 + "]" * 5000, 0, "nested too deeply"),
    ],
)
def test_what_is_no_document(text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, "f.yaml")
    assert message in caught.value.problems[0].message
    assert caught.value.problems[0].line == line


def test_a_few_aliases_cannot_stand_for_billions_of_nodes() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="too large with its aliases followed"):
        parse_document("\n".join(lines), "f.yaml")


@given(st.text(max_size=200))
def test_any_text_is_a_document_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        parse_value(text, "f.yaml", BuildVm)


@given(
    st.dictionaries(
        st.sampled_from([field.alias or "" for field in BuildVm.model_fields.values()]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_values_are_a_machine_or_a_config_error(values: dict[str, object]) -> None:
    with suppress(ConfigError):
        check_document(Document(file="f.yaml", values=values, lines={}), BuildVm)


def test_the_line_of_a_field_is_that_of_the_nearest_around_it() -> None:
    document = parse_document("a: 1\nfiles:\n- path: /x\n  mode: y\n", "f")
    assert document.line(("files", 0, "mode")) == 4
    assert document.line(("files", 0, "source")) == 3
    assert document.line(("nothing",)) == 1
    assert field_name(("files", 0, "mode")) == "files[0].mode"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_document(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 3"):
        read_document(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        read_document(tmp_path / "large.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="directory"):
        read_document(tmp_path / "folder.yaml")
    # What a hostile source tree may hold in a recipe's place: neither waits for a writer nor fills the memory.
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    for name in ("fifo.yaml", "endless.yaml"):
        with pytest.raises(ConfigError, match="is not a regular file"):
            read_document(tmp_path / name)


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_is_shipped_is_right() -> None:
    library = load_library([shipped()])
    assert library.vm("build-vm").image == "debian"
    kinds = {machine.kind for machine in library.machines.values()}
    assert kinds == {"local", "binfmt", "build-vm", "emulated-vm", "childhurd"}, "an ssh host is always somebody's own"
    assert library.folders["debian"] == shipped() / "images"


def test_a_childhurd_is_a_hurd_vm_too(tmp_path: Path) -> None:
    write(tmp_path, "machines/childhurd1.yaml", "like: childhurd\nid: 1\n")
    library = load_library([shipped(), tmp_path])
    assert library.vm("hurd-vm") is library.vm("childhurd")
    assert library.vm("hurd-vm1") is library.vm("childhurd1")
    assert library.vm("hurd-vm1").port_forwardings == {12004: 1004, 11022: 22, 16900: 5900}
    for name in ("hurd-vm2", "hurd-vmx", "a-hurd-vm"):
        with pytest.raises(NotFoundError):
            library.vm(name)
    write(tmp_path, "machines/hurd-vm.yaml", "like: build-vm\n")
    assert load_library([shipped(), tmp_path]).vm("hurd-vm").kind == "build-vm"


def test_the_users_files_override_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", "images/debian.yaml", IMAGE)
    write(tmp_path / "a", "machines/m.yaml", MACHINE)
    write(tmp_path / "b", "machines/other-name.yaml", MACHINE + "cpu-count: 1\n")
    write(tmp_path / "b", "machines/.#m.yaml", "an editor's lock")
    write(tmp_path / "b", "machines/n.yaml", MACHINE.replace("name: m\n", ""))
    library = load_library([tmp_path / "a", tmp_path / "b", tmp_path / "nothing"])
    assert library.vm("m").cpu_count == 1
    assert library.machine("n").name == "n"
    with pytest.raises(NotFoundError) as caught:
        library.machine("mm")
    assert caught.value.hint == "did you mean m?"


def test_an_emulated_machine_is_of_one_kind_of_processor() -> None:
    text = "kind: emulated-vm\nname: m\nimage: debian\nsystems: [%s]\n"
    assert parse_value(text % "aarch64-linux, armhf-linux", "m.yaml", EmulatedVm).systems == ("aarch64-linux", "armhf-linux")
    for systems, wrong in (
        ("armhf-linux, aarch64-linux", "a machine of type armhf-linux does not run aarch64-linux"),
        ("aarch64-linux, s390x-linux", "a machine of type aarch64-linux does not run s390x-linux"),
        ("i586-gnu", "cannot be of type i586-gnu: only Linux"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            parse_value(text % systems, "m.yaml", EmulatedVm)


def test_a_file_that_is_like_another(tmp_path: Path) -> None:
    """The fields that it does not set are those of the other, of its own folder or of an earlier one."""
    files = "files: [{path: /a, source: a}]\n"
    write(tmp_path / "a", "images/debian.yaml", IMAGE + files)
    write(tmp_path / "a", "images/arm.yaml", "like: debian\narchitecture: arm64\n")
    write(tmp_path / "b", "images/arm-too.yaml", "like: arm\nsize: 3G\n")
    # The same name: the user's own with one thing changed.
    write(tmp_path / "b", "images/debian.yaml", "like: debian\nsuite: trixie\n")
    write(tmp_path / "b", "images/mine.yaml", "like: debian\nfiles: []\n")
    write(tmp_path / "a", "machines/m.yaml", MACHINE)
    write(tmp_path / "b", "machines/n.yaml", "like: m\ncpu-count: 1\n")
    library = load_library([tmp_path / "a", tmp_path / "b"])
    arm, arm_too = library.image("arm"), library.image("arm-too")
    assert isinstance(arm, ImageRecipe)
    assert isinstance(arm_too, ImageRecipe)
    assert (arm.name, arm.architecture, arm.suite, arm.size) == ("arm", "arm64", "bookworm", 2 << 30)
    assert (arm_too.name, arm_too.architecture, arm_too.size) == ("arm-too", "arm64", 3 << 30)
    debian = library.image("debian")
    assert isinstance(debian, ImageRecipe)
    assert (debian.suite, debian.size) == ("trixie", 2 << 30)
    # Sources are found where the file that names them is.
    assert library.folders == {
        "debian": tmp_path / "a/images",
        "arm": tmp_path / "a/images",
        "arm-too": tmp_path / "a/images",
        "mine": tmp_path / "b/images",
    }
    machine = library.vm("n")
    assert (machine.name, machine.image, machine.cpu_count) == ("n", "debian", 1)


def test_what_is_wrong_with_a_file_that_is_like_another(tmp_path: Path) -> None:
    write(tmp_path, "images/debian.yaml", IMAGE.replace("size: 2G", "size: small"))
    write(tmp_path, "images/a.yaml", "like: debian\nsuite: UPPER\n")
    write(tmp_path, "images/b.yaml", "# nothing\nlike: debain\n")
    write(tmp_path, "images/c.yaml", "like: d\n")
    write(tmp_path, "images/d.yaml", "like: c\n")
    write(tmp_path, "images/e.yaml", "like: [1]\n")
    with pytest.raises(ConfigError) as caught:
        load_library([tmp_path])
    found = [(Path(problem.file).name, problem.line, problem.field) for problem in caught.value.problems]
    # What is wrong in the one is not told again for the other, which has it from there.
    assert found == [
        ("a.yaml", 2, "suite"),
        ("b.yaml", 2, "like"),
        ("c.yaml", 1, "like"),
        ("d.yaml", 1, "like"),
        ("debian.yaml", 5, "size"),
        ("e.yaml", 1, "like"),
    ]
    assert "there is nothing called 'debain' to be like; did you mean debian?" in str(caught.value)
    assert "d.yaml:1: like: is like itself" in str(caught.value)


def test_a_library_tells_every_problem_of_every_file(tmp_path: Path) -> None:
    write(tmp_path, "images/debian.yaml", IMAGE)
    write(tmp_path, "machines/a.yaml", "kind: build-vm\nname: a\nimage: debain\n")
    write(tmp_path, "machines/b.yaml", MACHINE + "cpu-count: 0\nsize: 1\n")
    write(tmp_path, "machines/c.yaml", "- nothing\n")
    write(tmp_path, "machines/d.yaml", MACHINE)
    write(tmp_path, "machines/e.yaml", MACHINE)
    write(tmp_path, "machines/f.yaml", "kind: build-vm\nimage: debain\ncpu-count: 0\n")
    (tmp_path / "machines/gone.yaml").symlink_to("nowhere")
    with pytest.raises(ConfigError) as caught:
        load_library([tmp_path])
    found = [(Path(problem.file).name, problem.line, problem.field) for problem in caught.value.problems]
    assert found == [
        ("a.yaml", 3, "image"),
        ("b.yaml", 4, "cpu-count"),
        ("b.yaml", 5, "size"),
        ("c.yaml", 1, ""),
        ("e.yaml", 2, "name"),
        ("f.yaml", 2, "image"),
        ("f.yaml", 3, "cpu-count"),
        ("gone.yaml", 0, ""),
    ]
    assert "there is no image called 'debain'; did you mean debian?" in str(caught.value)


def test_the_shelf_sees_every_change(tmp_path: Path) -> None:
    write(tmp_path, "images/debian.yaml", IMAGE)
    write(tmp_path, "machines/m.yaml", MACHINE)
    shelf = Shelf([tmp_path])
    first = shelf.library()
    assert first == load_library([tmp_path])
    for count in range(1, 6):  # all of one size, within a few milliseconds
        write(tmp_path, "machines/m.yaml", f"{MACHINE}cpu-count: {count}\n")
        assert shelf.library().vm("m").cpu_count == count
    write(tmp_path, "machines/wrong.yaml", "kind: nothing\n")
    for _ in range(2):
        with pytest.raises(ConfigError):
            shelf.library()
        assert shelf.last_right().vm("m").cpu_count == 5
    with pytest.raises(ConfigError):
        Shelf([tmp_path]).last_right()
    (tmp_path / "machines/wrong.yaml").unlink()
    assert shelf.library().vm("m").cpu_count == 5


def test_the_shelf_reads_what_has_not_changed_once(tmp_path: Path) -> None:
    write(tmp_path, "images/debian.yaml", IMAGE)
    write(tmp_path, "machines/m.yaml", MACHINE)
    for path in tmp_path.rglob("*.yaml"):
        os.utime(path, (1, 1))
    shelf = Shelf([tmp_path])
    assert shelf.library() is shelf.library()


def test_the_example_of_a_remote_host_is_right() -> None:
    text = (shipped() / "machines/ssh.yaml.example").read_text().replace("AAAA...", "AAAAC3NzaC1lZDI1NTE5AAAAIA==")
    machine = parse_value("name: arm\n" + text, "ssh.yaml.example", SshMachine)
    assert (machine.host, machine.port, machine.systems) == ("arm.example.org", 22, ("aarch64-linux",))


def test_the_shelf_tells_of_a_file_that_cannot_even_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "machines").mkdir()
    loop = tmp_path / "machines/loop.yaml"
    loop.symlink_to(loop)
    shelf = Shelf([tmp_path])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"loop\.yaml"):
            shelf.library()
    loop.unlink()
    assert not shelf.library().machines
