"""The plot of a plan that removes whole layers: one bar per layer."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cria_dist.records import SiteEvidence
from cria_dist.report.canvas import KEPT, REMOVED, canvas


def are_layers(evidence: Sequence[SiteEvidence]) -> bool:
    """Whether the units of the plan are whole layers."""
    return bool(evidence) and all(one.site.part == "block" for one in evidence)


def units_leave(evidence: Sequence[SiteEvidence]) -> bool:
    """Whether units inside the layers leave: neither whole layers, nor single weights of units that stay."""
    return not are_layers(evidence) and any(len(one.kept) < len(one.scores.keep_N) for one in evidence)


def layers(evidence: Sequence[SiteEvidence]) -> Figure | None:
    """The score of every layer in the first round, and whether the plan keeps it; nothing for other units."""
    if not are_layers(evidence):
        return None
    figure, axes = canvas(3.6)
    score_L = np.array([float(one.scores.keep_N[0]) for one in evidence])
    colours = [KEPT if one.kept else REMOVED for one in evidence]
    axes.bar([one.site.layer for one in evidence], score_L, color=colours, width=0.8)
    gone = sum(not one.kept for one in evidence)
    axes.set_title(f"Score of each layer ({gone} of {len(evidence)} layers removed)")
    axes.set(xlabel="layer", ylabel="score, higher means keep", xlim=(-0.6, len(evidence) - 0.4))
    axes.grid(visible=False, axis="x")
    handles = [Patch(color=KEPT, label="kept"), Patch(color=REMOVED, label="removed")]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)
    return figure
