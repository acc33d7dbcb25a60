"""Tensor parallelism: several processes share every layer, each with its own MLP units and attention heads.

The sharding is that of ``transformers``: rank r of R holds units ``[r N / R, (r + 1) N / R)`` of every MLP, and what a
hook sees there is a plain local tensor of these units. Shapes: S sequences, T tokens, D hidden, N units.
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import Block
from cria_dist.models.family import family_of
from cria_dist.models.mlp import MlpFamily, ModelDict, layers_differ
from cria_dist.models.ranks import Ranks

SLICED = ("colwise", "rowwise")
"""How ``transformers`` shares a map whose units stay where they are computed."""


def tensor_ranks_problem(model_config: ModelDict, ranks: int) -> str | None:
    """Why a model cannot be shared by so many ranks, and how many can share it.

    ``transformers`` cuts the projections of keys and values by heads and never repeats a head: more ranks than
    key-value heads fail in the first layer, and so do uneven MLP slices.

    Args:
        model_config: the checkpoint's config.json.
        ranks: processes that are to share every layer.

    Returns:
        Rule and remedy for a ConfigError, or None if they can.
    """
    family = family_of(model_config)
    settings: Any = AutoConfig.for_model(**model_config)
    plan: ModelDict = getattr(settings, "base_model_tp_plan", None) or {}
    if family.takes != "tokens" or not plan:
        return f"transformers has no plan to share the layers of {family.model_type!r}; take record.schedule=sweep"
    whole = [name for name in family.mlp_maps if plan.get(f"layers.*.{name}") not in SLICED]
    if whole:
        return (
            f"transformers gathers what {' and '.join(whole)} of {family.model_type!r} give, so no rank sees its own "
            "units alone; take record.schedule=sweep"
        )
    if layers_differ(model_config):
        return "transformers cannot share layers of different widths; take record.schedule=sweep"
    heads = int(settings.num_attention_heads)
    counts = [(heads, "attention heads"), (int(getattr(settings, "num_key_value_heads", None) or heads), "KV heads")]
    counts += [(width, "MLP units") for width in sorted(set(family.widths(model_config).values()))]
    uneven = [f"{count} {name}" for count, name in counts if count % ranks]
    if not uneven:
        return None
    common = math.gcd(*(count for count, _ in counts))
    legal = " or ".join(str(number) for number in range(1, common + 1) if common % number == 0)
    return f"{ranks} ranks cannot share {', '.join(uneven)} evenly; set run.workers={legal}, or record.schedule=auto"


class TensorParallelModel:
    """The decoder of a checkpoint with every layer shared by the ranks; the interface of ``BlockModel``.

    Args:
        directory: the checkpoint.
        numerics: how it computes.
        family: its adapter.
        block: all its layers.
        ranks: the processes that share it.

    Raises:
        ConfigError: they cannot share this model, or the block is not all of it.
    """

    def __init__(
        self, directory: Path, numerics: checkpoint.Numerics, family: MlpFamily, block: Block, ranks: Ranks
    ) -> None:
        problem = tensor_ranks_problem(checkpoint.read_config(directory), ranks.size)
        if problem is None and not (block.is_first and block.is_last):
            problem = f"the ranks share all {block.total} layers at once, not {block}; use record.schedule=sweep"
        if problem is not None:
            raise ConfigError(f"record.schedule=tensor: {problem}")
        transformers_logging.disable_progress_bar()  # the run has its own
        torch.set_float32_matmul_precision(numerics.matmul)
        self.block = block
        self._whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, numerics.dtype),
            distributed_config=DistributedConfig(tp_size=ranks.size),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        ).eval()
        self.device = self._whole.device
        self._decoder = cast(PreTrainedModel, getattr(self._whole, self._whole.base_model_prefix))
        self._hidden: list[torch.Tensor] = []
        layers = cast(torch.nn.ModuleList, self._whole.get_submodule(family.layers))
        layers[-1].register_forward_hook(_keeper(self._hidden))

    def module(self, name: str) -> torch.nn.Module:
        """A submodule, by its name in the whole model."""
        return self._whole.get_submodule(name)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Run the model; a collective call.

        Args:
            values: token ids [S, T], the same on all ranks.

        Returns:
            Hidden states after the last layer (before the final norm), [S, T, D], the same on all ranks.
        """
        with torch.inference_mode():
            self._decoder(input_ids=values.to(self.device, torch.int64), use_cache=False)
        return self._hidden.pop()


def _keeper(hidden: list[torch.Tensor]) -> Any:
    """A hook that keeps what a layer returns; it does not know the model, so that dropping the model frees it."""

    def hook(_module: torch.nn.Module, _args: object, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    return hook
