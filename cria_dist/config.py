"""Configuration of a run: a typed, frozen tree; unknown keys are errors; stored beside the result."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cria_dist.methods import Conditional, Method

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Repair = Literal["none", "bias", "least_squares"]
Allocation = Literal["uniform", "global", "sensitivity"]
Unit = Literal["mlp", "attention", "layer"]
RecordDtype = Literal["auto", "float32", "float16", "bfloat16"]


class Section(BaseModel):
    """Frozen and strict about unknown keys; each field's docstring is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """The network to prune."""

    path: str
    """A local directory, a hub name (``org/model``), or ``builtin:smollm2-135m``."""
    revision: str | None = None
    """Hub revision (commit hash); pin it for a reproducible run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type the model computes in; the checkpoint keeps the data type it is stored in."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products (``torch.set_float32_matmul_precision``); ``medium`` lets the hardware use
    bfloat16 or TF32 units where it has them, and on CPUs without them takes another float32 kernel, often twice as fast
    (AMD EPYC, one core, 2048 x 576 x 1536: 204 against 97 GFLOP/s, largest error 1.2e-4 against 5e-5)."""


class CorpusConfig(Section):
    """One source of text, of conversations or of images."""

    source: str = "builtin:pydoc"
    """A local ``.txt``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, a hub data set name, a local folder of images or of a
    data set, or ``builtin:pydoc``."""
    format: Literal["text", "chat", "images"] = "text"
    """``chat``: the field holds lists of messages (``role`` and ``content``, or ShareGPT's ``from`` and ``value``), and
    the tokenizer's chat template turns them into text. ``images``: the field holds images as ``datasets`` stores them,
    for vision models."""
    field: str = "text"
    """Column of TSV, JSONL, Parquet and hub rows that holds the text, the messages or the images (``image``)."""
    label: str | None = None
    """Column that holds the label of a classifier's example: a number, or a name that its ``config.json`` knows.
    Recovery, evaluation and gradients of a classifier need labels; what comes before is recorded without."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set (``wikitext-2-raw-v1``)."""
    revision: str | None = None
    """Revision of a hub data set (commit hash); pin it for a reproducible run."""
    part: Literal["all", "first", "second"] = "all"
    """Use all documents, the first or the second half: one source can serve calibration and test without overlap."""


class DataConfig(Section):
    """Calibration and test text, cut into sequences of equal length; a classifier's example is a sequence."""

    calibration: CorpusConfig = CorpusConfig(part="first")
    """Text (or examples) the neurons are observed on and the recovery trains on."""
    test: CorpusConfig = CorpusConfig(part="second")
    """Text the perplexity is measured on, or labelled examples for the accuracy."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per sequence of text; the most that a sentence classifier gets of an example."""
    calibration_sequences: Annotated[int, Field(ge=1)] = 48
    """Sequences or examples recorded."""
    test_sequences: Annotated[int, Field(ge=1)] = 16
    """Sequences scored."""
    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest share of 64-token calibration windows that may occur in the test text, or of a classifier's calibration
    examples that may be among its test examples."""

    @property
    def labelled(self) -> bool:
        """Whether both corpora name labels."""
        return self.calibration.label is not None and self.test.label is not None

    def content_part(self) -> dict[str, Any]:
        """What a result depends on: labels only where there are some."""
        plain = {name for name in ("calibration", "test") if getattr(self, name).label is None}
        return self.model_dump(mode="json", exclude={name: {"label"} for name in plain})


class RecordConfig(Section):
    """What is recorded of every site."""

    tokens: Annotated[int, Field(ge=32)] = 4096
    """Sampled tokens per site whose signals are stored (the graphs are built on them)."""
    shard_sequences: Annotated[int, Field(ge=0)] = 0
    """Sequences per shard, the unit of work and of resumption; it does not depend on the workers. 0 means a 16th of
    the calibration sequences, but at least 8. Every shard stores N * N * 4 bytes of moments per layer of N neurons
    (15.5 GB for a 7B model); ``cria estimate`` says when larger shards are wise."""
    batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass."""
    dtype: RecordDtype = "auto"
    """Data type of stored signals; ``auto`` is the model's. float16 that overflows is an error, never silent."""
    schedule: Literal["auto", "replicate", "sweep", "pipeline", "tensor"] = "auto"
    """How the model is spread over the workers; ``auto`` decides by size, devices and memory, and prints why."""
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Memory one worker may use, in GB; default: what its device (or its share of the machine) has."""
    storage: str | None = None
    """Object store for the recording, ``s3://bucket/prefix``; default: the run folder."""

    def content_part(self) -> dict[str, Any]:
        """What the content of a recording depends on: not where it lies, nor how the model was spread."""
        return self.model_dump(exclude={"schedule", "memory_gb", "storage"})


class PruneConfig(Section):
    """How much is removed and how it is repaired."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share to remove; see ``budget`` for the share of what."""
    units: tuple[Unit, ...] = ("mlp",)
    """What goes: MLP neurons, ``attention`` heads (KV groups: heads of keys and values with all query heads that read
    them), and whole layers beside them (``layer``, by ``sensitivity``). Several share one budget."""
    budget: Literal["units", "parameters", "macs", "kv_cache"] = "units"
    """``units``: share of the neurons of every site, of the layers where whole layers go, or of the weights of every
    MLP map where single weights become zero. ``parameters``: share of all parameters of the dense model. ``macs``:
    share of all multiplications of one sequence (linear maps, head and full T x T attention). ``kv_cache``: share of
    the keys and values kept of a token."""
    multiple: Annotated[int, Field(ge=1)] = 8
    """Widths of MLPs are rounded down to a multiple of this (8 suits most kernels, 1 hits the ratio most closely)."""
    rounds: Annotated[int, Field(ge=1, le=64)] = 1
    """Record, analyse, decide, apply are repeated this often, each round with fresh scores on the smaller model."""
    repair: Repair = "least_squares"
    """What the surviving output weights do for the removed units; nothing where layers or single weights go."""
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Relative ridge of the least-squares repair (times the mean diagonal of the Gram matrix)."""
    allocation: Allocation = "uniform"
    """How the budget is spread over the layers. ``uniform``: the same share of each. ``global``: what scores least
    anywhere, in shares of its layer's sum, goes first. ``sensitivity``: the loss with each layer alone pruned to a few
    widths is measured on held-out calibration text, and the widths with the least sum are chosen. The last two never
    end worse than ``uniform`` on that text, and a checkpoint whose widths differ is loaded by
    ``cria_dist.load_pruned``, not by the stock class."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Least share of a layer's units that stays (``global`` and ``sensitivity``)."""
    protect: tuple[int, ...] = ()
    """Layers that are left alone, -1 is the last (``global`` and ``sensitivity``)."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a layer whose units are scored."""
        return tuple(sorted(unit for unit in self.units if unit != "layer"))

    @model_validator(mode="after")
    def _units_share_a_budget(self) -> Self:
        if not self.parts or len(set(self.units)) < len(self.units):
            raise ValueError(f"units={list(self.units)} must name mlp, attention or both, each once")
        if "layer" in self.units and self.allocation != "sensitivity":
            raise ValueError(
                f"units={list(self.units)} weighs whole layers against units by measured losses, and "
                f"allocation={self.allocation}; set prune.allocation=sensitivity, or take a method that removes layers"
            )
        if len(self.units) > 1 and self.budget in ("units", "kv_cache"):
            raise ValueError(
                f"units={list(self.units)} share a budget, and budget={self.budget} is of one kind of them; set "
                "prune.budget=parameters or macs"
            )
        if self.budget == "kv_cache" and self.units != ("attention",):
            raise ValueError(f"budget=kv_cache is spent on attention, and units={list(self.units)}; set attention")
        if self.repair == "bias" and "attention" in self.units:
            raise ValueError(
                f"repair=bias needs a bias in every output map, and units={list(self.units)} has attention, whose maps "
                "stay without; set prune.repair=least_squares"
            )
        return self

    @model_validator(mode="after")
    def _allocation_can_be_made(self) -> Self:
        if self.allocation == "uniform" and self.protect:
            raise ValueError(
                f"protect={list(self.protect)} needs widths that differ, and allocation=uniform gives every layer the "
                "same; set prune.allocation=global or sensitivity"
            )
        if self.allocation == "sensitivity" and self.rounds > 1:
            raise ValueError(
                f"allocation=sensitivity measures the dense model's layers, but rounds={self.rounds}; set "
                "prune.rounds=1 or prune.allocation=global"
            )
        return self

    def content_part(self) -> dict[str, Any]:
        """What a result depends on: how the budget may be spread only where it is not spread evenly."""
        unused = {"allocation", "floor", "protect"} if self.allocation == "uniform" else set[str]()
        return self.model_dump(mode="json", exclude=unused | ({"units"} if self.units == ("mlp",) else set()))


OFF = ("lora_rank", "checkpoint_activations", "patience")
"""Options of a recovery that are off unless asked for."""


class RecoverConfig(Section):
    """Recovery fine-tuning on the calibration text or examples (next tokens or labels, Ray Train, AdamW)."""

    steps: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps; 0 switches recovery off."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Data-parallel workers, of the methods that learn gates too."""
    batch_sequences: Annotated[int, Field(ge=1)] = 8
    """Sequences per optimiser step, over all workers; must be a multiple of ``workers``."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per training sequence; a classifier trains on whole examples."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate; linear warm-up over a tenth of the steps, then cosine to a tenth of the peak."""
    train: Literal["all", "blocks", "mlp"] = "blocks"
    """``blocks`` leaves embeddings and head frozen, ``mlp`` trains only the tensors that lost units. Trained parameters
    take 16 bytes each (weight, gradient, two moments), frozen ones 4."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of low-rank adapters that learn in place of the weights they are added to at the end (needs ``peft``); 0
    trains the weights themselves. A trained weight takes 16 bytes, one with an adapter 4 and little more."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16``: matrix products in it, weights and moments in float32 (automatic mixed precision)."""
    checkpoint_activations: bool = False
    """Keep only what enters each layer and compute the rest again in the backward pass: less memory, a third more
    work."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints, and between looks at the held-out loss."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many looks without a lower loss on held-out training sequences, a tenth of them, and keep the best
    weights; 0 trains all steps on all of them."""
    distill: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    """Weight of learning from the dense model: the loss is (1 - distill) * cross entropy + distill * temperature^2 *
    KL(dense || pruned). Every worker then holds the dense model too, in ``model.dtype``: 4 bytes a parameter, 2 in
    half precision; at 0 it is not loaded."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Both models' logits are divided by this before they are compared."""

    def content_part(self) -> dict[str, Any]:
        """What a result depends on: how the dense model teaches only where it does, and no option that is off."""
        off = {name for name in OFF if not getattr(self, name)} | ({"dtype"} if self.dtype == "float32" else set[str]())
        return self.model_dump(mode="json", exclude=off | (set[str]() if self.distill else {"distill", "temperature"}))


class EvaluateConfig(Section):
    """What is measured on each variant."""

    batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass."""
    latency_repeats: Annotated[int, Field(ge=0)] = 5
    """Timed repeats per variant, alternating between variants; 0 switches latency off."""
    prompts: tuple[str, ...] = (
        "Question: What is the capital of France?\nAnswer:",
        "In Python, a list comprehension is",
        "The water boiled, and she",
    )
    """Prompts for the example generations."""
    new_tokens: Annotated[int, Field(ge=1)] = 24
    """Tokens generated per prompt (greedy)."""


class RunSettings(Section):
    """Where and with what the run is carried out. Nothing here changes a result."""

    root: str = "runs"
    """Folder that holds the run folders."""
    folder: str | None = None
    """Run folder; default ``<root>/<name>-<hash8>``."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes for record, analyse and evaluate; 0 means one per CPU (or per GPU)."""
    pool: Literal["ray", "local"] = "ray"
    """``local`` runs everything in this process (tests, debugging)."""
    address: str | None = None
    """Ray cluster to join (``auto`` inside a job); default: a private cluster on this machine."""


class RunConfig(Section):
    """One run, from model and text to pruned checkpoint and report."""

    name: str = "run"
    """Name of the run; letters, digits, dot, dash and underscore."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of token sampling, of the random method and of the recovery's data order."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    record: RecordConfig = RecordConfig()
    method: Method = Conditional()
    prune: PruneConfig = PruneConfig()
    recover: RecoverConfig = RecoverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: tuple[Method, ...] = ()
    """Methods shown beside ``method`` in the report: same ratio, one shot, with and without repair."""
    run: RunSettings = RunSettings()

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError("a name starts with a letter or digit and has only letters, digits, '.', '_' and '-'")
        return name

    @field_validator("recover")
    @classmethod
    def _batch_divides(cls, recover: RecoverConfig) -> RecoverConfig:
        if recover.batch_sequences % recover.workers:
            raise ValueError(
                f"recover.batch_sequences={recover.batch_sequences} is not a multiple of "
                f"recover.workers={recover.workers}; choose a multiple"
            )
        return recover

    @property
    def records_hidden(self) -> bool:
        """Whether a method of this run reads the hidden states around the layers."""
        return any("hidden" in method.needs for method in (self.method, *self.compare))

    @property
    def training_workers(self) -> int:
        """Data-parallel workers this run needs: for its recovery, and for methods that learn gates; else none."""
        learns = any("gates" in method.needs for method in (self.method, *self.compare))
        return self.recover.workers if self.recover.steps or learns else 0

    def result_part(self) -> dict[str, Any]:
        """Everything that can change a result, as plain data: all but ``run`` and where and how is recorded."""
        tree = self.model_dump(mode="json", exclude={"run"})
        sections = {"data": self.data, "record": self.record, "prune": self.prune, "recover": self.recover}
        return {**tree, **{name: section.content_part() for name, section in sections.items()}}


class SweepConfig(Section):
    """What ``cria sweep`` tries: a run for every combination of the grid. Other verbs leave it alone."""

    grid: dict[str, Any] = {}
    """Keys of the run as on the command line, each with the list of its values: ``prune.ratio = [0.2, 0.3]``,
    ``method = [{ name = "conditional" }, { name = "random" }]``."""
    concurrency: Annotated[int, Field(ge=1)] = 1
    """Trials at the same time; they share ``run.workers`` evenly, and each recovery has ``recover.workers`` more."""

    @property
    def axes(self) -> dict[str, Any]:
        """Dotted key to its values."""
        return dict(_axes(self.grid, ""))

    @model_validator(mode="after")
    def _axes_are_lists(self) -> Self:
        for key, values in self.axes.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"sweep.grid.{key} is not a list of values; write {key} = [first, second]")
            if key.split(".")[0] in ("run", "sweep"):
                raise ValueError(f"sweep.grid.{key} changes no result; set {key} outside of the grid")
        return self


def _axes(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _axes(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
