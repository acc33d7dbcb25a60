"""Reading a configuration: TOML plus dotted overrides, and complaints of one line each.

``load("demo.toml", ["prune.ratio=0.3", "run.workers=4"])``.
"""

import copy
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

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
    return parse_with_sweep(overridden(read(path), overrides))


def read(path: str | Path) -> dict[str, Any]:
    """What a TOML file says, not validated.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"configuration {str(path)!r} is not valid TOML: {error}") from error


def overridden(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of plain data with ``dotted.key=value`` overrides applied.

    Raises:
        ConfigError: one is not of that form.
    """
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        _override(changed, override)
    return changed


def parse_with_sweep(tree: Mapping[str, Any]) -> tuple[RunConfig, SweepConfig]:
    """Like :func:`parse`, of data that may have a ``sweep``."""
    sweep = _valid(SweepConfig, tree.get("sweep", {}), "sweep")
    return parse({name: value for name, value in tree.items() if name != "sweep"}), sweep


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
    value = _value(text)
    is_typed = not isinstance(value, str | list | dict)
    section[leaf] = text if is_typed and _takes_text(key) else value


def _takes_text(key: str) -> bool:
    """Whether a dotted key takes any string, as ``model.revision`` does, which may be ``1234567`` or ``12e4567``."""
    found: Any = RunConfig
    for name in key.split("."):
        fields = getattr(found, "model_fields", {})
        found = fields[name].annotation if name in fields else None
    return found in (str, str | None)


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
    if kind == "union_tag_invalid":
        return f"{key}.name: {detail['ctx']['tag']!r} is not a method; there are: {', '.join(METHODS_BY_NAME)}"
    if kind == "tuple_type":
        return _list_complaint(key, value)
    given = f"{key}={json.dumps(value, default=str)}"
    complaint = f"{detail['msg']}; {REMEDIES.get(kind, 'correct it in the file or as an override')}"
    if kind == "value_error":  # says itself what to do
        complaint = str(detail["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        complaint = f"it is a section; set its keys, as in {_section_example(location)}"
    return f"{given}: {complaint}"


def _list_complaint(key: str, value: Any) -> str:
    """Of a value in place of a list: what its items would be refused for, else how the list is written."""
    listed = isinstance(value, str) and value.startswith("[") and value.endswith("]")
    several = listed or (isinstance(value, str) and " " not in value)
    values = [_value(one.strip()) for one in value.strip("[]").split(",")] if several else [value]
    named = key == "compare" and not isinstance(value, dict)
    items = [{"name": one} for one in values] if named else values
    try:
        TypeAdapter[Any](_annotation(key)).validate_python(items)
    except ValidationError as error:
        return "; ".join(_complaint({**one, "loc": (*key.split("."), *one["loc"])}) for one in error.errors())
    return f"{key}={json.dumps(value, default=str)}: it is a list; write {as_override(key, items)}"


REMEDIES = {
    "less_than": "lower it",
    "less_than_equal": "lower it",
    "greater_than": "raise it",
    "greater_than_equal": "raise it",
    "string_too_short": "write some or leave it out",
    "union_tag_not_found": "name the method, as in method.name=wanda",
    "literal_error": "choose one of them",
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
    if parents[:1] in (["method"], ["compare"]):
        return [key for name in parents if name in METHODS_BY_NAME for key in METHODS_BY_NAME[name].model_fields]
    section = _annotation(".".join(parents)) if parents else RunConfig
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _annotation(key: str) -> Any:
    """Type of what a dotted key of the configuration takes."""
    found: Any = RunConfig
    for name in key.split("."):
        found = SweepConfig if name == "sweep" else found.model_fields[name].annotation
    return found
