"""What llama.cpp calls things: the architecture of a checkpoint in GGUF, its hyperparameters, its tensors.

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
from cria_dist.models.mlp import ModelDict
from cria_dist.models.shapes import Stored

if TYPE_CHECKING:
    from gguf import GGUFWriter

LAYERED = "deci"
"""The architecture whose layers may differ."""
UNIFORM = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture by ``model_type`` where all layers are alike."""
AS_LAYERED = frozenset({"llama", "mistral", "qwen2"})
"""Families that are Llama to the bit: the same norms, SiLU, rotary embedding; biases are optional."""
PAIRED_ROTATION = frozenset({"llama", "deci"})
"""Architectures that rotate neighbouring pairs of a head's values; transformers pairs its halves."""
RESCALED_ROTATION = frozenset({"linear", "llama3"})
"""Kinds of rotary scaling that only divide frequencies: they go out as a tensor of divisors."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint as llama.cpp sees it.

    Attributes:
        architecture: ``general.architecture``.
        config: the parsed config.
        head_size: values per head.
        widths: feed-forward length of every layer.
        heads: query heads of every layer.
        groups: key-value heads of every layer.
    """

    architecture: str
    config: PretrainedConfig
    head_size: int
    widths: Sequence[int]
    heads: Sequence[int]
    groups: Sequence[int]

    def describe(self, writer: "GGUFWriter") -> None:
        """Add the hyperparameters."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(_context(config))
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(self.head_size)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_feed_forward_length(_one_or_all(self.widths))
        writer.add_head_count(_one_or_all(self.heads))
        writer.add_head_count_kv(_one_or_all(self.groups))

    def operation(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """What is done with a tensor of the checkpoint on its way: the rows of query and key maps change order."""
        module = name.rpartition(".")[0]
        counts = self.heads if module.endswith("q_proj") else self.groups if module.endswith("k_proj") else None
        if counts is None or self.architecture not in PAIRED_ROTATION:
            return lambda tensor: tensor
        heads = counts[int(name.split(".layers.", 1)[1].split(".", 1)[0])]
        return lambda tensor: halves_to_pairs(tensor, heads)

    def frequency_divisors(self) -> torch.Tensor | None:
        """Divisors [head_size / 2] of the rotary frequencies; None where they are the usual ones."""
        kind = self.config.rope_parameters["rope_type"]
        if kind == "default":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
        steps = torch.arange(0, self.head_size, 2, dtype=torch.float64) / self.head_size
        return (self.config.rope_parameters["rope_theta"] ** -steps / scaled.double()).float()


def layout_of(config: ModelDict, stored: Mapping[str, Stored]) -> Layout:
    """How a checkpoint goes out.

    Args:
        config: its config.json.
        stored: its tensors; widths and head counts are taken from these.

    Raises:
        ConfigError: llama.cpp has no architecture for it; the message says why.
    """
    family, parsed = str(config["model_type"]), AutoConfig.for_model(**config)
    if family not in UNIFORM:
        raise ConfigError(f"model family {family!r} has no GGUF export; there is one for {', '.join(sorted(UNIFORM))}")
    size = int(getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads)
    layers = [f"model.layers.{layer}" for layer in range(parsed.num_hidden_layers)]
    widths = [stored[f"{layer}.mlp.gate_proj.weight"].shape[0] for layer in layers]
    heads = [stored[f"{layer}.self_attn.q_proj.weight"].shape[0] // size for layer in layers]
    groups = [stored[f"{layer}.self_attn.k_proj.weight"].shape[0] // size for layer in layers]
    alike = len(set(widths)) == len(set(heads)) == len(set(groups)) == 1
    if not alike and family not in AS_LAYERED:
        raise ConfigError(
            f"llama.cpp reads one MLP width and one head count per model for {family!r}; "
            "export it with prune.allocation=uniform, or load it with cria_dist.load_pruned"
        )
    layout = Layout(UNIFORM[family] if alike else LAYERED, parsed, size, widths, heads, groups)
    _check_numerics(layout, config)
    return layout


def _check_numerics(layout: Layout, config: ModelDict) -> None:
    """Refuse what llama.cpp would read and compute differently."""
    kind = layout.config.rope_parameters["rope_type"]
    allowed = RESCALED_ROTATION if layout.architecture in PAIRED_ROTATION else frozenset[str]()
    if kind != "default" and kind not in allowed:
        raise ConfigError(f"rotary embedding of type {kind!r} has no GGUF export for {layout.architecture!r}")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act={config['hidden_act']!r}: llama.cpp computes SiLU for {layout.architecture!r}")
    biased = config.get("attention_bias") or config["model_type"] == "qwen2"
    if biased and layout.architecture == LAYERED:
        odd = [heads for heads in layout.heads if heads * layout.head_size != layout.config.hidden_size]
        if odd:
            raise ConfigError(
                f"{odd[0]} query heads of {layout.head_size} values with biases in a model of hidden size "
                f"{layout.config.hidden_size}: llama.cpp's {LAYERED!r} has biases of the hidden size only"
            )


def halves_to_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key map (or entries of its bias), so that value i of a head is beside i + size / 2.

    Args:
        tensor: [heads * size, ...].
        heads: heads it is of.
    """
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def tensor_names(layout: Layout, names: Sequence[str]) -> Mapping[str, str]:
    """What GGUF calls the tensors of a checkpoint, in the checkpoint's order.

    Raises:
        ConfigError: the architecture does not have one of them.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    known = gguf.get_tensor_name_map(architecture, layout.config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    for name, called in found.items():
        if called is None:
            raise ConfigError(f"tensor {name} has no place in llama.cpp's architecture {layout.architecture!r}")
    return {name: called for name, called in found.items() if called is not None}


def _one_or_all(values: Sequence[int]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)


def _context(config: PretrainedConfig) -> int:
    """Tokens of context: within the sliding window, for llama.cpp attends to everything."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)
