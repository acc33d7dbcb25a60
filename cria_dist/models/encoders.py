"""Encoders that classify sentences, under the module names of BERT."""

from dataclasses import dataclass
from typing import Any, ClassVar

from cria_dist.models.mlp import PART, MlpFamily, ModelDict, SiteModules
from cria_dist.records import Site


@dataclass(frozen=True, slots=True)
class EncoderMlpFamily(MlpFamily):
    """Sentence classifiers with ``output.dense(act(intermediate.dense(x)))``; all maps have biases."""

    takes = "sentences"
    positions_before: ClassVar[int] = 0
    """Rows of the position embedding that no token gets."""

    def modules(self, site: Site) -> SiteModules:
        """Where the site's signals are observed."""
        prefix = f"{self.layers}.{site.layer}"
        return SiteModules({"input": f"{prefix}.intermediate.dense"}, f"{prefix}.output.dense", ("input",))

    def has_bias(self, config: ModelDict, part: str = PART) -> bool:
        """They do."""
        return True

    def input_shape(self, config: ModelDict, sequence_length: int) -> tuple[int, ...]:
        """Of the longest sentence."""
        return (sequence_length,)

    def positions(self, config: ModelDict, sequence_length: int) -> int:
        """Of the longest sentence."""
        return sequence_length

    def longest(self, config: ModelDict) -> int:
        """Most tokens the model has positions for."""
        return int(config["max_position_embeddings"]) - self.positions_before

    def _with_biases(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class BertFamily(EncoderMlpFamily):
    """BERT, and what has its architecture (MiniLM)."""

    layers = "bert.encoder.layer"
    embedding = "bert.embeddings"


@dataclass(frozen=True, slots=True)
class RobertaFamily(EncoderMlpFamily):
    """RoBERTa, which numbers the first token after its padding token, 1."""

    layers = "roberta.encoder.layer"
    embedding = "roberta.embeddings"
    positions_before = 2
