"""Reading a configuration: TOML plus dotted overrides, and complaints of one line each.

``load("demo.toml", ["prune.ratio=0.3", "run.workers=4"])``.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cria_dist.config import RunConfig, Section, SweepConfig
from cria_dist.errors import ConfigError
from cria_dist.methods import METHODS

SectionT = TypeVar("SectionT", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply ``dotted.key=value`` overrides.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, or a value out of bounds.
    """
    return load_with_sweep(path, overrides)[0]


def load_with_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, SweepConfig]:
    """Like :func:`load`, with the table ``[sweep]``."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"configuration {str(path)!r} is not valid TOML: {error}") from error
    for override in overrides:
        _override(tree, override)
    sweep = _valid(SweepConfig, tree.pop("sweep", {}), "sweep")
    return parse(tree), sweep


def parse(tree: dict[str, Any]) -> RunConfig:
    """Validate plain data; every complaint becomes one line that names key, value and rule."""
    return _valid(RunConfig, tree)


def as_override(key: str, value: Any) -> str:
    """An override as a user would write it; :func:`load` reads the same value from it."""
    return f"{key}={value if isinstance(value, str) and _value(value) == value else _toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _valid(section: type[SectionT], tree: Any, *place: str) -> SectionT:
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_complaint({**detail, "loc": (*place, *detail["loc"])}) for detail in error.errors())
        ) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form dotted.key=value")
    *parents, leaf = key.split(".")
    section: Any = tree
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    section[leaf] = _value(text)


def _value(text: str) -> Any:
    """A TOML value where it parses as one, else the text itself (so strings need no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _complaint(detail: dict[str, Any]) -> str:
    location = [str(part) for part in detail["loc"] if part not in METHOD_TAGS]
    key = ".".join(location) or "configuration"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}; known keys here: {', '.join(_known_keys(location[:-1]))}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"missing key {key!r}; set it in the file or as {key}=VALUE"
    remedy = REMEDIES.get(detail["type"], "correct it in the file or as an override")
    return f"{key}={json.dumps(detail['input'], default=str)}: {message}; {remedy}"


REMEDIES = {
    "less_than": "lower it",
    "less_than_equal": "lower it",
    "greater_than": "raise it",
    "greater_than_equal": "raise it",
}
"""What to do about a value out of bounds, by pydantic's type of error."""

METHOD_TAGS = frozenset(str(method.model_fields["name"].default) for method in METHODS)
"""pydantic puts the tag of the union into the location of an error; users never wrote it."""


def _known_keys(parents: list[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for parent in parents:
        if parent == "sweep":
            return sorted(SweepConfig.model_fields)
        if parent in ("method", "compare"):
            return sorted({field for method in METHODS for field in method.model_fields})
        annotation = section.model_fields[parent].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return sorted(section.model_fields)
