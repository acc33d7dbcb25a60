"""How the pruned model is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cria_dist.config.section import Section

OFF = (
    "lora_rank",
    "checkpoint_activations",
    "patience",
    "distill_hidden",
    "distill_layers",
    "shift_pixels",
    "mirror",
)
"""Options of a recovery that are off unless asked for."""


class RecoverConfig(Section):
    """Recovery fine-tuning on the calibration text or examples (next tokens or labels, Ray Train, AdamW)."""

    steps: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps; 0 switches recovery off."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Data-parallel workers, of the methods that learn gates too. An interrupted recovery goes on with any number of
    them: that changes rounding only, and is no part of what a run is named by."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """``ddp``: every worker holds the whole model. ``fsdp2``: they share out weights, gradients, moments and the dense
    model they learn from, for models larger than one of them."""
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
    half precision (where: see ``teacher``); at 0 it is not loaded, unless ``distill_hidden`` wants it."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Both models' logits are divided by this before they are compared."""
    distill_hidden: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the hidden states' distance from the dense model's, which is added to the loss: squared, relative to
    the dense one's norm, a mean over tokens and layers. Language models only."""
    distill_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers of the dense model behind which hidden states are compared; all that are left if none is named."""
    teacher: Literal["beside", "cpu"] = "beside"
    """Where the dense model lies that is learned from: ``beside`` the pruned one, or in ``cpu`` memory, from where each
    of its maps comes to the GPU to compute (under ``fsdp2`` each layer, every worker its slices) and then leaves it;
    the output head stays. Without GPUs both are the same. Where it lies changes no result."""
    teacher_gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of its own for the dense model, beside each worker's one: it is spread over them, layer by layer. Under
    ``ddp`` only; classifiers are small and take one."""

    shift_pixels: Annotated[int, Field(ge=0)] = 0
    """Every training image is shifted at random by up to so many pixels along each axis; 4 is usual for CIFAR-10."""
    mirror: bool = False
    """Every other training image, at random, is mirrored left to right."""

    def content_part(self) -> dict[str, Any]:
        """What a result depends on: how the dense model teaches only where it does, no option that is off, no place."""
        off = {"workers", "teacher", "teacher_gpus", *(name for name in OFF if not getattr(self, name))}
        off |= {"dtype"} if self.dtype == "float32" else set[str]()
        off |= set[str]() if self.distill else {"distill", "temperature"}
        off |= set[str]() if self.distill_hidden else {"distill_layers"}
        off |= {"strategy"} if self.strategy == "ddp" else set[str]()
        return self.model_dump(mode="json", exclude=off)

    @property
    def distills(self) -> bool:
        """Whether the dense model teaches."""
        return self.distill > 0 or self.distill_hidden > 0

    @property
    def gpus_per_worker(self) -> int:
        """GPUs of a training worker, where workers have any."""
        return 1 + self.teacher_gpus * bool(self.steps and self.distills)
