"""Decide: all scores and the budget become a plan in the numbering of the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cria_dist.maths.allocation_scores import shares
from cria_dist.maths.importance import lowest, lowest_guarded
from cria_dist.models.depth import removes_layers
from cria_dist.records import PruningPlan, Scores
from cria_dist.stages.decide_depth import local_layers


def select(scores: Scores, width: int) -> tuple[int, ...]:
    """The surviving units of a site, sorted, in the numbering of the scores."""
    count = scores.keep_N.shape[0] - width
    removed = (
        lowest(scores.keep_N, count)
        if scores.edges_E2 is None
        else lowest_guarded(scores.keep_N, count, scores.edges_E2)
    )
    return tuple(np.setdiff1d(np.arange(scores.keep_N.shape[0]), removed).tolist())


def select_together(scores: Sequence[Scores], width: int) -> tuple[int, ...]:
    """The surviving units of sites that share them: those with the largest sum of shares of the sites' scores."""
    together_N = np.sum([shares(one.keep_N) for one in scores], axis=0)
    return tuple(np.setdiff1d(np.arange(together_N.size), lowest(together_N, together_N.size - width)).tolist())


def compose(survivors: Mapping[str, tuple[int, ...]], previous: PruningPlan | None) -> dict[str, tuple[int, ...]]:
    """Translate survivors of this round to the dense numbering."""
    if previous is None:
        return dict(survivors)
    return {key: tuple(previous.kept[key][index] for index in kept) for key, kept in survivors.items()}


def local_indices(plan: PruningPlan, previous: PruningPlan | None) -> dict[str, tuple[int, ...]]:
    """The plan in the numbering of the model that the previous round left."""
    if previous is None:
        return dict(plan.kept)
    if removes_layers(plan.kept):
        return dict(local_layers(plan, previous))
    return {
        key: tuple(np.searchsorted(np.asarray(previous.kept[key]), np.asarray(kept)).tolist())
        for key, kept in plan.kept.items()
    }


@dataclass(frozen=True, slots=True)
class Accounts:
    """What the reduction is counted from.

    Attributes:
        dense: parameters of the dense model.
        unit_cost: parameters that leave with one unit, by site key.
        added: parameters the repair adds (biases the dense model does not have).
    """

    dense: int
    unit_cost: Mapping[str, int]
    added: int = 0


def make_plan(
    kept: Mapping[str, tuple[int, ...]], widths: Mapping[str, int], accounts: Accounts, method: str, digest: str
) -> PruningPlan:
    """Account for what leaves the model and write it all down.

    Args:
        kept: survivors per site key, dense numbering.
        widths: dense units per site key.
        accounts: what the reduction is counted from.
        method: title of the method.
        digest: digest of everything the decision was made from.
    """
    removed = sum(accounts.unit_cost[key] * (widths[key] - len(kept[key])) for key in widths) - accounts.added
    return PruningPlan(
        kept=dict(kept),
        widths=dict(widths),
        method=method,
        ratio=removed / accounts.dense,
        parameters=(accounts.dense, accounts.dense - removed),
        digest=digest,
    )
