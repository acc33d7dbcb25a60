"""The spectral engine on a GPU: one large site, all layers of a 7B-shaped model, share of the product's speed."""

import os

from cria_dist import arrays
from cria_dist.arrays import Array
from cria_dist.maths import neighbours
from jobs.benchmarks import spectral_site
from jobs.benchmarks.frame import seconds
from jobs.benchmarks.spectral_site import NEIGHBOURS, Float32

WIDTH, TOKENS, LAYERS = 11008, 8192, 32
QUICK_WIDTH, QUICK_TOKENS, QUICK_LAYERS = 2048, 1024, 2
PRODUCT_SIZE, REPEATS = 8192, 5


def measure(quick: bool, metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> str:
    """Add what was measured; returns what to say of it in the protocol."""
    library, reason = arrays.choose()
    if library != "cupy":
        return f"No GPU part: {reason}."
    if os.environ.get("CUPY_TF32", "0") != "0":
        return "No GPU part: CUPY_TF32 is set, and the neighbours are to be found with float32 products; unset it."
    width, tokens, layers = (QUICK_WIDTH, QUICK_TOKENS, QUICK_LAYERS) if quick else (WIDTH, TOKENS, LAYERS)
    _site_seconds(spectral_site.signals(width, tokens))  # compiles the kernels
    sites = [_site_seconds(spectral_site.signals(width, tokens, seed)) for seed in range(layers)]
    pre = arrays.to_device(spectral_site.before(width, tokens), "cupy")
    graphs = [_neighbour_seconds(pre) for _ in range(REPEATS)]
    peak = _peak_flops(pre)
    samples[f"GPU, n={width}, m={tokens}"] = {"site": sites, "kNN": graphs}
    metrics["gpu_site_seconds"] = sorted(sites)[layers // 2]
    metrics["gpu_model_seconds"] = sum(sites)
    metrics["gpu_product_tflops"] = peak / 1e12
    metrics["gpu_knn_share_of_peak"] = width * width * tokens / min(graphs) / peak
    return (
        f"GPU ({reason}): {layers} layers of n={width}, m={tokens} one after the other, from signals to scores in host "
        "memory. Share of the peak: n^2 m operations (each pair of neurons once, a multiplication and "
        f"an addition per token) per second of kNN, over those of one float32 product of size {PRODUCT_SIZE}, no TF32."
    )


def _site_seconds(pair: tuple[Float32, Float32]) -> float:
    return seconds(lambda: spectral_site.site((arrays.to_device(pair[0], "cupy"), arrays.to_device(pair[1], "cupy"))))


def _neighbour_seconds(pre: Array) -> float:
    return seconds(lambda: arrays.to_numpy(neighbours.nearest_neighbours(pre, NEIGHBOURS)))  # the copy waits


def _peak_flops(like: Array) -> float:
    """Operations per second of a large square product in the precision of an array, the best of some."""
    xp = arrays.namespace(like)
    square = xp.ones((PRODUCT_SIZE, PRODUCT_SIZE), dtype=like.dtype)
    square += xp.arange(PRODUCT_SIZE, dtype=like.dtype)[:, None] / PRODUCT_SIZE
    best = min(seconds(lambda: float((square @ square)[0, 0])) for _ in range(REPEATS + 1))
    return 2 * PRODUCT_SIZE**3 / best
