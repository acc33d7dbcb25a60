"""Score distributions on one axis for all layers, whatever a method's scores look like.

Shape suffixes: N units of a site, B bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cria_dist.errors import DataError
from cria_dist.records import Float64, SiteEvidence

NUM_BINS = 120
RIDGE_HEIGHT = 0.92
WIDE_SPREAD = 30.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps scores, divided by their layer's median size, to places on the axis.

    Attributes:
        logarithmic: places are powers of ten; zero goes to the low end.
        label: the name of the axis.
    """

    logarithmic: bool
    label: str

    def place(self, keep_N: Float64) -> Float64:
        """Places of the scores of one layer that are finite."""
        value_N = keep_N[np.isfinite(keep_N)]
        sizes = np.abs(value_N[value_N != 0])
        value_N = value_N / (float(np.median(sizes)) if len(sizes) else 1.0)
        if self.logarithmic:
            return np.log10(np.maximum(value_N, np.finfo(np.float64).tiny))
        return np.arcsinh(value_N)

    def ticks(self, low: float, high: float) -> dict[float, float]:
        """Round multiples of the median between two places, keyed by their place."""
        if self.logarithmic:
            step = max(1, round((high - low) / 10))
            return {float(power): 10.0**power for power in range(int(np.ceil(low)), int(high) + 1, step)}
        sizes = [digit * 10.0**power for power in range(13) for digit in (1, 3)]
        values = [-size for size in reversed(sizes)] + [0.0, *sizes]
        return {float(np.arcsinh(value)): value for value in values if low <= np.arcsinh(value) <= high}


@dataclass(frozen=True, slots=True)
class Ridge:
    """One layer's histogram, at most :data:`RIDGE_HEIGHT` high, with a closing zero.

    Attributes:
        removed_B: height of the removed units.
        total_B: height of all units that are alive.
        dead: number of units whose score is minus infinity.
    """

    removed_B: Float64
    total_B: Float64
    dead: int


def common_scale(keeps: Sequence[Float64]) -> Scale:
    """Logarithmic when no score is negative and the bulk spans much more than a decade, else linear near zero."""
    finite = np.concatenate([keep_N[np.isfinite(keep_N)] for keep_N in keeps])
    positive = finite[finite > 0]
    if len(positive) and (finite >= 0).all():
        low, high = np.quantile(positive, [0.05, 0.95])
        if high > WIDE_SPREAD * low:
            return Scale(True, "score / median score of the layer, logarithmic axis")
    return Scale(False, "score / median size of the scores of the layer, axis compressed away from zero")


def bin_edges(scale: Scale, keeps: Sequence[Float64]) -> Float64:
    """Bins over all layers without the outermost thousandths."""
    places = np.concatenate([scale.place(keep_N) for keep_N in keeps])
    places = places[places > np.log10(np.finfo(np.float64).tiny) + 1] if scale.logarithmic else places
    low, high = np.quantile(places, [0.001, 0.999]) if len(places) else (0.0, 0.0)
    margin = 0.05 * (high - low) or 0.5
    return np.linspace(low - margin, high + margin, NUM_BINS + 1)


def ridge(evidence: SiteEvidence, scale: Scale, edges: Float64) -> Ridge:
    """Histogram one site; scores beyond the edges count in the outermost bins.

    Raises:
        DataError: a kept index lies outside the scores.
    """
    keep_N = evidence.scores.keep_N
    if evidence.kept and not 0 <= min(evidence.kept) <= max(evidence.kept) < len(keep_N):
        raise DataError(
            f"{evidence.site.key}: kept units do not index its {len(keep_N)} scores; analyse the site again"
        )
    kept_N = np.zeros(len(keep_N), dtype=bool)
    kept_N[list(evidence.kept)] = True
    finite_N = np.isfinite(keep_N)
    place_N = np.clip(scale.place(keep_N), edges[0], edges[-1])
    total_B = np.histogram(place_N, edges)[0].astype(np.float64)
    removed_B = np.histogram(place_N[~kept_N[finite_N]], edges)[0].astype(np.float64)
    unit = RIDGE_HEIGHT / max(total_B.max(), 1.0)
    return Ridge(np.append(removed_B * unit, 0.0), np.append(total_B * unit, 0.0), int(np.isneginf(keep_N).sum()))
