"""From the command line's words to requests: what the command line sends, and what the daemon makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from offload_cli.request import check_directory, safe_name
from offload_cli.target import DebianOptions, find_target
from offloadd.config.document import dump_yaml
from offloadd.config.load import parse_value
from offloadd.config.requests import make_requests
from offloadd.errors import ConfigError, NotFoundError, UsageError
from offloadd.model.asked import Asked, Changes
from offloadd.model.machine import BuildVm
from offloadd.model.recipe import BuildRecipe, BuildRequest

YAML = "packages: [gcc]\nsteps: [make, make check]\noutputs: [dist/*]\ndate: 2019-08-01\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "my project"
    folder.mkdir()
    return folder


def requests(project: Path, changes: Changes, **asked: Any) -> Sequence[BuildRequest]:
    """What the daemon makes of it, after its way through JSON."""
    sent = json.dumps(asdict(find_target(str(project), changes, DebianOptions()).asked) | asked)
    return make_requests(TypeAdapter(Asked).validate_python(json.loads(sent)))


def find_recipe(project: Path, changes: Changes) -> BuildRecipe:
    [request] = requests(project, changes)
    assert request.recipe is not None
    return request.recipe


def test_recipe_of_a_file(project: Path) -> None:
    (project / "offload.yaml").write_text(YAML)
    recipe = find_recipe(project, Changes())
    assert (recipe.name, recipe.steps) == ("my-project", ("make", "make check"))


def test_command_line_changes_a_file(project: Path) -> None:
    (project / "offload.yaml").write_text(YAML)
    recipe = find_recipe(project, Changes(command=("echo", "a b"), packages=("make",), outputs=("log",)))
    assert recipe.steps == ("echo 'a b'",)
    assert recipe.packages == ("gcc", "make")
    assert recipe.outputs == ("dist/*", "log")
    assert recipe.date == datetime(2019, 8, 1, tzinfo=UTC)


def test_a_command_needs_no_file_and_no_steps(project: Path) -> None:
    assert find_recipe(project, Changes(command=("make",))).outputs == ()
    (project / "offload.yaml").write_text("packages: [gcc]\n")
    assert find_recipe(project, Changes(command=("make",))).steps == ("make",)


def test_neither_file_nor_command(project: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        find_recipe(project, Changes())
    assert "-- COMMAND" in caught.value.hint


def test_a_wrong_file_names_its_lines(project: Path) -> None:
    (project / "offload.yaml").write_text("step: [make]\nversion: 1\n")
    with pytest.raises(ConfigError) as caught:
        find_recipe(project, Changes())
    assert [problem.line for problem in caught.value.problems] == [1, 1, 2]


@pytest.mark.parametrize("text", [r"echo \ud800", r"echo \0"])
def test_text_that_cannot_be_sent(project: Path, text: str) -> None:
    (project / "offload.yaml").write_text(f'version: "1"\nsteps: ["{text}"]\nenv: {{A: "{text}"}}\n')
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        find_recipe(project, Changes())
    assert [(problem.line, problem.field) for problem in caught.value.problems] == [(2, "steps[0]"), (3, "env.A")]


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        (Changes(command=("x",), packages=("UPPER",)), "--package: 'UPPER'"),
        (Changes(command=("x",), outputs=("../x",)), "--output: '../x'"),
        (Changes(command=("echo", "\udcff")), "the command: .*only UTF-8 without NUL"),
    ],
)
@pytest.mark.parametrize("file", [True, False])
def test_a_wrong_change_names_its_option(project: Path, changes: Changes, option: str, file: bool) -> None:
    if file:
        (project / "offload.yaml").write_text("packages: [gcc]\n")
    with pytest.raises(UsageError, match=option):
        find_recipe(project, changes)


def test_request(project: Path) -> None:
    options = {"date": "2020-01-01", "timeout": "10m", "cpu": None, "keep-failed": True}
    [request] = requests(project, Changes(command=("make",)), options=options)
    assert request.date == datetime(2020, 1, 1, tzinfo=UTC)
    assert (request.timeout, request.cpu, request.keep_failed) == (600.0, None, True)


@pytest.mark.parametrize("option", [{"date": "yesterday"}, {"timeout": "-3"}, {"max-silent-time": "x"}, {"machine": "../x"}])
def test_a_wrong_option_is_named(project: Path, option: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(option))}: "):
        requests(project, Changes(command=("make",)), options=option)


def test_every_wrong_option_is_named_at_once(project: Path) -> None:
    with pytest.raises(UsageError, match=r"--date: .*; --timeout: |--timeout: .*; --date: "):
        requests(project, Changes(command=("make",)), options={"date": "x", "timeout": "y"})


def test_a_file_whose_name_has_no_form_in_json(tmp_path: Path) -> None:
    folder = tmp_path / "\udcff"
    folder.mkdir()
    (folder / "offload.yaml").write_text("step: [make]\n")
    with pytest.raises(ConfigError, match="unknown key; did you mean steps"):
        find_recipe(folder, Changes())


@pytest.mark.parametrize(
    ("name", "safe"), [("my project", "my-project"), (".hidden", "hidden"), ("", "build"), ("ä", "-"), ("x" * 99, "x" * 64)]
)
def test_safe_name(name: str, safe: str) -> None:
    assert safe_name(name) == (safe if safe != "-" else "build")


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        check_directory(tmp_path / "file")
    with pytest.raises(NotFoundError):
        check_directory(tmp_path / "none")
    assert check_directory(tmp_path) == tmp_path.resolve()


def test_a_configuration_that_is_printed_can_be_read_back() -> None:
    machine = parse_value("kind: build-vm\nname: vm\nimage: debian\ndate: 2019-01-01\nboot-timeout: 90\n", "vm.yaml", BuildVm)
    values = {field: value for field, value in machine.to_json().items() if value is not None}
    values["port-forwardings"] = {int(host): guest for host, guest in values["port-forwardings"].items()}
    assert parse_value(dump_yaml(values), "printed", BuildVm) == machine
