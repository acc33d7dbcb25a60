"""The spectral engine beside what a user of SciPy and scikit-learn would write: seconds, accuracy, growth."""

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.neighbors import kneighbors_graph
from threadpoolctl import threadpool_info

from cria_dist import arrays
from cria_dist.maths import graphs, importance, lanczos, neighbours, pencil, sketch
from jobs.benchmarks import spectral_rivals as rivals
from jobs.benchmarks.frame import Measurement, alternate, seconds

NEIGHBOURS, PAIRS, FACTORS = 10, 16, 40
PROTOCOL = (
    "Signals: 40 heavy-tailed latent factors, noise and a negative bias; the output is their SiLU; float32.",
    f"Site: two graphs of {NEIGHBOURS} neighbours, {PAIRS} eigenpairs, node scores. Contenders alternate in one run, "
    "all on the same cores.",
    "eigsh: two graphs by scikit-learn, then scipy eigsh(L_X, M=L_Y + 1e-8 I) with its own factorisation. dense: the "
    "same graphs, then scipy.linalg.eigh of the pencil. Each in a process of its own; its start is not timed.",
    "speedup_vs_RIVAL_N is at the smallest number of tokens (where the graphs weigh least), ..._mM at M tokens.",
    "A rival that did not finish counts as its cap: the ratio is then a lower bound (metrics NAME_is_bound = 1).",
    "Spearman: our node scores against dense ones of the same graphs, top pairs and whole spectrum (sketch).",
    "slope_n, slope_m: growth of our site's seconds, exponents between the smallest and the largest size.",
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured, and after how many seconds a rival is given up.

    Attributes:
        graphs: (n, m) of the graphs beside scikit-learn's.
        sites: (n, m, dense too) of the sites beside those of the rivals.
        cap: seconds a rival may take.
        widths: n of the growth in n, at the smallest m.
        tokens: m of the growth in m, at the second n.
        accuracy: (n, m) where scores are compared with dense ones.
        repeats: samples of each graph.
    """

    graphs: tuple[tuple[int, int], ...]
    sites: tuple[tuple[int, int, bool], ...]
    cap: float
    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    accuracy: tuple[int, int]
    repeats: int


FULL = Sizes(
    graphs=((1536, 1024), (4096, 4096), (11008, 4096)),
    sites=((4096, 1024, True), (4096, 4096, True), (11008, 1024, False), (11008, 4096, False)),
    cap=200.0,
    widths=(1536, 4096, 11008, 14336),
    tokens=(1024, 4096, 16384),
    accuracy=(2048, 4096),
    repeats=2,
)
QUICK = Sizes(
    graphs=((512, 256), (1536, 512)),
    sites=((1536, 256, True),),
    cap=20.0,
    widths=(512, 1536),
    tokens=(256, 512),
    accuracy=(1024, 512),
    repeats=1,
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
    metrics["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    threads = ", ".join(f"{pool['internal_api']} {pool['num_threads']}" for pool in threadpool_info())
    protocol = (*PROTOCOL, f"Threads, for all alike: {threads}.", f"On the CPU: {arrays.choose()[1]}.")
    return Measurement("spectral", protocol, metrics, samples, dict.fromkeys(samples, "s"))


def signals(width: int, tokens: int) -> tuple[rivals.Float32, rivals.Float32]:
    """Pre- and post-activation signals of a synthetic layer, float32 [width, tokens]."""
    rng = np.random.default_rng(0)
    mixing = (rng.standard_t(5, size=(width, FACTORS)) / math.sqrt(FACTORS)).astype(np.float32)
    gain = np.exp(0.5 * rng.standard_normal((width, 1), dtype=np.float32))
    pre = mixing @ rng.standard_t(5, size=(FACTORS, tokens)).astype(np.float32)
    pre += 0.5 * rng.standard_normal((width, tokens), dtype=np.float32) - np.float32(0.5)
    pre *= gain
    return pre, np.asarray(pre / 2 * (1 + np.tanh(pre / 2)), dtype=np.float32)


def _graph(signals_NM: rivals.Float32) -> rivals.Edges:
    nearest = neighbours.nearest_neighbours(signals_NM, NEIGHBOURS)
    return graphs.connect(signals_NM, graphs.union_edges(nearest))[0]


def _site(pair: tuple[rivals.Float32, rivals.Float32]) -> float:
    """Graphs, eigenpairs, node scores; returns the residual."""
    edges = [_graph(one) for one in pair]
    size = pair[0].shape[0]
    left, right = (graphs.laplacian(one, size) for one in edges)
    values, vectors, residual = pencil.top_eigenpairs(left, right, PAIRS)
    importance.mean_over_neighbours(pencil.distortion_of_edges(values, vectors, edges[0]), edges[0], size)
    return residual


def _graphs(sizes: Sizes, metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> None:
    for width, tokens in sizes.graphs:
        pre, _ = signals(width, tokens)
        contenders: dict[str, Callable[[], float]] = {
            "cria_dist": lambda pre=pre: seconds(lambda: neighbours.nearest_neighbours(pre, NEIGHBOURS)),
            "scikit-learn": lambda pre=pre: seconds(lambda: kneighbors_graph(pre, NEIGHBOURS)),
        }
        found = samples[f"kNN, n={width}, m={tokens}"] = alternate(contenders, sizes.repeats)
        metrics[f"knn_speedup_vs_sklearn_{width}"] = _ratio(found["scikit-learn"], found["cria_dist"])
    metrics["knn_speedup_vs_sklearn"] = min(
        value for name, value in metrics.items() if name.startswith("knn_speedup_vs_sklearn_")
    )


def _sites(sizes: Sizes, metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> None:
    residuals: list[float] = []
    for width, tokens, with_dense in sizes.sites:
        pair = signals(width, tokens)
        contenders: dict[str, Callable[[], float]] = {
            "cria_dist": lambda pair=pair: seconds(lambda: residuals.append(_site(pair)))
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
    left_edges, right_edges = (_graph(one) for one in signals(*sizes.accuracy))
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
    def grow(pairs: list[tuple[int, int]], axis: int, name: str) -> None:
        for width, tokens in pairs:
            pair = signals(width, tokens)
            taken = seconds(lambda pair=pair: _site(pair))
            samples.setdefault("site", {})[f"n={width}, m={tokens}"] = [taken]
        first, last = (samples["site"][f"n={width}, m={tokens}"][0] for width, tokens in (pairs[0], pairs[-1]))
        metrics[name] = math.log(last / first) / math.log(pairs[-1][axis] / pairs[0][axis])

    grow([(width, sizes.tokens[0]) for width in sizes.widths], 0, "slope_n")
    grow([(sizes.widths[1], tokens) for tokens in sizes.tokens], 1, "slope_m")


def _ratio(slower: list[float], faster: list[float]) -> float:
    return float(np.median(slower) / np.median(faster))
