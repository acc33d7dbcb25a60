"""Removals tried on held-out calibration sequences: the first that raises the perplexity little enough is accepted."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cria_dist import files
from cria_dist.pipeline.context import Context
from cria_dist.records import PruningPlan, Site
from cria_dist.stages.evaluate import PerplexityMeter, Variant

RECORD = "trials.json"
HELD_OUT = "held-out.npy"


@dataclass(frozen=True, slots=True)
class Trial:
    """The rules of one round.

    Attributes:
        folder: folder of the round.
        tolerance: accepted increase of the perplexity over the dense model's, relative.
        held_out: calibration sequences to measure on, the last ones.
    """

    folder: Path
    tolerance: float
    held_out: int


def first_accepted(context: Context, trial: Trial, plans: Mapping[int, PruningPlan]) -> int | None:
    """Number of the first plan within the tolerance; None if there is none. All are measured at the same time.

    Args:
        context: the run.
        trial: the rules.
        plans: what to try, for the dense model, under its number and in order of preference.
    """
    dense, tried = _perplexities(context, trial, plans) if plans else (math.nan, {})
    rises = {number: one / dense - 1 for number, one in tried.items()}
    accepted = next((number for number, rise in rises.items() if rise <= trial.tolerance), None)
    for number, rise in rises.items():
        fate = "accepted" if number == accepted else "not needed" if rise <= trial.tolerance else "rejected"
        context.progress.note(
            f"without layers {_gone(plans[number])}: perplexity {rise:+.1%} on held-out text, {fate} "
            f"(tolerance {trial.tolerance:+.1%})"
        )
    files.write_json(trial.folder / RECORD, {"rises": rises, "tolerance": trial.tolerance, "accepted": accepted})
    return accepted


def accepted_before(folder: Path) -> int:
    """Number of the plan a round accepted; it had no successor otherwise."""
    return files.read_json(folder / RECORD)["accepted"]


def _perplexities(context: Context, trial: Trial, plans: Mapping[int, PruningPlan]) -> tuple[float, dict[int, float]]:
    """Of the dense model, and under each plan; measured ones are read back."""
    job, settings, folder = context.job, context.job.config.evaluate, trial.folder / "trials"
    tokens_ST = np.load(job.calibration_path, mmap_mode="r", allow_pickle=False)[-trial.held_out :]
    files.write_with(folder / HELD_OUT, lambda temporary: _save(temporary, tokens_ST))
    numerics = [job.numerics.dtype, job.numerics.matmul, settings.batch_sequences, trial.held_out]
    dense, variants, results = Variant("dense", job.model_dir), {}, {}
    for number, plan in plans.items():
        path = folder / f"plan-{files.digest(plan.to_json())[:16]}.json"
        files.write_bytes(path, plan.to_json().encode())
        variants[number] = Variant(f"without layers {_gone(plan)}", job.model_dir, plan.method, plan_path=path)
    for variant in (dense, *variants.values()):
        key = files.digest("trial", job.digests, variant.plan_path and variant.plan_path.name, numerics)
        results[variant] = folder / f"perplexity-{key[:16]}.json"
    missing = [variant for variant, path in results.items() if not path.is_file()]
    make = functools.partial(PerplexityMeter, folder / HELD_OUT, job.numerics, settings.batch_sequences, results)
    context.map(("try removals", "models"), make, missing, tokens=lambda done: done.scored_tokens)
    found = {variant: float(files.read_json(path)["perplexity"]) for variant, path in results.items()}
    return found[dense], {number: found[variant] for number, variant in variants.items()}


def _gone(plan: PruningPlan) -> str:
    return ", ".join(str(Site.from_key(key).layer) for key in sorted(plan.kept) if not plan.kept[key])


def _save(path: Path, tokens_ST: np.ndarray) -> None:
    with path.open("wb") as handle:
        np.save(handle, tokens_ST, allow_pickle=False)
