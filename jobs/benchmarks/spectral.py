"""The spectral engine beside what a user of SciPy and scikit-learn would write: seconds, accuracy, growth."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from scipy.stats import rankdata
from sklearn.neighbors import kneighbors_graph
from threadpoolctl import threadpool_info

from cria_dist.maths import graphs, importance, lanczos, neighbours, pencil, sketch
from jobs.benchmarks import spectral_gpu, spectral_site
from jobs.benchmarks import spectral_rivals as rivals
from jobs.benchmarks.frame import Measurement, alternate, seconds
from jobs.benchmarks.memory import own_peak_bytes
from jobs.benchmarks.spectral_site import NEIGHBOURS, PAIRS, signals

MEMORY = "peak memory of the site"
PROTOCOL = (
    "Signals: 40 heavy-tailed latent factors, noise and a negative bias; the output is their SiLU; float32.",
    f"Site: two graphs of {NEIGHBOURS} neighbours, {PAIRS} eigenpairs, node scores. Contenders alternate in one run, "
    "all on the same cores.",
    "eigsh: two graphs by scikit-learn, then scipy eigsh(L_X, M=L_Y + 1e-8 I) with its own factorisation. dense: the "
    "same graphs, then scipy.linalg.eigh of the pencil. Each in a process of its own; its start is not timed.",
    "speedup_vs_RIVAL_N is at the smallest number of tokens (where the graphs weigh least), ..._mM at M tokens.",
    "A rival that did not finish counts as its cap: the ratio is then a lower bound (metrics NAME_is_bound = 1).",
    "Spearman: our node scores against dense ones of the same graphs, top pairs and whole spectrum (sketch).",
    "slope_n, slope_m, slope_k: growth of our site's seconds, exponents between the smallest and the largest size.",
    "Memory: peak of the arrays that our site makes, its signals not counted. float64_squares_N: how many arrays of "
    "N x N float64 would fit into it.",
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured, and after how many seconds a rival is given up.

    Attributes:
        graphs: (n, m, repeats) of the graphs beside scikit-learn's; one repeat goes without a warm-up.
        sites: (n, m, dense too) of the sites beside those of the rivals.
        cap: seconds a rival may take.
        widths: n of the growth in n, at the smallest m.
        tokens: m of the growth in m, at the second n.
        neighbours: k of the growth in k, at the second n and the smallest m.
        accuracy: (n, m) where scores are compared with dense ones.
    """

    graphs: tuple[tuple[int, int, int], ...]
    sites: tuple[tuple[int, int, bool], ...]
    cap: float
    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    neighbours: tuple[int, ...]
    accuracy: tuple[int, int]


FULL = Sizes(
    graphs=(
        (512, 1024, 7),
        (1536, 1024, 5),
        (4096, 4096, 2),
        (4096, 16384, 1),
        (11008, 4096, 1),
        (14336, 1024, 1),
        (14336, 16384, 1),
    ),
    sites=((4096, 1024, True), (4096, 4096, True), (11008, 1024, False), (11008, 4096, False)),
    cap=200.0,
    widths=(1536, 4096, 11008, 14336),
    tokens=(1024, 4096, 16384),
    neighbours=(4, 16, 64),
    accuracy=(2048, 4096),
)
QUICK = Sizes(
    graphs=((512, 256, 5), (1536, 512, 3)),
    sites=((1536, 256, True),),
    cap=20.0,
    widths=(512, 1536),
    tokens=(256, 512),
    neighbours=(4, 16),
    accuracy=(1024, 512),
)


def measure(quick: bool) -> Measurement:
    """Measure graphs, sites and accuracy."""
    sizes = QUICK if quick else FULL
    metrics: dict[str, float] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    _graphs(sizes, metrics, samples)
    _sites(sizes, metrics, samples)
    _accuracy(sizes, metrics)
    _growth(sizes, metrics, samples)
    metrics["peak_rss_gib"] = own_peak_bytes() / 2**30
    on_gpu = spectral_gpu.measure(quick, metrics, samples)
    Console(width=120).print(on_gpu, highlight=False)
    units = {**dict.fromkeys(samples, "s"), MEMORY: "GiB"}
    return Measurement("spectral", (*PROTOCOL, _libraries(), on_gpu), metrics, samples, units)


def _libraries() -> str:
    """Threads and kernels: OpenBLAS may be told by the environment to use older ones than the processor has."""
    pools = (
        f"{pool['internal_api']} {pool['version'] or ''} {pool.get('architecture', '')}, threads {pool['num_threads']}"
        for pool in threadpool_info()
    )
    return f"For all alike: {'; '.join(pools)}."


def _graphs(sizes: Sizes, metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> None:
    for width, tokens, repeats in sizes.graphs:
        pre = spectral_site.before(width, tokens)
        contenders: dict[str, Callable[[], float]] = {
            "cria_dist": lambda pre=pre: seconds(lambda: neighbours.nearest_neighbours(pre, NEIGHBOURS)),
            "scikit-learn": lambda pre=pre: seconds(lambda: kneighbors_graph(pre, NEIGHBOURS)),
        }
        found = samples[f"kNN, n={width}, m={tokens}"] = alternate(contenders, repeats, warm_up=int(repeats > 1))
        metrics[f"knn_speedup_vs_sklearn_{width}_m{tokens}"] = _ratio(found["scikit-learn"], found["cria_dist"])
    metrics["knn_speedup_vs_sklearn"] = min(
        value for name, value in metrics.items() if name.startswith("knn_speedup_vs_sklearn_")
    )


def _sites(sizes: Sizes, metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> None:
    residuals: list[float] = []
    for width, tokens, with_dense in sizes.sites:
        pair = signals(width, tokens)
        contenders: dict[str, Callable[[], float]] = {
            "cria_dist": lambda pair=pair: seconds(lambda: residuals.append(spectral_site.site(pair)[1]))
        }
        for rival in ("eigsh", "dense") if with_dense else ("eigsh",):
            contenders[rival] = lambda pair=pair, rival=rival: rivals.timed(rival, pair, NEIGHBOURS, PAIRS, sizes.cap)
        found = samples[f"site, n={width}, m={tokens}"] = alternate(contenders, 1, warm_up=0)
        suffix = "" if tokens == sizes.tokens[0] else f"_m{tokens}"
        for rival in set(found) - {"cria_dist"}:
            name = f"speedup_vs_{rival}_{width}{suffix}"
            metrics[name] = _ratio(found[rival], found["cria_dist"])
            metrics[f"{name}_is_bound"] = float(max(found[rival]) >= sizes.cap)
    metrics["residual_max"] = max(residuals)


def _accuracy(sizes: Sizes, metrics: dict[str, float]) -> None:
    """Node scores against dense ones; the two iterative eigensolvers against each other."""
    width = sizes.accuracy[0]
    left_edges, right_edges = (spectral_site.graph(one) for one in signals(*sizes.accuracy))
    left, right = graphs.laplacian(left_edges, width), graphs.laplacian(right_edges, width)
    values, vectors, _ = pencil.top_eigenpairs(left, right, PAIRS)
    dense_values, dense_vectors = rivals.dense_pairs(left, right, PAIRS)
    second_values, _ = lanczos.top_eigenpairs(left, right, PAIRS, pencil.ITERATIVE_TOLERANCE)
    compared = {
        "top": (
            pencil.distortion_of_edges(values, vectors, left_edges),
            pencil.distortion_of_edges(dense_values, dense_vectors, left_edges),
        ),
        "sketch": (
            sketch.distortion_of_edges(left_edges, np.ones(left_edges.shape[0]), right),
            pencil.full_distortion_of_edges(left, right, left_edges),
        ),
    }
    for name, pair in compared.items():
        one, other = (rankdata(importance.mean_over_neighbours(scores, left_edges, width)) for scores in pair)
        metrics[f"spearman_{name}"] = float(np.corrcoef(one, other)[0, 1])
    metrics["spearman_min"] = min(metrics["spearman_top"], metrics["spearman_sketch"])
    metrics["lanczos_difference"] = float(np.max(np.abs(second_values / values - 1)))


def _growth(sizes: Sizes, metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> None:
    """Seconds and memory of our site as one of the three numbers grows."""
    middle, first = sizes.widths[1], sizes.tokens[0]
    series = {
        "slope_n": [(width, first, NEIGHBOURS) for width in sizes.widths],
        "slope_m": [(middle, tokens, NEIGHBOURS) for tokens in sizes.tokens],
        "slope_k": [(middle, first, k) for k in sizes.neighbours],
    }
    samples["site"], samples[MEMORY] = {}, {}
    for name, points in series.items():
        taken: list[float] = []
        for width, tokens, k in points:
            found = _cost(width, tokens, k)
            taken.append(found.seconds)
            label = f"n={width}, m={tokens}, k={k}"
            samples["site"][label], samples[MEMORY][label] = [found.seconds], [found.gib]
            if name == "slope_n":
                metrics[f"float64_squares_{width}"] = found.gib * 2**30 / (8 * width * width)
        ends = next((one, last) for one, last in zip(points[0], points[-1], strict=True) if one != last)
        metrics[name] = math.log(taken[-1] / taken[0]) / math.log(ends[1] / ends[0])


def _cost(width: int, tokens: int, k: int) -> spectral_site.Cost:
    pair = signals(width, tokens)
    return spectral_site.cost(lambda: spectral_site.site(pair, k))


def _ratio(slower: list[float], faster: list[float]) -> float:
    return float(np.median(slower) / np.median(faster))
