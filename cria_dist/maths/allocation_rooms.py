"""What an allocation may choose from: the room of every site between its floor and its width, and the budget.

Sites may differ in what a unit costs and in the multiple of their widths (an MLP neuron, a KV group, a whole layer).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cria_dist.errors import PlanError
from cria_dist.records import Float64

SLOPE = 1e-3
"""Part of a measured cost that is taken as proportional to the width."""


@dataclass(frozen=True, slots=True)
class Room:
    """The widths one site may get.

    Attributes:
        width: units it has.
        smallest: fewest units that stay; equal to ``width`` where the site is protected.
        multiple: new widths are multiples of this (the present width always is allowed).
        unit_cost: what a unit takes of the budget, on average where ``measured`` says more.
        measured: (width, cost) in ascending order, where the cost is no multiple of the width (milliseconds); may go
            beyond the units it has.
    """

    width: int
    smallest: int
    multiple: int
    unit_cost: float
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width it may get, ascending."""
        first = math.ceil(self.smallest / self.multiple) * self.multiple
        return (*range(first, self.width, self.multiple), self.width)

    def costs(self, widths: Float64) -> Float64:
        """What the site takes of the budget at each width; between the measured ones on straight lines."""
        if not self.measured:
            return widths * self.unit_cost
        at, cost = zip(*self.measured, strict=True)
        slope = SLOPE * (cost[-1] / at[-1])  # no two widths cost the same, or the wider one would be free
        return np.interp(widths, at, cost) * (1 - SLOPE) + widths * slope

    def cost(self, width: int) -> float:
        """What the site takes of the budget at a width."""
        return float(self.costs(np.array([width], dtype=np.float64))[0])


def room(width: int, floor: float, multiple: int, unit_cost: float) -> Room:
    """A site of which a share ``floor`` stays, and at least one multiple (or all, where it has no more)."""
    smallest = max(multiple, math.ceil(width * floor / multiple - 1e-9) * multiple)
    return Room(width, min(width, smallest), multiple, unit_cost)


def least_of_layer(rooms: Mapping[str, Room], whole: str, inside: Sequence[str]) -> float:
    """What a layer that stays takes of the budget at the smallest widths of the sites inside it."""
    return rooms[whole].cost(1) + sum(rooms[key].cost(rooms[key].smallest) for key in inside)


def check_floors(
    rooms: Mapping[str, Room], budget: float, total: float, ratio: float, inside: Mapping[str, Sequence[str]]
) -> None:
    """Refuse a budget that the smallest widths exceed.

    Args:
        rooms: the sites.
        budget: cost that may stay at them.
        total: cost of the whole dense model that ``ratio`` is a share of.
        ratio: share to remove.
        inside: the sites within each whole layer; a layer that may go costs nothing, but one layer stays.

    Raises:
        PlanError: the floors keep more than the budget allows.
    """
    if inside:
        layers = {whole: least_of_layer(rooms, whole, keys) for whole, keys in inside.items()}
        staying = [cost for whole, cost in layers.items() if rooms[whole].smallest]
        least = sum(staying) if staying else min(layers.values())
    else:
        least = sum(one.cost(one.smallest) for one in rooms.values())
    if least > budget + 1e-9 * total:
        most = (budget + ratio * total - least) / total
        raise PlanError(
            f"prune.ratio={ratio:g} cannot be reached: prune.floor, prune.protect and prune.multiple let at most "
            f"{max(most, 0.0):.3f} go; lower prune.ratio, or lower prune.floor or protect fewer layers"
        )


def even_widths(rooms: Mapping[str, Room], budget: float) -> dict[str, int]:
    """The same share of every site that is not protected, or its smallest width: what ``uniform`` makes of the budget.

    What the smallest widths keep beyond the share, the others lose. Where a unit is large (a KV group), rounding is
    coarse: sites are served from the coarsest on, and the finer ones share what is left. A site whose one unit is a
    whole layer keeps it.

    Raises:
        PlanError: the smallest widths cost more than the budget.
    """
    if any(one.measured for one in rooms.values()):
        return _even_by_cost(rooms, budget)
    widths = {key: one.width for key, one in rooms.items()}
    free = {key: one for key, one in rooms.items() if 0 < one.smallest < one.width}
    for step in sorted({one.multiple * one.unit_cost for one in free.values()}, reverse=True):
        fixed = sum(widths[key] * one.unit_cost for key, one in rooms.items() if key not in free)
        share = _share(free.values(), budget - fixed)
        for key, one in list(free.items()):
            if one.multiple * one.unit_cost == step:
                even = math.floor(one.width * share + 1e-9) // one.multiple * one.multiple
                widths[key] = max(one.smallest, even)
                del free[key]
    kept = sum(rooms[key].cost(width) for key, width in widths.items())
    if kept > budget + 1e-9 * sum(one.cost(one.width) for one in rooms.values()):
        raise PlanError(
            f"the budget leaves {budget:,.0f}, but the least that must stay costs {kept:,.0f}; lower prune.ratio, "
            "prune.multiple or prune.floor"
        )
    return widths


def _share(rooms: Iterable[Room], left: float) -> float:
    """The share of every width, at most 1, that costs what is left where no site gets less than its smallest width."""
    above, least = sorted(rooms, key=lambda one: one.smallest / one.width), 0.0
    while above:
        share = (left - least) / sum(one.width * one.unit_cost for one in above)
        if above[-1].width * share + 1e-9 >= above[-1].smallest:
            return min(1.0, share)
        first = above.pop()  # the first that the share leaves too little
        least += first.smallest * first.unit_cost
    return 0.0


def _even_by_cost(rooms: Mapping[str, Room], budget: float) -> dict[str, int]:
    """The largest share, in thousandths, with which every site that is not protected keeps the budget."""
    for permille in range(1000, 0, -1):
        widths = {key: one.width for key, one in rooms.items()}
        for key, one in rooms.items():
            if 0 < one.smallest < one.width and permille < 1000:
                widths[key] = max(one.smallest, one.width * permille // 1000 // one.multiple * one.multiple)
        if sum(rooms[key].cost(width) for key, width in widths.items()) <= budget:
            return widths
    raise PlanError(f"no even share keeps the budget of {budget:,.2f}; lower prune.ratio or protect fewer layers")
