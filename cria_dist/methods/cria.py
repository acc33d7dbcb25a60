"""Cria: neuron-level spectral structural importance (arXiv 2605.18860)."""

from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.stats import rankdata

from cria_dist import arrays
from cria_dist.arrays import Array, Sparse
from cria_dist.errors import NumericError
from cria_dist.maths import density, graphs, importance, neighbours, pencil, sketch, sparsify
from cria_dist.methods.base import MethodBase, SiteStatistics, Statistic, Verdict
from cria_dist.records import Float64, Spectrum

DEAD_SHARE = 1e-6

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {
        "spectrum": "full",
        "output_weighting": "rank",
        "dead_first": True,
    },
}


class Cria(MethodBase):
    """Spectral structural importance: how much a neuron takes part in the distortion between two graphs.

    Both graphs are over the same neurons: the input graph joins neurons with similar pre-activation signals, the output
    graph those with similar post-activation signals (k nearest neighbours, unit weights, united, connected). With the
    pencil ``L_X v = zeta L_Y v`` an edge scores ``sum_i zeta_i (v_i(p) - v_i(q))^2`` and a neuron the mean of its
    edges in the input graph. Low participation is redundancy.

    The defaults are the paper's setting; everything beyond it is off unless named or asked for by ``preset``.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2605.18860"

    name: Literal["cria"] = "cria"
    preset: Literal["paper", "recommended"] = "paper"
    """Starting values of the options below; what is set explicitly wins."""
    neighbours: Annotated[int, Field(ge=1, le=256)] = 10
    """k of the nearest-neighbour graphs (SPADE's code: 10)."""
    eigenpairs: Annotated[int, Field(ge=1)] = 10
    """s, the dominant eigenpairs of the score when ``spectrum`` is ``top``."""
    spectrum: Literal["top", "full"] = "top"
    """``full``: the limit of all eigenpairs; steadier at the low end of the ranking, where pruning happens."""
    drop_edges: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the edges of both graphs to leave out, those with the smallest effective resistance over squared data
    distance (SAGMAN's sparsification); a spanning tree stays."""
    output_weighting: Literal["none", "product", "rank"] = "none"
    """Weigh by what the next layer reads of a neuron, std(activation) x norm of its output column: multiply by it, or
    average the two ranks."""
    neighbour_guard: bool = False
    """Take at most one of each neighbourhood while others are left, so that near-duplicates do not all fall."""
    dead_first: bool = False
    """Neurons whose output never varies go first and stay out of the graphs (they would be hubs)."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = cast(dict[str, Any], values)
        preset = given.get("preset", "paper")
        return {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **given}

    @property
    def title(self) -> str:
        """Name shown in tables."""
        return f"cria ({self.preset})"

    @property
    def needs(self) -> frozenset[Statistic]:
        """Signals for the graphs; moments and weights only for the output weighting."""
        return frozenset({"signals"} if self.output_weighting == "none" else {"signals", "moments", "weights"})

    @property
    def smallest_site(self) -> int:
        """A neuron cannot be its own neighbour, and one more must be left to tell near from far."""
        return self.neighbours + 2

    @property
    def smallest_group_site(self) -> int:
        """Graphs of heads are tiny: every head has at most a third of them as neighbours."""
        return 3

    def score(self, statistics: SiteStatistics) -> Verdict:
        """Score the neurons of one site, or its groups of heads: a node then is a group, its signals put together.

        Raises:
            NumericError: non-finite signals, too few live neurons, or eigenpairs that did not converge.
        """
        if statistics.span > 1:
            few = min(self.neighbours, statistics.width // 3)
            return self.model_copy(update={"neighbours": few}).score_nodes(statistics)
        return self.score_nodes(statistics)

    def score_nodes(self, statistics: SiteStatistics) -> Verdict:
        """Score with ``neighbours`` as they are set."""
        input_NM, output_NM = nodes(statistics.input_NM, statistics), nodes(statistics.output_NM, statistics)
        if input_NM is None or output_NM is None:
            raise NumericError("cria needs recorded signals; run the record stage with this method")
        if not input_NM.shape[0] == output_NM.shape[0] == statistics.width:
            raise NumericError(
                f"{input_NM.shape[0]} pre-activation and {output_NM.shape[0]} post-activation signals of "
                f"{statistics.width} neurons; record the site again"
            )
        alive_N = self._alive(output_NM)
        live = np.flatnonzero(alive_N)
        if live.size <= self.neighbours + 1:
            raise NumericError(
                f"{live.size} of {alive_N.size} neurons are alive, method.neighbours={self.neighbours} needs at least "
                f"{self.neighbours + 2}; lower method.neighbours"
            )
        rows = arrays.namespace(input_NM).asarray(live)
        verdict = self._score_live(input_NM[rows], output_NM[rows])
        keep_N = np.full(statistics.width, -np.inf)
        keep_N[live] = verdict.keep_N
        if self.output_weighting != "none":
            keep_N[live] = self._weighted(verdict.keep_N, _read_by_next_layer(statistics)[live])
        edges_E2 = None if verdict.edges_E2 is None else live[verdict.edges_E2].astype(np.int32)
        facts = {**verdict.facts, "dead": float(alive_N.size - live.size)}
        return Verdict(keep_N, edges_E2, verdict.spectrum, facts)

    def _alive(self, output_NM: Array) -> NDArray[np.bool_]:
        if not self.dead_first:
            return np.ones(output_NM.shape[0], dtype=bool)
        xp = arrays.namespace(output_NM)
        if not bool(xp.all(xp.isfinite(output_NM))):
            return np.ones(output_NM.shape[0], dtype=bool)  # the graphs say what is wrong
        centred_NM = output_NM - output_NM[:, :1]  # exact zeros for a constant, however large
        deviation_N = arrays.to_numpy(xp.std(centred_NM, axis=1))
        return deviation_N > DEAD_SHARE * deviation_N.max()

    def _weighted(self, keep_N: Float64, reading_N: Float64) -> Float64:
        if self.output_weighting == "product":
            return keep_N * reading_N
        return (rankdata(keep_N) + rankdata(reading_N)) / (2 * keep_N.size)

    def _score_live(self, input_NM: Array, output_NM: Array) -> Verdict:
        size = input_NM.shape[0]
        input_edges, input_parts = self._graph(input_NM)
        output_edges, output_parts = self._graph(output_NM)
        left, right = graphs.laplacian(input_edges, size), graphs.laplacian(output_edges, size)
        values_K, exact = density.whole_spectrum(left, right, output_edges)
        top_K, vectors_NK, worst = pencil.top_eigenpairs(left, right, min(self.eigenpairs, size - 1))
        values_K = values_K if exact else density.with_top(values_K, arrays.to_numpy(top_K))
        if self.spectrum == "full":
            edge_scores = _full_distortion(left, right, input_edges)
        else:
            edge_scores = pencil.distortion_of_edges(top_K, vectors_NK, input_edges)
        node_scores = importance.mean_over_neighbours(edge_scores, input_edges, size)
        facts = {
            "input_components": float(input_parts),
            "output_components": float(output_parts),
            "input_max_degree": float(graphs.degrees(input_edges, size).max()),
            "output_max_degree": float(graphs.degrees(output_edges, size).max()),
            "spectral_gap": density.spectral_gap(values_K),
            "effective_rank": density.effective_rank(values_K),
        }
        guard_edges = arrays.to_numpy(input_edges) if self.neighbour_guard else None
        return Verdict(arrays.to_numpy(node_scores), guard_edges, Spectrum(values_K, worst, exact), facts)

    def _graph(self, signals_NM: Array) -> tuple[Array, int]:
        nearest_NK = neighbours.nearest_neighbours(signals_NM, self.neighbours)
        edges_E2, found = graphs.connect(signals_NM, graphs.union_edges(nearest_NK))
        if self.drop_edges:
            edges_E2 = sparsify.sparsify(signals_NM, edges_E2, self.drop_edges)
        return edges_E2, found


def _full_distortion(left: Sparse, right: Sparse, input_edges: Array) -> Array:
    """Exact while the whole spectrum is, estimated beyond."""
    if left.shape[0] <= density.EXACT_LIMIT:
        return pencil.full_distortion_of_edges(left, right, input_edges)
    xp = arrays.namespace(input_edges)
    return sketch.distortion_of_edges(input_edges, xp.ones(input_edges.shape[0], dtype=xp.float64), right)


def _read_by_next_layer(statistics: SiteStatistics) -> Float64:
    if statistics.moments is None or statistics.output_norm_N is None:
        raise NumericError("method.output_weighting needs moments and weights; run the record stage with this method")
    return statistics.norm_per_unit(statistics.moments.std_N * statistics.output_norm_N)


def nodes(signals_NM: Array | None, statistics: SiteStatistics) -> Array | None:
    """One row per unit: the signals of a unit one after the other."""
    if signals_NM is None or statistics.span == 1:
        return signals_NM
    return arrays.namespace(signals_NM).reshape(signals_NM, (signals_NM.shape[0] // statistics.span, -1))
