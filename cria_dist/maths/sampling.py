"""Zeros for a matrix, some by size and some by chance, so that its spectrum changes little; and how much it changed.

Source: Drineas and Zouzias, arXiv 1006.0407 (drop what is small, keep the rest by chance in proportion to its square),
with an exact number of zeros. Shapes: E entries, O outputs, I inputs, K singular values.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy.sparse.linalg import svds

from cria_dist.errors import NumericError
from cria_dist.records import Float64

CAP = 4.0
"""Most a survivor is scaled up by: one that stayed by a small chance would outweigh all others."""
EXACT_SIDE = 2048
"""Shorter side up to which all singular values are computed (a 2048 x 2048 eigenproblem takes some 2 s on one core)."""
GRID = 8
"""Places along each side of the grid that convolutions are measured on: a 3 x 3 kernel's transform is so smooth that
finer ones change the norms of ResNet-20's maps, and of random ones, by at most 3 %. A 512 x 512 kernel takes 3 s."""


@dataclass(frozen=True, slots=True)
class Sparsification:
    """How a matrix gets its zeros.

    Attributes:
        truncate: share of the zeros that are the smallest entries; the others fall by chance. 1 is magnitude pruning.
        rescale: survivors are divided by the probability they stayed with, up to :data:`CAP`.
    """

    truncate: float
    rescale: bool = False


def inclusion_probabilities(weight_E: Float64, budget: int) -> Float64:
    """Probabilities ``min(1, c w^2)`` that add up to the budget; zeros have none.

    Args:
        weight_E: entries.
        budget: how many stay; with no more nonzero entries than that, all of these stay.

    Returns:
        Float64 [E].
    """
    # squares of shares of the largest entry neither overflow nor all vanish
    square_E = np.square(weight_E / max(float(np.abs(weight_E).max(initial=0.0)), np.finfo(np.float64).tiny))
    if np.count_nonzero(square_E) <= budget:
        return (square_E > 0).astype(np.float64)
    largest_E = np.sort(square_E)[::-1]
    rest_E = np.cumsum(largest_E[::-1])[::-1]  # of entry k and all smaller ones
    left_E = budget - np.arange(len(largest_E))
    # with the k largest certain, c = left / rest; the first k at which no other entry exceeds 1
    certain = int(np.argmax(left_E * largest_E <= rest_E))
    return np.minimum(1.0, square_E * (left_E[certain] / rest_E[certain]))


def sampled(probability_E: Float64, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``budget`` entries, drawn without replacement; those with probability 1 are among them.

    Pareto sampling (Rosen, "On sampling with probability proportional to size", 1997): the entries with the smallest
    ``u / (1 - u) * (1 - q) / q``. The number is exact, and the probabilities are for all but a handful of entries
    (the error falls with their number), whereas systematic sampling in the order of a matrix would draw patterns.

    Args:
        probability_E: inclusion probabilities that add up to ``budget``.
        budget: how many entries are drawn.
        rng: where chance comes from.
    """
    uniform_E = rng.random(len(probability_E))
    odds_E = np.full(len(probability_E), np.inf)
    there = probability_E > 0
    odds_E[there] = uniform_E[there] / (1 - uniform_E[there]) * (1 - probability_E[there]) / probability_E[there]
    return np.argsort(odds_E, kind="stable")[: min(budget, int(there.sum()))]


def sparsified(weight_OI: Float64, zeros: int, how: Sparsification, seed: int) -> Float64:
    """The matrix with ``zeros`` of its entries zero (more only if it had more).

    Args:
        weight_OI: matrix of any shape.
        zeros: how many entries become zero.
        how: which ones.
        seed: the same seed gives the same zeros.

    Returns:
        Float64 of the same shape.

    Raises:
        NumericError: there are not that many entries to spare, or the matrix is not finite.
    """
    if not 0 <= zeros < weight_OI.size:
        raise NumericError(f"{zeros} of {weight_OI.size} entries cannot become zero, for some must stay")
    if not np.isfinite(weight_OI).all():
        raise NumericError("the weights are not finite")
    weight_E, kept = weight_OI.astype(np.float64).ravel(), weight_OI.size - zeros
    candidate_E = weight_E.copy()
    candidate_E[np.argsort(np.abs(weight_E), kind="stable")[: round(how.truncate * zeros)]] = 0.0
    probability_E = inclusion_probabilities(candidate_E, kept)
    chosen = sampled(probability_E, kept, np.random.default_rng(seed))
    sparse_E = np.zeros_like(weight_E)
    sparse_E[chosen] = weight_E[chosen]
    if how.rescale:
        sparse_E[chosen] *= np.minimum(CAP, 1 / probability_E[chosen])
    return sparse_E.reshape(weight_OI.shape)


def largest_singular_values(matrix_OI: Float64, count: int) -> Float64:
    """The ``count`` largest singular values (all, if there are fewer), descending, float64 [K]."""
    side = min(matrix_OI.shape)
    if side > max(EXACT_SIDE, count):
        found_K = cast(Float64, svds(matrix_OI, k=count, return_singular_vectors=False, v0=np.ones(side)))
        return np.sort(found_K)[::-1]
    gram = matrix_OI @ matrix_OI.T if matrix_OI.shape[0] <= matrix_OI.shape[1] else matrix_OI.T @ matrix_OI
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1][:count], 0.0))


def spectral_errors(weight_OI: Float64, sparse_OI: Float64, count: int = 20) -> tuple[float, float]:
    """How far a matrix moved: ``|W - S|_2 / |W|_2``, and ``|s(W) - s(S)| / |s(W)|`` of the largest singular values.

    Args:
        weight_OI: the matrix W, not zero.
        sparse_OI: what became of it, S.
        count: singular values s compared.

    Raises:
        NumericError: the matrix is zero.
    """
    before_K = largest_singular_values(weight_OI, count)
    if not before_K[0] > 0:
        raise NumericError("the weights are zero, and so is their spectrum")
    after_K = largest_singular_values(sparse_OI, count)
    distance = largest_singular_values(weight_OI - sparse_OI, 1)[0]
    return float(distance / before_K[0]), float(np.linalg.norm(before_K - after_K) / np.linalg.norm(before_K))


def convolution_error(weight_OI: Float64, sparse_OI: Float64, side: int) -> float:
    """``|T(W) - T(S)|_2 / |T(W)|_2`` of the convolutions T whose kernels the rows of W and S are.

    The grid is wrapped around, for then the singular values are those of one matrix [O, C] per frequency, the
    transform of the kernels (Sedghi, Gupta and Long, arXiv 1805.10408).

    Args:
        weight_OI: kernels W, not zero, ``side * side`` taps of every channel after each other.
        sparse_OI: what became of them, S.
        side: taps along each side.
    """
    return convolution_norm(weight_OI - sparse_OI, side) / convolution_norm(weight_OI, side)


def convolution_norm(weight_OI: Float64, side: int) -> float:
    """The largest singular value of a convolution on a grid of :data:`GRID` squared places, wrapped around."""
    kernel_OCHW = weight_OI.reshape(len(weight_OI), -1, side, side)
    found_OCHW = np.fft.rfft2(kernel_OCHW, (GRID, GRID))  # the other frequencies are conjugates of these
    maps_FOC = np.moveaxis(found_OCHW.reshape(*found_OCHW.shape[:2], -1), -1, 0)
    return float(np.linalg.norm(maps_FOC, 2, axis=(1, 2)).max())
