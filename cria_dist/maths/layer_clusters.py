"""Runs of layers that compute alike, and which of their members go. Shapes: L layers."""

from collections.abc import Sequence

import numpy as np

from cria_dist.records import Float64

Cluster = tuple[int, ...]


def first_of(similarity_LL: Float64, threshold: float) -> list[int]:
    """For each layer, the first layer of the run it was compared with, in one pass from the front.

    A layer joins the run if it is as similar as the threshold to the run's *first* layer; else it begins the next one.
    Layer 0 is compared with itself.
    """
    first, compared = 0, [0]
    for layer in range(1, len(similarity_LL)):
        compared.append(first)
        if not similarity_LL[first, layer] >= threshold:
            first = layer
    return compared


def clusters(similarity_LL: Float64, threshold: float) -> list[Cluster]:
    """Contiguous clusters: runs of layers whose similarity to their first layer reaches the threshold."""
    runs: list[list[int]] = []
    for layer, first in enumerate(first_of(similarity_LL, threshold)):
        if layer and similarity_LL[first, layer] >= threshold:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [tuple(run) for run in runs]


def redundant(found: Sequence[Cluster], step: int) -> tuple[int, ...]:
    """Layers that go: of every cluster the second and each ``step``-th after it; 1 leaves only the first."""
    return tuple(layer for cluster in found for layer in cluster[1::step])


def similarity_to_first(similarity_LL: Float64, threshold: float) -> Float64:
    """Of each layer to the first layer of the run it was compared with, [L]; -1 for layer 0, which always stays."""
    layer_L = np.arange(len(similarity_LL))
    return np.where(layer_L == 0, -1.0, similarity_LL[first_of(similarity_LL, threshold), layer_L])


def most_similar(candidates: Sequence[int], similarity_L: Float64, count: int) -> tuple[int, ...]:
    """The ``count`` candidates most similar to the first of their run, ties to the later layer; sorted."""
    order = sorted(candidates, key=lambda layer: (-similarity_L[layer], -layer))
    return tuple(sorted(order[:count]))


def threshold_for(similarity_LL: Float64, count: int, highest: float) -> float:
    """The largest threshold, at most ``highest``, at which clusters can spare ``count`` layers (fewer than L)."""
    upper = similarity_LL[np.triu_indices(len(similarity_LL), 1)]
    thresholds = [highest, *sorted({value for value in upper.tolist() if value < highest}, reverse=True)]
    return next(
        threshold for threshold in thresholds if len(similarity_LL) - len(clusters(similarity_LL, threshold)) >= count
    )
