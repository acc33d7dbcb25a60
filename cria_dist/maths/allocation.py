"""How many units each site loses: a budget becomes widths. Integer arithmetic, no model."""

import math
from collections.abc import Mapping

from cria_dist.errors import PlanError


def uniform_widths(
    widths: Mapping[str, int], ratio: float, multiple: int, smallest: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The same share of every site: the largest multiple that removes at least ``ratio`` of its units.

    Args:
        widths: units per site in the dense model.
        ratio: share of units to remove, 0 < ratio < 1.
        multiple: new widths are multiples of this.
        smallest: floor per site; default one multiple.

    Returns:
        New width per site.

    Raises:
        PlanError: the ratio would empty a site or go below its floor.
    """
    kept: dict[str, int] = {}
    for key, width in widths.items():
        allowed = math.floor(width * (1 - ratio) + 1e-9)
        kept[key] = allowed // multiple * multiple
        floor = (smallest or {}).get(key, multiple)
        if kept[key] < max(floor, 1):
            raise PlanError(
                f"prune.ratio={ratio:g} leaves {kept[key]} of {width} units at {key}; "
                f"at least {max(floor, 1)} must stay: lower prune.ratio or prune.multiple={multiple}"
            )
    return kept


def units_ratio_for_parameters(
    widths: Mapping[str, int], unit_cost: Mapping[str, float], dense: float, ratio: float, measure: str = "parameters"
) -> float:
    """The share of units that removes ``ratio`` of all parameters (or MACs) when every site loses the same share.

    Raises:
        PlanError: the prunable units hold fewer parameters than must go.
    """
    prunable = sum(widths[key] * unit_cost[key] for key in widths)
    share = ratio * dense / prunable if prunable else 1.0
    if share >= 1:
        raise PlanError(
            f"prune.ratio={ratio:g} of all {dense:,} {measure} is more than the prunable units hold "
            f"({prunable:,}, {prunable / dense:.1%}); lower prune.ratio"
        )
    return share


def width_after_round(dense_width: int, final_width: int, rounds: int, round_index: int, multiple: int) -> int:
    """Width after ``round_index`` (0-based) of ``rounds`` equal steps; the last round reaches ``final_width``."""
    if round_index == rounds - 1:
        return final_width
    step = (dense_width - final_width) * (round_index + 1) / rounds
    return min(dense_width, max(final_width, math.ceil((dense_width - step) / multiple) * multiple))
