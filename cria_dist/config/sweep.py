"""A sweep: the runs it consists of."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from cria_dist.config.section import Section


class SweepConfig(Section):
    """What ``cria sweep`` tries: a run for every combination of the grid. Other verbs leave it alone."""

    grid: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keys of the run as on the command line, each with the list of its values: ``prune.ratio = [0.2, 0.3]``,
    ``method = [{ name = "conditional" }, { name = "random" }]``."""
    concurrency: Annotated[int, Field(ge=1)] = 1
    """Trials at the same time; they share ``run.workers`` evenly, and each recovery has ``recover.workers`` more."""

    @property
    def axes(self) -> dict[str, Any]:
        """Dotted key to its values."""
        return dict(_axes(self.grid, ""))

    @model_validator(mode="after")
    def _axes_are_lists(self) -> Self:
        for key, values in self.axes.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"sweep.grid.{key} is not a list of values; write {key} = [first, second]")
            if key.split(".")[0] in ("run", "sweep"):
                raise ValueError(f"sweep.grid.{key} changes no result; set {key} outside of the grid")
        return self


def _axes(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _axes(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
