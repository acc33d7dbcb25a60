"""The model a recovery trains: which parameters learn, themselves or through low-rank adapters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.errors import ConfigError
from cria_dist.models.experts import taken_apart
from cria_dist.models.family import family_of
from cria_dist.models.macs import MAPS
from cria_dist.stages.recover_slices import Part, add, expert_maps

ALPHA = 2.0
"""Weight of an adapter, over its rank's part of the initial scale: that of the peft library's ``lora_alpha = 2 r``."""


@dataclass(frozen=True, slots=True)
class Learning:
    """What of a model learns.

    Attributes:
        config: the recipe.
        parts: parts of a layer that lost units.
        seed: of the adapters.
    """

    config: RecoverConfig
    parts: tuple[str, ...]
    seed: int

    def prepare(self, model: PreTrainedModel) -> None:
        """Freeze what does not learn; the model may have no weights yet."""
        for parameter in self._frozen(model):
            parameter.requires_grad_(False)
        if self.config.checkpoint_activations:
            keep_few_activations(model)

    def _frozen(self, model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
        """Embeddings under ``blocks``, all that kept its shape under ``mlp``."""
        if self.config.train == "blocks":
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                if module is not None:
                    yield from module.parameters()
        if self.config.train == "mlp":
            shape = model.config.to_dict()
            family = family_of(shape)
            sites = family.widths(shape, self.parts)
            trained = {name for site in sites for name in family.coupled_tensors(site, shape)}
            stored = stored_names(model)
            yield from (parameter for name, parameter in model.named_parameters() if stored[name] not in trained)

    def adapt(self, model: PreTrainedModel) -> None:
        """LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on every linear map whose weight would learn.

        Where the weights are shared out, the adapters are not: every worker has them whole, for they are small.

        Raises:
            ConfigError: peft is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ConfigError("recover.lora_rank needs peft; pip install 'cria-dist[lora]'") from error
        family = family_of(model.config.to_dict())
        maps = [
            name
            for name, module in model.named_modules()
            if isinstance(module, MAPS) and module.weight.requires_grad and name.startswith(f"{family.layers}.")
        ]
        rank = self.config.lora_rank
        adapters = LoraConfig(
            r=rank,
            lora_alpha=round(ALPHA * rank),
            lora_dropout=0.0,
            target_modules=maps,
            fan_in_fan_out=family.transposed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # the same adapters on every worker
            inject_adapter_in_model(adapters, model)


def keep_few_activations(model: PreTrainedModel) -> None:
    """Compute every layer's activations again in the backward pass; dropout, which comes with training, is off."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """What checkpoints call the tensors of a model, by their names in memory."""
    family = family_of(model.config.to_dict())
    return {name: family.on_disk(name) for name in model.state_dict()}


def merged_state(model: PreTrainedModel) -> dict[str, Part]:
    """The tensors of a checkpoint, by their names in it: adapters are added to the weights they stand in front of."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            adapted: Any = module  # peft's, which has no types
            add(adapted.get_base_layer().weight.detach(), adapted.get_delta_weight(*adapted.active_adapters).detach())
    family, state = family_of(model.config.to_dict()), dict[str, Part]()
    for key, tensor in model.state_dict().items():
        if ".lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")
        pieces = family.pieces(name, tensor.shape)
        if not pieces:
            state[family.on_disk(name)] = tensor
        elif isinstance(tensor, DTensor):
            state |= expert_maps(pieces, tensor)
        else:
            state |= taken_apart(pieces, tensor)
    return state
