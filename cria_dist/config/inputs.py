"""What goes in: the network, the data, and what is recorded of them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cria_dist.config.section import Section

RecordDtype = Literal["auto", "float32", "float16", "bfloat16"]


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
    """A local ``.txt``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, a hub data set name, a local folder of images or of
    a data set, or ``builtin:pydoc``."""
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
    the calibration sequences, but at least 8. Every shard stores a little more than N * N * 2 bytes of moments per
    layer of N neurons (8.1 GB for a 7B model); ``cria estimate`` says when larger shards are wise."""
    batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass."""
    dtype: RecordDtype = "auto"
    """Data type of stored signals; ``auto`` is the model's. float16 that overflows is an error, never silent."""
    schedule: Literal["auto", "replicate", "sweep", "pipeline", "tensor"] = "auto"
    """How the model is spread over the workers; ``auto`` decides by size, devices and memory, and prints why. It never
    takes ``tensor``, which agrees with the others to 1e-6 only: a result would depend on the number of workers."""
    memory_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Memory one worker may use, in GB; default: what its device (or its share of the machine) has."""
    storage: str | None = None
    """Object store for the recording, ``s3://bucket/prefix``; default: the run folder."""

    def content_part(self) -> dict[str, Any]:
        """What the content of a recording depends on: not where it lies, nor how the model was spread."""
        return self.model_dump(exclude={"schedule", "memory_gb", "storage"})
