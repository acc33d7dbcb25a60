"""Encoders that classify sentences: BERT, RoBERTa, DistilBERT."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cria_dist.models import attention
from cria_dist.models.mlp import PART, MlpFamily, ModelDict
from cria_dist.models.names import damaged


@dataclass(frozen=True, slots=True)
class EncoderMlpFamily(MlpFamily):
    """Sentence classifiers under the module names of BERT; all maps have biases, heads are their own KV groups."""

    takes = "sentences"
    parts = (attention.PART, PART)
    attention_maps = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    )
    mlp_maps = ("intermediate.dense", "output.dense")
    joins: ClassVar[Mapping[str, str]] = {attention.PART: "attention.output.LayerNorm", PART: "output.LayerNorm"}
    positions_before: ClassVar[int] = 0
    """Rows of the position embedding that no token gets."""

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
        """Most tokens the model has positions for.

        Raises:
            ConfigError: the config does not say it.
        """
        if "max_position_embeddings" not in config:
            raise damaged("it has no 'max_position_embeddings'")
        return int(config["max_position_embeddings"]) - self.positions_before


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


@dataclass(frozen=True, slots=True)
class DistilBertFamily(EncoderMlpFamily):
    """DistilBERT."""

    layers = "distilbert.transformer.layer"
    embedding = "distilbert.embeddings"
    width_key = "hidden_dim"
    attention_maps = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin")
    mlp_maps = ("ffn.lin1", "ffn.lin2")
    joins: ClassVar[Mapping[str, str]] = {attention.PART: "sa_layer_norm", PART: "output_layer_norm"}
