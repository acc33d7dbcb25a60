"""What llama.cpp makes of each model family: its architecture, what it takes for granted, what it wants changed.

What is no entry here has no GGUF export. The facts are those of llama.cpp's ``src/models``, one file per architecture.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from cria_dist.models.gguf_layout import Layout

Operation = Callable[["Layout", str, torch.Tensor], torch.Tensor]
"""What becomes of a tensor on its way, given its name in the checkpoint."""
Describe = Callable[["Layout", "GGUFWriter"], None]
"""Adds hyperparameters."""
SUMMED, LOOKED_UP = 1e-4, 1e-3
"""Tolerances: llama.cpp adds up in another order (found: 4e-7 to 2e-6), and looks GELU up in a table of half precision
(found: 2e-4 to 8e-4, and 2e-6 to 3e-4 from torch's logits with the same table)."""
DEEP_GEMMA2, DEEP_GEMMA3 = 46, 62
"""Layers by which llama.cpp tells Gemma 27B, whose attention is scaled by another size."""


@dataclass(frozen=True, slots=True)
class Rules:
    """One family in llama.cpp.

    Attributes:
        architecture: ``general.architecture``.
        describes: what adds the hyperparameters that not all families have.
        computes: by keys of config.json, the one value that llama.cpp computes with, whatever a file says.
        operations: what is done with tensors, by the end of their names; the first one counts.
        dropped: ends of names of tensors that stay behind: masks that older checkpoints keep.
        rotations: kinds of rotary embedding that can be told.
        divides: those but the default go out as a tensor of divisors of the frequencies.
        slides: the window of sliding attention can be told; else the context ends with the window.
        whole_heads: the heads make up the hidden size.
        tolerance: of float32 logits, relative to the largest.
        problem: what else llama.cpp would compute differently, in words; None if nothing.
    """

    architecture: str
    describes: tuple[Describe, ...]
    computes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    operations: Mapping[str, Operation] = field(default_factory=dict[str, Operation])
    dropped: tuple[str, ...] = ()
    rotations: frozenset[str] = frozenset({"default"})
    divides: bool = False
    slides: bool = False
    whole_heads: bool = False
    tolerance: float = SUMMED
    problem: Callable[["Layout"], str | None] = lambda layout: None


def halves_to_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key map (or entries of its bias), so that value i of a head is beside i + size / 2.

    Args:
        tensor: [heads * size, ...].
        heads: heads it is of.
    """
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _paired(counts: str, layout: "Layout", name: str, tensor: torch.Tensor) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs of a head's values; transformers pairs its halves."""
    return halves_to_pairs(tensor, getattr(layout, counts)[int(name.split(".layers.", 1)[1].split(".", 1)[0])])


def _one_added(layout: "Layout", name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Gemma's norms multiply by their weight and one."""
    return tensor.float() + 1


def _scaled_norm(layout: "Layout", name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Gemma 3's norm of the queries, which carries the scale that llama.cpp does not ask for."""
    return (tensor.float() + 1) * math.sqrt(_assumed_scalar(layout, DEEP_GEMMA3) / layout.config.query_pre_attn_scalar)


def _transposed(layout: "Layout", name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T


def _assumed_scalar(layout: "Layout", deep: int) -> int:
    """What llama.cpp divides by the root of where Gemma has ``query_pre_attn_scalar``."""
    config = layout.config
    return config.hidden_size // layout.heads[0] if config.num_hidden_layers == deep else layout.head_size


def _gemma2_problem(layout: "Layout") -> str | None:
    config, assumed = layout.config, _assumed_scalar(layout, DEEP_GEMMA2)
    if config.query_pre_attn_scalar != assumed:
        return f"query_pre_attn_scalar={config.query_pre_attn_scalar}: llama.cpp scales attention by {assumed}"
    if not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "llama.cpp always caps the logits of Gemma 2, and of attention, and this model does not"
    return None


def _rms_norm(layout: "Layout", writer: "GGUFWriter") -> None:
    writer.add_layer_norm_rms_eps(layout.config.rms_norm_eps)


def _layer_norm(layout: "Layout", writer: "GGUFWriter") -> None:
    writer.add_layer_norm_eps(layout.config.layer_norm_epsilon)


def _rotation(layout: "Layout", writer: "GGUFWriter") -> None:
    writer.add_rope_freq_base(layout.rotation["rope_theta"])
    writer.add_rope_dimension_count(int(layout.head_size * layout.rotation.get("partial_rotary_factor", 1)))


def _two_rotations(layout: "Layout", writer: "GGUFWriter") -> None:
    """Sliding layers turn by frequencies of their own, which no scaling concerns."""
    import gguf

    _rotation(layout, writer)
    writer.add_rope_freq_base_swa(layout.config.rope_parameters["sliding_attention"]["rope_theta"])
    if layout.rotation["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(layout.rotation["factor"])


def _window(period: int, layout: "Layout", writer: "GGUFWriter") -> None:
    """Every last layer of a period attends to everything, unless they are told one by one."""
    slides = [kind == "sliding_attention" for kind in layout.config.layer_types]
    if any(slides):
        writer.add_sliding_window(layout.config.sliding_window)
    if any(slides) and slides != [(layer + 1) % period > 0 for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def _window_of_gemma2(layout: "Layout", writer: "GGUFWriter") -> None:
    """Half the layers have one in any case: where none slides, it is as long as the context."""
    if "sliding_attention" not in layout.config.layer_types:
        writer.add_sliding_window(layout.config.max_position_embeddings)
    _window(2, layout, writer)


def _caps(layout: "Layout", writer: "GGUFWriter") -> None:
    writer.add_attn_logit_softcapping(layout.config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(layout.config.final_logit_softcapping)


def _experts(layout: "Layout", writer: "GGUFWriter") -> None:
    writer.add_expert_count(layout.config.num_experts)
    writer.add_expert_used_count(layout.config.num_experts_per_tok)


def _expert_width(layout: "Layout", writer: "GGUFWriter") -> None:
    writer.add_expert_feed_forward_length(layout.config.moe_intermediate_size)


SILU, GELU = {"hidden_act": "silu"}, {"hidden_activation": "gelu_pytorch_tanh"}
UNBIASED = {"attention_bias": False}
PAIRS: Mapping[str, Operation] = {
    f"{letter}_proj.{kind}": functools.partial(_paired, counts)
    for letter, counts in (("q", "heads"), ("k", "groups"))
    for kind in ("weight", "bias")
}
BOTH = (_rms_norm, _rotation)
LLAMA = Rules("llama", BOTH, SILU, PAIRS, rotations=frozenset({"default", "linear", "llama3"}), divides=True)
LAYERED = Rules("deci", BOTH, SILU, PAIRS, rotations=LLAMA.rotations, divides=True)
"""llama.cpp's name for Nemotron-NAS: Llama with a feed-forward length and head counts per layer."""
AS_LAYERED = frozenset({"llama", "mistral", "qwen2"})
"""Families that are Llama to the bit: the same norms, SiLU, rotary embedding; biases are optional."""
FAMILIES: Mapping[str, Rules] = {
    "gemma2": Rules(
        "gemma2",
        (*BOTH, _caps, _window_of_gemma2),
        GELU | UNBIASED,
        {"norm.weight": _one_added},
        slides=True,
        tolerance=LOOKED_UP,
        problem=_gemma2_problem,
    ),
    "gemma3_text": Rules(
        "gemma3",
        (_rms_norm, _two_rotations, functools.partial(_window, 6)),
        GELU | UNBIASED | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"q_norm.weight": _scaled_norm, "norm.weight": _one_added},
        rotations=frozenset({"default", "linear"}),
        slides=True,
        tolerance=LOOKED_UP,
    ),
    "gpt2": Rules(
        "gpt2",
        (_layer_norm,),
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), _transposed),
        dropped=(".attn.bias", ".attn.masked_bias"),
        whole_heads=True,
        tolerance=LOOKED_UP,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": Rules("llama", (*BOTH, _experts), SILU, PAIRS, rotations=LLAMA.rotations, divides=True),
    "phi3": Rules("phi3", BOTH, SILU, whole_heads=True),
    "qwen2": Rules("qwen2", BOTH, SILU, whole_heads=True),
    "qwen3": Rules("qwen3", BOTH, SILU | UNBIASED),
    "qwen3_moe": Rules("qwen3moe", (*BOTH, _experts, _expert_width), SILU | UNBIASED | {"norm_topk_prob": True}),
}
"""By ``model_type``, where all layers are alike."""
