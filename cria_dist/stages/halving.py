"""Stopping trials of a sweep early: what they lost on held-out text is compared at the rungs of a recovery.

Why not by a scheduler of Ray Tune: it ends a trial's process without waiting for it, so that no checkpoint is written
and training workers outlive their trial, and what it compared is forgotten when a sweep goes on. Here a trial decides
by itself, by the same rule, from a file that every trial leaves at every rung; its workers end together, behind a
checkpoint.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.config.sweep import SweepConfig
from cria_dist.errors import ConfigError
from cria_dist.maths import halving

SIZE = ("ratio", "budget", "units", "latency", "multiple")
"""Settings of ``prune`` that say how large the model becomes."""


@dataclass(frozen=True, slots=True)
class Race:
    """The place of one trial among those it is compared with.

    Attributes:
        folder: a folder per rung, with a file per trial that came there.
        name: of the trial.
        grace: steps to the first rung.
        factor: a rung has so many times the steps of the one before; one in so many goes on from it.
    """

    folder: Path
    name: str
    grace: int
    factor: int

    def goes_on(self, step: int, loss: float) -> bool:
        """Whether the trial is good enough to go on after a look at its held-out loss; asked again, the same."""
        rung = halving.rung(step, self.grace, self.factor)
        if rung is None:
            return True
        mine = self.folder / str(rung) / f"{self.name}.json"
        if not mine.is_file():
            others = [files.read_json(path)["loss"] for path in mine.parent.glob("[!.]*.json")]
            behind = halving.is_behind(loss, others, self.factor)
            files.write_json(mine, {"step": step, "loss": loss, "stopped": behind})
        return not files.read_json(mine)["stopped"]

    def follow(self, log: Iterable[Mapping[str, Any]], steps: int) -> None:
        """Come to the rungs that a recovery of so many steps was at before, in another sweep or by its own command."""
        for line in log:
            if "held_out" in line and line["step"] < steps and not self.goes_on(line["step"], line["held_out"]):
                return

    def stopped(self) -> tuple[int, float] | None:
        """Where it was stopped, if it was: steps, held-out loss."""
        for path in self.folder.glob(f"*/{self.name}.json"):
            if (record := files.read_json(path))["stopped"]:
                return record["step"], record["loss"]
        return None

    def state(self, steps: int) -> str | None:
        """What a reader is told of a trial that was stopped."""
        if (there := self.stopped()) is None:
            return None
        return f"stopped after {there[0]} of {steps} steps, held-out loss {there[1]:.4f}"


def contest(config: RunConfig) -> str:
    """Equal for trials that may be compared: the same budget, the same held-out text, the same schedule's length."""
    prune = config.prune.content_part()
    size = {name: value for name, value in prune.items() if name in SIZE}
    recover = [config.recover.steps, config.recover.sequence_length]
    return files.digest(config.result_part()["model"], config.result_part()["data"], size, config.method.unit, recover)


def rungs(settings: SweepConfig, trials: Sequence[tuple[str, RunConfig]], searched: bool) -> tuple[int, int] | None:
    """Grace steps and reduction factor, checked: every trial that recovers must come to a rung, and be looked at.

    Args:
        settings: of the sweep.
        trials: label and configuration of each; of a search, those at the ends of its space.
        searched: whether each stands for many.

    Returns:
        None where nothing is to be stopped.

    Raises:
        ConfigError: a trial could not be compared, or there is nothing to compare.
    """
    if settings.scheduler == "none":
        return None
    recovering = [(label, config) for label, config in trials if config.recover.steps]
    for label, config in recovering:
        _check_looks(label, config, settings.grace_steps)
    sizes = Counter(contest(config) for _, config in recovering)
    if not sizes or (max(sizes.values()) < 2 and not searched):
        raise ConfigError(
            "sweep.scheduler='asha' compares recoveries of the same budget, recover.steps and recover.sequence_length, "
            "and no two trials agree in them; set sweep.scheduler='none'"
        )
    return settings.grace_steps, settings.reduction_factor


def _check_looks(label: str, config: RunConfig, grace: int) -> None:
    recover = config.recover
    if not recover.patience:
        raise ConfigError(
            f"trial {label!r}: sweep.scheduler='asha' compares losses on held-out sequences, and recover.patience=0 "
            "holds none out; set recover.patience=3 or more"
        )
    look = -(-grace // recover.checkpoint_every) * recover.checkpoint_every
    if look >= recover.steps:
        raise ConfigError(
            f"trial {label!r}: sweep.grace_steps={grace} is first looked at after {look} of recover.steps="
            f"{recover.steps}, when there is nothing left to stop; lower it, or recover.checkpoint_every"
        )
    if look < recover.steps // 10:
        raise ConfigError(
            f"trial {label!r}: sweep.grace_steps={grace} ends while the learning rate still rises, a tenth of "
            f"recover.steps={recover.steps}; raise it to {recover.steps // 10}"
        )
