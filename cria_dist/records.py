"""The records that flow between stages: frozen, small, picklable. Bulk data travels in files.

Shape suffixes: N units of a site, K eigenvalues, E edges.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from cria_dist.errors import DataError

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

PLAN_SCHEMA = 1

Stage = Literal["record", "analyse", "decide", "apply", "recover", "evaluate"]
"""The stages of a run at which it can be told to stop; the report comes with ``evaluate``."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A place where prunable units live: a part of a layer (``mlp``), or the layer as its own one unit (``block``)."""

    layer: int
    part: str = "mlp"

    @property
    def key(self) -> str:
        """Name used for files and logs; sorts like the layers."""
        return f"layer-{self.layer:03d}.{self.part}"

    @classmethod
    def from_key(cls, key: str) -> Self:
        """Inverse of :attr:`key`."""
        layer, part = key.removeprefix("layer-").split(".", 1)
        return cls(int(layer), part)


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of a site's post-activation signals; ``a + b`` covers both sets of tokens.

    Attributes:
        count: number of tokens.
        total_N: sum over tokens, float64.
        gram_NN: sum over tokens of the outer product (not centred), float64.
    """

    count: int
    total_N: Float64
    gram_NN: Float64

    def __add__(self, other: "Moments") -> "Moments":
        """Merge two disjoint sets of tokens."""
        return Moments(self.count + other.count, self.total_N + other.total_N, self.gram_NN + other.gram_NN)

    @property
    def mean_N(self) -> Float64:
        """Mean activation per unit."""
        return self.total_N / self.count

    @property
    def std_N(self) -> Float64:
        """Standard deviation per unit (population, clipped at zero against rounding)."""
        variance_N = np.diagonal(self.gram_NN) / self.count - self.mean_N**2
        return np.sqrt(np.clip(variance_N, 0.0, None))


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Generalised eigenvalues between the two graphs of a site.

    Attributes:
        values_K: eigenvalues outside the null space, descending.
        residual: largest ``|L_X v - zeta L_Y v| / (|L_X v| + zeta |L_Y v|)`` over the pairs that were checked.
        complete: True when every value was computed; False when all but the largest are quantiles of an estimated
            density (stochastic Lanczos quadrature).
    """

    values_K: Float64
    residual: float
    complete: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """What a method says of one site.

    Attributes:
        site: where the units live.
        keep_N: one score per unit, higher means keep; ``-inf`` for units that are dead.
        cost_N: parameters that leave the model with the unit.
        edges_E2: edges of the input graph for the neighbour guard, or None when the method asks for no guard.
        spectrum: the eigenspectrum behind the scores, if the method has one.
        facts: small numbers worth showing in the report (components, degrees, dead units).
    """

    site: Site
    keep_N: Float64
    cost_N: NDArray[np.int64]
    edges_E2: Int32 | None = None
    spectrum: Spectrum | None = None
    facts: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Which units survive, in the numbering of the dense model.

    Attributes:
        kept: for each site key, the sorted indices of the surviving units.
        widths: for each site key, the number of units in the dense model.
        method: name of the method that decided.
        ratio: removed over dense parameters of the model, exact (the paper's effective parameter reduction).
        parameters: parameters of the dense and of the pruned model.
        digest: digest of everything the decision was made from.
    """

    kept: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    method: str
    ratio: float
    parameters: tuple[int, int]
    digest: str

    def to_json(self) -> str:
        """Canonical JSON: equal plans give equal bytes."""
        record = {"schema": PLAN_SCHEMA, **asdict(self)}
        return json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            DataError: the plan is of another schema.
        """
        record = json.loads(text)
        if record.get("schema") != PLAN_SCHEMA:
            raise DataError(f"plan of schema {record.get('schema')}, this version reads {PLAN_SCHEMA}; decide again")
        return cls(
            kept={key: tuple(indices) for key, indices in record["kept"].items()},
            widths=record["widths"],
            method=record["method"],
            ratio=record["ratio"],
            parameters=(record["parameters"][0], record["parameters"][1]),
            digest=record["digest"],
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measured quality and cost of one variant of the model.

    Attributes:
        label: "dense", "pruned", "repaired" or "recovered" for the variants of a run; the method's title in a
            comparison, where ``repair`` tells the pruned from the repaired one.
        method: pruning method behind it, empty for the dense model.
        repair: repair applied, "none" if none.
        parameters: number of parameters, tied weights counted once.
        perplexity: exp of the mean negative log likelihood per token of text, or per label of a classifier.
        scored_tokens: tokens, or labelled examples, the perplexity is over.
        weight_bytes: bytes of the weights on storage.
        prefill_ms: median time of one forward pass over one test sequence or example, or None if not timed.
        decode_ms: median time per generated token with a cache at batch 1, or None if not timed.
        batch_prefill_ms: like ``prefill_ms``, several sequences together (``stages.speed.BATCH``).
        batch_decode_ms: like ``decode_ms``, a token for each of several sequences.
        memory_bytes: weights as they compute and the cache of these sequences, or None if not measured.
        accuracy: share of the examples whose label a classifier found; None for a language model.
    """

    label: str
    method: str
    repair: str
    parameters: int
    perplexity: float
    scored_tokens: int
    weight_bytes: int
    prefill_ms: float | None = None
    decode_ms: float | None = None
    batch_prefill_ms: float | None = None
    batch_decode_ms: float | None = None
    memory_bytes: int | None = None
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage took in the invocation that computed it."""

    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt and what each variant wrote after it (greedy)."""

    prompt: str
    answers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SiteEvidence:
    """What the report draws for one site: the scores of the first round, and the indices into them that were kept."""

    site: Site
    scores: Scores
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the report shows; ``report.json`` is this record without the evidence arrays.

    Attributes:
        name: name of the run.
        command: the command line that reproduces it.
        config: the whole configuration as plain data.
        versions: package name to version, plus the machine in words.
        digests: what was hashed (model, calibration tokens, test tokens, plan).
        protocol: how the numbers were measured, one sentence each.
        effective_parameter_reduction: removed over dense parameters.
        variants: dense, pruned, repaired, recovered, in this order, those that exist.
        comparison: the same ratio by other methods, with and without repair.
        generations: example texts side by side.
        stages: seconds per stage.
        loss: (step, training loss) of the recovery.
        loaders: which loaders accept the result and how that was found out.
    """

    name: str
    command: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    digests: Mapping[str, str]
    protocol: tuple[str, ...]
    effective_parameter_reduction: float
    variants: tuple[Evaluation, ...]
    comparison: tuple[Evaluation, ...]
    generations: tuple[Generation, ...]
    stages: tuple[StageTime, ...]
    loss: tuple[tuple[int, float], ...]
    loaders: Mapping[str, str]
