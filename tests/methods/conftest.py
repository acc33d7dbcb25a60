"""A synthetic site: heavy-tailed factors through a ReLU."""

from collections.abc import Callable

import numpy as np
import pytest

from cria_dist.methods import SiteStatistics
from cria_dist.records import Moments


def build_layer(width: int, tokens: int, seed: int, batches: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """Independent batches of pre- and post-activations of one layer, float32."""
    rng = np.random.default_rng(seed)
    mixing_NF = rng.standard_t(5, size=(width, 40)) / np.sqrt(40)
    gain_N1 = np.exp(0.5 * rng.normal(size=(width, 1)))
    layer = []
    for _ in range(batches):
        factors_FM = rng.standard_t(5, size=(40, tokens))
        pre_NM = gain_N1 * (mixing_NF @ factors_FM + 0.5 * rng.normal(size=(width, tokens)) - 0.5)
        layer.append((pre_NM.astype(np.float32), np.maximum(pre_NM, 0).astype(np.float32)))
    return layer


def build_statistics(width: int = 64, tokens: int = 256, seed: int = 0, dead: tuple[int, ...] = ()) -> SiteStatistics:
    """All statistics of a site, some of its units dead."""
    [(pre_NM, post_NM)] = build_layer(width, tokens, seed)
    pre_NM[list(dead)] -= 1000.0
    post_NM[list(dead)] = 0.0
    wide_NM = post_NM.astype(np.float64)
    rng = np.random.default_rng([seed, 1])
    return SiteStatistics(
        width=width,
        input_NM=pre_NM,
        output_NM=post_NM,
        moments=Moments(tokens, wide_NM.sum(axis=1), wide_NM @ wide_NM.T),
        weight_norm_N=rng.uniform(0.5, 2, width),
        output_norm_N=rng.uniform(0.5, 2, width),
        output_DN=np.random.default_rng([seed, 2]).normal(size=(24, width)),
        taylor_N=rng.uniform(0.5, 2, width),
        gate_N=np.random.default_rng([seed, 3]).normal(size=width),
        seed=seed,
    )


@pytest.fixture
def make_layer() -> Callable[..., list[tuple[np.ndarray, np.ndarray]]]:
    return build_layer


@pytest.fixture
def make_statistics() -> Callable[..., SiteStatistics]:
    return build_statistics
