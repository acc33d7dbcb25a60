"""What a model makes of a little input: by this every loader's reading of a checkpoint is judged.

Always on the CPU and in float32: it is the weights that are compared, and two kernels differ in half precision by more
than a wrong weight does (5e-3 of the largest logit in bfloat16, on one machine).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from cria_dist.models import checkpoint
from cria_dist.models.shapes import Stored, stored_tensors
from cria_dist.models.stored import StoredTensors
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.examples import model_inputs
from cria_dist.stages.footprint import itemsize
from cria_dist.stages.memory import SHARE, container_free

DTYPES = {"BF16": "bfloat16", "F16": "float16"}
FLOAT32 = 4
"""Bytes of a number."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Inputs and what a model answers.

    Attributes:
        inputs: keyword arguments of the model, for one sequence of at most 64 tokens, or one example.
        logits: float32, [1, T, V] of T tokens or [1, C] of classes.
    """

    inputs: Mapping[str, torch.Tensor]
    logits: np.ndarray

    @property
    def tokens_T(self) -> np.ndarray:
        """The tokens of a language model."""
        return self.inputs["input_ids"][0].numpy()


def answer_of(model: torch.nn.Module, tokens_path: Path) -> Answer:
    """Ask a model on the CPU, in float32.

    Args:
        model: the model.
        tokens_path: test tokens, of which the first 64 of the first sequence are used, or examples (the first one).
    """
    inputs = model_inputs(np.load(tokens_path, mmap_mode="r", allow_pickle=False)[:1, :64])
    with torch.inference_mode():
        return Answer(inputs, model(**inputs).logits.numpy())


def answer_of_variant(variant: Variant, tokens_path: Path) -> Answer:
    """Ask a variant, made in the data type its checkpoint is stored in: its weights are then those of the file."""
    model = variant.load(checkpoint.Numerics(_dtype(stored_tensors(variant.model_dir).values())), {"": "cpu"})
    return answer_of(model.float(), tokens_path)


def bytes_to_compare(directory: Path, reference: Variant) -> int:
    """Main memory at the peak of comparing a checkpoint with its reference, beside what the bare process takes.

    First the reference is there in its data type, with the tensors that pruning changed beside the dense ones; then
    what is left of it in float32, and after it the fresh process's, which is as large.

    Args:
        directory: the checkpoint.
        reference: what it must equal.
    """
    dense, ours = stored_tensors(reference.model_dir), stored_tensors(directory)
    replaced = StoredTensors(sorted(reference.repair_dir.glob("*.safetensors"))) if reference.repair_dir else {}
    new = [one for name, one in ours.items() if name in replaced or name not in dense or dense[name].shape != one.shape]
    loaded = itemsize(_dtype(dense.values())) * (_count(dense.values()) + _count(new))
    return max(loaded, FLOAT32 * _count(ours.values()))


def usable_bytes() -> int:
    """Main memory of this machine that may be taken now."""
    return int(SHARE * min(psutil.virtual_memory().available, container_free()))


def _dtype(tensors: Iterable[Stored]) -> str:
    """The data type they are loaded in: their own where they agree."""
    dtypes = {tensor.dtype for tensor in tensors}
    return DTYPES.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"


def _count(tensors: Iterable[Stored]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)
