"""Sparsification: exact numbers of zeros, seeds, what surely stays, and the published trade-off in spectral error."""

import numpy as np
import pytest

from cria_dist.errors import NumericError
from cria_dist.maths import sampling
from cria_dist.maths.sampling import (
    Sparsification,
    convolution_error,
    convolution_norm,
    inclusion_probabilities,
    sampled,
    sparsified,
    spectral_errors,
)

MAGNITUDE, CHANCE = Sparsification(1.0), Sparsification(0.0)
settings = pytest.mark.parametrize(
    "how", [CHANCE, Sparsification(0.5), MAGNITUDE, Sparsification(0.3, rescale=True)], ids=str
)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_inclusion_probabilities_by_hand() -> None:
    """4 is certain, the rest share one place: c = 1 / (4 + 1 + 1)."""
    weight_E = np.array([1.0, -4.0, 2.0, 0.0, -1.0])
    np.testing.assert_allclose(inclusion_probabilities(weight_E, 2), [1 / 6, 1, 4 / 6, 0, 1 / 6], rtol=1e-14)
    np.testing.assert_allclose(inclusion_probabilities(weight_E, 1), weight_E**2 / 22, rtol=1e-14)
    np.testing.assert_array_equal(inclusion_probabilities(weight_E, 4), [1, 1, 1, 0, 1])
    np.testing.assert_array_equal(inclusion_probabilities(weight_E, 5), [1, 1, 1, 0, 1])


def test_a_matrix_by_hand() -> None:
    """Of two zeros one is the smallest entry; 4 stays, and 2 stays with 4 / 5 or one of the 1s with 1 / 5."""
    weight_OI = np.array([[1.0, -4.0], [2.0, -1.0]])
    found = [sparsified(weight_OI, 2, Sparsification(0.5, rescale=True), seed) for seed in range(60)]
    likely, unlikely = [[0, -4], [2.5, 0]], [[0, -4], [0, -4]]  # 1 / (1 / 5) is above the cap of 4
    assert {str(one.tolist()) for one in found} == {str(np.array(one, float).tolist()) for one in (likely, unlikely)}
    assert sum(one[1, 0] != 0 for one in found) > 40
    np.testing.assert_array_equal(sparsified(weight_OI, 2, MAGNITUDE, 0), [[0, -4], [2, 0]])


@settings
@pytest.mark.parametrize("zeros", [0, 1, 7, 500, 1500, 1999])
def test_the_number_of_zeros_is_exact_and_the_seed_decides(how: Sparsification, zeros: int) -> None:
    weight_OI = gaussian(40, 50)
    found = sparsified(weight_OI, zeros, how, 3)
    assert np.count_nonzero(found == 0) == zeros
    np.testing.assert_array_equal(found, sparsified(weight_OI, zeros, how, 3))
    again = sparsified(weight_OI, zeros, how, 4)
    assert zeros in (0, 1, 1999) or how == MAGNITUDE or not np.array_equal(found == 0, again == 0)


@settings
@pytest.mark.parametrize("zeros", [300, 1000, 1800])
def test_the_largest_entries_stay_as_they_are(how: Sparsification, zeros: int) -> None:
    weight_OI = np.random.default_rng(1).standard_t(3, size=(40, 50))
    certain = inclusion_probabilities(weight_OI.ravel(), weight_OI.size - zeros).reshape(40, 50) == 1
    assert certain.sum() > 10
    for seed in range(5):
        found = sparsified(weight_OI, zeros, how, seed)
        np.testing.assert_array_equal(found[certain], weight_OI[certain])


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_add_up_and_are_met(seed: int) -> None:
    weight_E = gaussian(300, seed=seed)
    probability_E = inclusion_probabilities(weight_E, 120)
    assert probability_E.sum() == pytest.approx(120, abs=1e-9)
    assert probability_E.max() <= 1
    middle = probability_E < 1
    ratio = probability_E[middle] / weight_E[middle] ** 2
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    rng, draws = np.random.default_rng(seed), 2000
    counts_E = np.zeros(300)
    for _ in range(draws):
        chosen = sampled(probability_E, 120, rng)
        assert len(np.unique(chosen)) == 120
        counts_E[chosen] += 1
    deviation = np.sqrt(np.maximum(probability_E * (1 - probability_E), 1e-12) / draws)
    assert np.abs((counts_E / draws - probability_E) / (deviation + 1e-3)).max() < 4.5


@pytest.mark.parametrize("scale", [1e-180, 1.0, 1e180])
def test_scale_makes_no_difference(scale: float) -> None:
    weight_OI = gaussian(20, 30)
    places = sparsified(scale * weight_OI, 300, Sparsification(0.5), 0) != 0
    np.testing.assert_array_equal(places, sparsified(weight_OI, 300, Sparsification(0.5), 0) != 0)


def test_equal_entries_and_entries_that_are_zero_already() -> None:
    for how in (CHANCE, Sparsification(0.5), MAGNITUDE):
        assert np.count_nonzero(sparsified(np.ones((9, 9)), 40, how, 0)) == 41
        many = np.zeros((9, 9))
        many[2] = 3.0
        np.testing.assert_array_equal(sparsified(many, 40, how, 0), many)


def test_more_zeros_hardly_bring_an_entry_back() -> None:
    weight_OI = gaussian(100, 100)
    for how, least in ((MAGNITUDE, 1.0), (Sparsification(0.5), 0.97), (CHANCE, 0.97)):
        few, more = (sparsified(weight_OI, zeros, how, 0) == 0 for zeros in (3000, 5000))
        assert (few & more).sum() >= least * few.sum()


@pytest.mark.parametrize("zeros", [-1, 6, 7])
def test_what_leaves_nothing_is_an_error(zeros: int) -> None:
    with pytest.raises(NumericError, match="of 6 entries cannot"):
        sparsified(np.ones((2, 3)), zeros, MAGNITUDE, 0)


def test_weights_that_are_not_finite_or_all_zero_are_errors() -> None:
    with pytest.raises(NumericError, match="not finite"):
        sparsified(np.array([[1.0, np.inf]]), 1, MAGNITUDE, 0)
    with pytest.raises(NumericError, match="spectrum"):
        spectral_errors(np.zeros((3, 4)), np.zeros((3, 4)))


def test_spectral_errors_by_hand_and_for_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = np.diag([4.0, 3.0, 0.0])[:, :2]
    assert spectral_errors(weight_OI, np.diag([4.0, 0.0, 0.0])[:, :2]) == pytest.approx((0.75, 0.6))
    weight_OI = gaussian(60, 90)
    sparse_OI = sparsified(weight_OI, 2000, MAGNITUDE, 0)
    exact = spectral_errors(weight_OI, sparse_OI)
    np.testing.assert_allclose(
        sampling.largest_singular_values(weight_OI, 20), np.linalg.svd(weight_OI, compute_uv=False)[:20], rtol=1e-10
    )
    monkeypatch.setattr(sampling, "EXACT_SIDE", 10)
    assert spectral_errors(weight_OI, sparse_OI) == pytest.approx(exact, rel=1e-8)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "density", "magnitude", "chance", "truncated_and_rescaled"),
    [
        ("gaussian", 0.2, (0.60, 0.19), (0.68, 0.26), (1.18, 0.49)),
        ("t3", 0.1, (0.48, 0.13), (0.55, 0.17), (1.48, 0.85)),
    ],
)
def test_errors_of_random_matrices_at_the_size_of_a_layer(
    kind: str,
    density: float,
    magnitude: tuple[float, float],
    chance: tuple[float, float],
    truncated_and_rescaled: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values found with an independent implementation (sampled one by one, no cap): size alone is best."""
    rng = np.random.default_rng(0)
    weight_OI = rng.normal(size=(512, 784)) if kind == "gaussian" else rng.standard_t(3, size=(512, 784))
    zeros = round((1 - density) * weight_OI.size)

    def errors(how: Sparsification) -> tuple[float, float]:
        return spectral_errors(weight_OI, sparsified(weight_OI, zeros, how, 0))

    half = 0.5 / (1 - density)  # half of all entries
    assert errors(MAGNITUDE) == pytest.approx(magnitude, abs=0.02)
    assert errors(CHANCE) == pytest.approx(chance, abs=0.02)
    assert errors(MAGNITUDE) < errors(Sparsification(half)) < errors(CHANCE)
    assert errors(Sparsification(half, rescale=True))[0] < 0.9 * truncated_and_rescaled[0]  # what the cap is for
    monkeypatch.setattr(sampling, "CAP", np.inf)
    assert errors(Sparsification(half, rescale=True)) == pytest.approx(truncated_and_rescaled, rel=0.06)


def wrapped(weight_OI: np.ndarray, side: int) -> np.ndarray:
    """The convolution of an 8 x 8 grid with wrapped edges, as the matrix it is."""
    kernel_OCHW = weight_OI.reshape(len(weight_OI), -1, side, side)
    matrix = np.zeros((len(kernel_OCHW), 8, 8, kernel_OCHW.shape[1], 8, 8))
    for y, x, dy, dx in np.ndindex(8, 8, side, side):
        matrix[:, y, x, :, (y + dy) % 8, (x + dx) % 8] += kernel_OCHW[:, :, dy, dx]
    return matrix.reshape(64 * len(kernel_OCHW), -1)


@pytest.mark.parametrize(("shape", "side"), [((3, 2 * 9), 3), ((2, 3 * 9), 3), ((2, 2 * 25), 5)])
def test_the_norm_of_a_convolution_is_that_of_its_matrix(shape: tuple[int, int], side: int) -> None:
    kernel_OI = gaussian(*shape)
    sparse_OI = sparsified(kernel_OI, kernel_OI.size // 2, MAGNITUDE, 0)
    whole = np.linalg.norm(wrapped(kernel_OI, side), 2)
    assert convolution_norm(kernel_OI, side) == pytest.approx(whole, rel=1e-12)
    left = np.linalg.norm(wrapped(kernel_OI - sparse_OI, side), 2)
    assert convolution_error(kernel_OI, sparse_OI, side) == pytest.approx(left / whole, rel=1e-12)
