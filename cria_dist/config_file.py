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
    if not isinstance(value, str | int | float):
        raise ConfigError(f"sweep: {value!r} is a {type(value).__name__}, which no key takes; quote it")
    return json.dumps(value, ensure_ascii=False)


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
    named = [str(part) for part in detail["loc"]]
    location = [part for part in named if part not in METHODS_BY_NAME]
    key, kind, value = ".".join(location) or "configuration", detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key {key!r}; known keys here: {', '.join(sorted(_known_keys(named[:-1])))}"
    if kind == "missing":
        return f"missing key {key!r}; set it in the file or as {key}=VALUE"
    message = str(detail["msg"]).removeprefix("Value error, ")
    remedy = REMEDIES.get(kind, "correct it in the file or as an override")
    if kind in ("model_type", "model_attributes_type"):
        message, remedy = "it is a section", f"set its keys, as in {_section_example(location)}"
    elif kind == "tuple_type":
        values = value.split(",") if isinstance(value, str) and " " not in value else [value]
        items = [{"name": one} for one in values] if key == "compare" else values
        message, remedy = "it is a list", f"write {as_override(key, items)}"
    return f"{key}={json.dumps(value, default=str)}: {message}; {remedy}"


REMEDIES = {
    "less_than": "lower it",
    "less_than_equal": "lower it",
    "greater_than": "raise it",
    "greater_than_equal": "raise it",
    "string_too_short": "write some or leave it out",
    "union_tag_not_found": "name the method, as in method.name=wanda",
    "union_tag_invalid": "choose one of them",
}
"""What to do about a value out of bounds, by pydantic's type of error."""

METHODS_BY_NAME: dict[str, type[BaseModel]] = {str(one.model_fields["name"].default): one for one in METHODS}
"""pydantic puts the tag of the union, a method's name, into the location of an error; users never wrote it there."""


def _section_example(location: list[str]) -> str:
    if location[0] in ("method", "compare"):
        return "method.name=wanda" if location[0] == "method" else 'compare=[{name = "wanda"}]'
    key = ".".join(location)
    return f"{key}.{next(iter(_known_keys(location)), 'KEY')}=VALUE"


def _known_keys(parents: list[str]) -> list[str]:
    """Keys of a section, in the order of their definition; of a method those of the one that is named."""
    section: type[BaseModel] = RunConfig
    for parent in parents:
        if parent == "sweep":
            return list(SweepConfig.model_fields)
        if parent in ("method", "compare"):
            return [key for name in parents if name in METHODS_BY_NAME for key in METHODS_BY_NAME[name].model_fields]
        annotation = section.model_fields[parent].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
