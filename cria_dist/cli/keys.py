"""The verb that lists what a configuration may say."""

import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from cria_dist.cli.frame import guarded
from cria_dist.config import RunConfig
from cria_dist.config.sweep import SweepConfig
from cria_dist.errors import ConfigError
from cria_dist.methods import METHODS

WIDTH = 100
Prefix = Annotated[str, typer.Argument(help="Only keys that begin so: recover, method.cria, run.workers.")]


def keys(prefix: Prefix = "") -> None:
    """Every key of a configuration: its default, and what it means."""

    def action() -> None:
        found = [line for key, lines in entries() if key.startswith(prefix) for line in lines]
        if not found:
            raise ConfigError(f"no key begins with {prefix!r}; `cria keys` lists them all")
        typer.echo("\n".join(found))

    raise typer.Exit(guarded(action))


def entries() -> Iterator[tuple[str, list[str]]]:
    """Keys and what is said of them; those of a method as ``method.NAME.key``."""
    yield from _of_section(RunConfig, "")
    for method in METHODS:
        yield from _of_section(method, f"method.{method.model_fields['name'].default}.")
    yield from _of_section(SweepConfig, "sweep.")


def _of_section(
    section: type[BaseModel], prefix: str, given: BaseModel | None = None
) -> Iterator[tuple[str, list[str]]]:
    for name, field in section.model_fields.items():
        kind, default = field.annotation, getattr(given, name, field.get_default(call_default_factory=True))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _of_section(kind, f"{prefix}{name}.", default if isinstance(default, BaseModel) else None)
        elif field.description:
            text = " ".join(field.description.replace("``", "").split())
            said = textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
            value = "(must be given)" if field.is_required() else _in_toml(default)
            yield prefix + name, [f"{prefix}{name} = {value}", *said]


def _in_toml(value: Any) -> str:
    if value is None:
        return "(none)"
    return json.dumps(value, default=list, ensure_ascii=False)
