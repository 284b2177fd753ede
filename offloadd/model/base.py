"""What all values read from YAML or from the API have in common."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, StringConstraints

from offloadd.model.quantity import format_date, parse_date, parse_duration, parse_size


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Value(BaseModel):
    """A frozen value whose field names are written in kebab case; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_kebab, populate_by_name=True, strict=True)

    def to_json(self) -> dict[str, Any]:
        """The value as JSON types, fields spelled as in YAML."""
        return self.model_dump(mode="json", by_alias=True)


def quoted_text(value: object) -> object:
    """YAML reads `version: 1.0` as a number: say so instead of guessing its digits."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError(f"write it in quotes: '{value}'")
    return value


def portable_text(value: str) -> str:
    """No system call takes NUL, and what is no character (a byte of a shell that was not UTF-8) has no form in JSON."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{value!r} has a character in it that cannot be sent: only UTF-8 without NUL")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._+-]{0,63}$")]
"""The name of a machine, image or recipe: safe as a file name everywhere."""

Feature = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._+-]{0,63}$")]
"""A label that a build may require and a machine may offer."""

Text = Annotated[str, BeforeValidator(quoted_text), AfterValidator(portable_text)]
Date = Annotated[datetime, BeforeValidator(lambda value: parse_date(value)), PlainSerializer(format_date, return_type=str)]


def _parse_build_date(text: object) -> object:
    return text if text == "auto" else parse_date(text, more=", or auto for the day of the source's release")


def _format_build_date(date: datetime | str) -> str:
    return date if isinstance(date, str) else format_date(date)


BuildDate = Annotated[
    datetime | Literal["auto"], BeforeValidator(_parse_build_date), PlainSerializer(_format_build_date, return_type=str)
]
"""A date, or `auto`: the release date of the source."""
Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds."""
Size = Annotated[int, BeforeValidator(parse_size)]
"""Bytes."""
