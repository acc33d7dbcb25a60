"""A checkpoint as llama.cpp sees it: the architecture, the hyperparameters, what becomes of a tensor.

llama.cpp reads one width per model for most architectures. ``deci`` (its name for Nemotron-NAS) is Llama with a
feed-forward length and head counts per layer, so that is what a Llama becomes whose layers differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cria_dist.errors import ConfigError
from cria_dist.models.attention import attention_shape
from cria_dist.models.family import family_of
from cria_dist.models.gguf_families import AS_LAYERED, FAMILIES, LAYERED, Rules
from cria_dist.models.mlp import ModelDict
from cria_dist.records import Site

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint as llama.cpp sees it.

    Attributes:
        rules: what it makes of the family.
        config: the parsed config.
        head_size: values per head.
        widths: feed-forward length of every layer.
        heads: query heads of every layer.
        groups: key-value heads of every layer.
    """

    rules: Rules
    config: PretrainedConfig
    head_size: int
    widths: Sequence[int]
    heads: Sequence[int]
    groups: Sequence[int]

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return self.rules.architecture

    @property
    def rotation(self) -> Mapping[str, Any]:
        """What the config says of the rotary embedding, of layers that attend to everything; nothing without one."""
        told: Mapping[str, Any] = getattr(self.config, "rope_parameters", None) or {"rope_type": "default"}
        return told.get("full_attention", told)

    def describe(self, writer: "GGUFWriter") -> None:
        """Add the hyperparameters."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self._context())
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        for describe in self.rules.describes:
            describe(self, writer)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_feed_forward_length(_one_or_all(self.widths))
        writer.add_head_count(_one_or_all(self.heads))
        writer.add_head_count_kv(_one_or_all(self.groups))

    def operation(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """What is done with a tensor of the checkpoint on its way."""
        for end, operation in self.rules.operations.items():
            if name.endswith(end):
                return lambda tensor: operation(self, name, tensor)
        return lambda tensor: tensor

    def frequency_divisors(self) -> torch.Tensor | None:
        """Divisors [head_size / 2] of the rotary frequencies; None where they are not told so."""
        kind = self.rotation["rope_type"]
        if kind == "default" or not self.rules.divides:
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
        steps = torch.arange(0, self.head_size, 2, dtype=torch.float64) / self.head_size
        return (self.rotation["rope_theta"] ** -steps / scaled.double()).float()

    def _context(self) -> int:
        """Tokens of context: within the sliding window, where llama.cpp attends to everything."""
        longest, window = self.config.max_position_embeddings, getattr(self.config, "sliding_window", None)
        slides = window and getattr(self.config, "use_sliding_window", True) and not self.rules.slides
        return min(longest, window) if slides else longest


def layout_of(config: ModelDict) -> Layout:
    """How a checkpoint goes out.

    Args:
        config: its config.json.

    Raises:
        ConfigError: llama.cpp has no architecture for it; the message says why.
    """
    family, parsed = str(config["model_type"]), AutoConfig.for_model(**config)
    if family not in FAMILIES:
        raise ConfigError(f"model family {family!r} has no GGUF export; there is one for {', '.join(sorted(FAMILIES))}")
    shape, neurons = attention_shape({**parsed.to_dict(), **config}), family_of(config).widths(config)
    usual = int(getattr(parsed, "intermediate_size", 0))  # of a mixture's plain MLPs, or its experts
    widths = [neurons.get(Site(layer), usual) for layer in range(parsed.num_hidden_layers)]
    heads = [groups * shape.queries for groups in shape.groups]
    alike = len(set(widths)) == len(set(heads)) == 1
    if not alike and family not in AS_LAYERED:
        raise ConfigError(
            f"llama.cpp reads one MLP width and one head count per model for {family!r}; "
            "export it with prune.allocation=uniform, or load it with cria_dist.load_pruned"
        )
    layout = Layout(FAMILIES[family] if alike else LAYERED, parsed, shape.head_dim, widths, heads, list(shape.groups))
    _check_numerics(layout, config)
    return layout


def _check_numerics(layout: Layout, config: ModelDict) -> None:
    """Refuse what llama.cpp would read and compute differently."""
    rules, architecture, hidden = layout.rules, layout.architecture, layout.config.hidden_size
    kind, odd = layout.rotation["rope_type"], [one for one in layout.heads if one * layout.head_size != hidden]
    if kind not in rules.rotations:
        raise ConfigError(f"rotary embedding of type {kind!r} has no GGUF export for {architecture!r}")
    for key, computed in rules.computes.items():
        if (value := getattr(layout.config, key, computed)) != computed:
            raise ConfigError(f"{key}={value!r}: llama.cpp computes {computed!r} for {architecture!r}")
    biased = config.get("attention_bias") or config["model_type"] == "qwen2"
    if odd and biased and rules is LAYERED:
        raise ConfigError(
            f"{odd[0]} query heads of {layout.head_size} values with biases in a model of hidden size {hidden}: "
            f"llama.cpp's {architecture!r} has biases of the hidden size only"
        )
    if odd and rules.whole_heads:
        raise ConfigError(
            f"{odd[0]} query heads of {layout.head_size} values in a model of hidden size {hidden}: llama.cpp's "
            f"{architecture!r} has heads that make up the hidden size"
        )
    if problem := rules.problem(layout):
        raise ConfigError(problem)


def _one_or_all(values: Sequence[int]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)
