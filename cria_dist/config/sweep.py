"""A sweep: the runs it consists of."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from cria_dist.config.section import Section

ALIKE = (
    "prune.ratio",
    "prune.budget",
    "prune.latency",
    "model",
    "data.test",
    "data.test_sequences",
    "data.sequence_length",
)
"""Keys that say of what model how much is to leave, and what it is scored on: only trials that agree on them are
compared by what they lose."""


class Range(Section):
    """Numbers a search chooses from: whole ones where both ends are."""

    min: int | float
    max: int | float
    log: bool = False
    """Whether the order of magnitude is what is chosen."""

    @model_validator(mode="after")
    def _has_numbers(self) -> Self:
        if not (self.min < self.max and (self.min > 0 or not self.log)):
            raise ValueError("a range has min below max, and min above 0 where log is true")
        return self


Choice = list[Any] | Range
"""What a search chooses a value from."""


class SweepConfig(Section):
    """What ``cria sweep`` tries: a run for every combination of the grid. Other verbs leave it alone."""

    grid: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keys of the run as on the command line, each with the list of its values: ``prune.ratio = [0.2, 0.3]``,
    ``method = [{ name = "conditional" }, { name = "random" }]``."""
    concurrency: Annotated[int, Field(ge=1)] = 1
    """Trials at the same time; they share ``run.workers`` evenly, and each recovery has ``recover.workers`` more."""
    search: Literal["grid", "optuna"] = "grid"
    """``optuna``: for every combination of the grid, a search of its own through ``space`` for the least loss (needs
    ``optuna``); ``prune.ratio`` belongs into the grid, for only models of one size can be compared by their loss."""
    space: dict[str, Any] = Field(default_factory=dict[str, Any])
    """What ``optuna`` chooses, by key of the run: lists of values, or ranges
    (``recover.learning_rate = { min = 1e-5, max = 1e-3, log = true }``)."""
    trials: Annotated[int, Field(ge=1)] = 16
    """Trials of each search; the first quarter is drawn at random."""
    scheduler: Literal["none", "asha"] = "none"
    """``asha``: a recovery is stopped where its loss on held-out sequences (needs ``recover.patience``) is not among
    the least 1 / ``reduction_factor`` of those that came equally far before it. Only trials of the same budget, the
    same ``recover.steps`` and ``sequence_length`` are compared. It trades certainty for time: half-way through a cosine
    schedule the loss ranks learning rates more than results, and high ones look worse than they end. What was stopped
    stays in the table as such, with its pruned model, and its command goes on from its last checkpoint; a search counts
    it as not recovered."""
    grace_steps: Annotated[int, Field(ge=1)] = 50
    """Steps before the first comparison, at the look at the held-out loss that comes then or next; the following ones
    are at ``reduction_factor`` times as many, and so on."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One in so many trials goes on from a comparison."""

    @property
    def axes(self) -> dict[str, Any]:
        """Dotted key of the grid to its values."""
        return dict(_axes(self.grid, "", lambda value: False))

    @property
    def choices(self) -> dict[str, Choice]:
        """Dotted key of the space to what is chosen from."""
        found = _axes(self.space, "", lambda value: "min" in value or "max" in value)
        return {key: Range.model_validate(value) if isinstance(value, Mapping) else value for key, value in found}

    @model_validator(mode="after")
    def _axes_are_lists(self) -> Self:
        for key, values in self.axes.items():
            _check_list(f"sweep.grid.{key}", values)
        for key, values in self._readable_choices().items():
            if not isinstance(values, Range):
                _check_list(f"sweep.space.{key}", values)
            if any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in ALIKE):
                raise ValueError(
                    f"sweep.space.{key} would compare models of different sizes, or by different texts; put it into "
                    "sweep.grid"
                )
            if key in self.axes:
                raise ValueError(f"{key} is in sweep.grid and in sweep.space; leave it in one of them")
        if (self.search == "optuna") != bool(self.space):
            raise ValueError("sweep.search='optuna' and sweep.space go together; give both or none")
        return self

    def _readable_choices(self) -> dict[str, Choice]:
        try:
            return self.choices
        except ValidationError as error:
            raise ValueError(f"sweep.space has a range that is none: {error.errors()[0]['msg']}") from error


def _check_list(name: str, values: Any) -> None:
    key = name.split(".", 2)[2]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} is not a list of values; write {key} = [first, second]")
    if key.split(".")[0] in ("run", "sweep"):
        raise ValueError(f"{name} changes no result; set {key} outside of the {name.split('.')[1]}")


def _axes(
    tree: Mapping[str, Any], prefix: str, is_end: Callable[[Mapping[str, Any]], bool]
) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and not is_end(value):
            yield from _axes(value, f"{prefix}{name}.", is_end)
        else:
            yield f"{prefix}{name}", value
