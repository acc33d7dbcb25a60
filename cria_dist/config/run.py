"""One run as a whole: its parts, and where and with what it is carried out."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from cria_dist.config.inputs import DataConfig, ModelConfig, RecordConfig
from cria_dist.config.prune import PruneConfig
from cria_dist.config.recover import RecoverConfig
from cria_dist.config.section import Section
from cria_dist.methods import Conditional, Method

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class EvaluateConfig(Section):
    """What is measured on each variant."""

    batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass."""
    latency_repeats: Annotated[int, Field(ge=0)] = 5
    """Timed repeats per variant, alternating between variants; 0 switches latency off."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = (
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
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] | None = None
    """GPUs of a worker; default one if the cluster has any when the run starts. A cluster that grows on demand may have
    none by then: with 1 here, and ``workers``, the run asks for them and waits."""
    pool: Literal["ray", "local"] = "ray"
    """``local`` runs everything in this process (tests, debugging)."""
    address: str | None = None
    """Ray cluster to join (``auto`` inside a job); default: a private cluster on this machine."""
    vllm_python: str | None = None
    """Python of an environment that has vLLM, on every node: the run ends by loading its result there and comparing.
    Default: this environment's, if it has vLLM."""


class RunConfig(Section):
    """One run, from model and text to pruned checkpoint and report."""

    name: str = "run"
    """Name of the run; letters, digits, dot, dash and underscore."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
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
