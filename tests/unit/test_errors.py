"""Errors as people and as the API see them."""

from __future__ import annotations

import json

import pytest

from offloadd.errors import ConfigError, DaemonError, OffloadError, Problem, SshError, _all_subclasses, error_from_json

EXIT_STATUS = {
    "UsageError": 2, "ConfigError": 3, "SourceError": 3, "NoMachineError": 4, "NotFoundError": 5, "NotAllowedError": 6,
    "BuildFailedError": 1, "BuildTimeoutError": 124, "CancelledError": 130, "TransientError": 75,
}  # fmt: skip


@pytest.mark.parametrize("cls", [cls for cls in _all_subclasses(OffloadError).values() if cls is not ConfigError])
def test_every_error_crosses_the_api(cls: type[OffloadError]) -> None:
    error = cls("what", subject="m", hint="try", detail="a\nb")
    read = error_from_json(json.loads(json.dumps(error.to_json())))
    assert type(read) is cls
    assert vars(read) == vars(error)
    assert read.render() == "m: what\n  | a\n  | b\n  hint: try"


def test_exit_statuses_are_those_of_the_manual() -> None:
    for name, cls in _all_subclasses(OffloadError).items():
        parent = next((base.__name__ for base in cls.__mro__ if base.__name__ in EXIT_STATUS), "")
        assert cls.exit_status == EXIT_STATUS.get(parent, 70), name
        assert cls.retryable == (cls.exit_status == 75), name


def test_problems_are_kept_in_order() -> None:
    problems = [Problem(file="b", line=2, field="x", message="m"), Problem(file="a", line=9, field="", message="n")]
    error = ConfigError(problems)
    assert str(error) == "a:9: n\nb:2: x: m"
    read = error_from_json(json.loads(json.dumps(error.to_json())))
    assert isinstance(read, ConfigError)
    assert read.problems == error.problems


def test_what_a_newer_daemon_says_is_an_error_still() -> None:
    read = error_from_json({"error": "NewError", "what": "something new"})
    assert type(read) is DaemonError
    assert str(read) == "something new"
    assert type(error_from_json({})) is DaemonError
    assert str(SshError("broken")) == "broken"
