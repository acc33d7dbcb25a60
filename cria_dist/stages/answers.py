"""What a model makes of a little input: by this every loader's reading of a checkpoint is judged.

Always on the CPU and in float32: it is the weights that are compared, and two kernels differ in half precision by more
than a wrong weight does (5e-3 of the largest logit in bfloat16, on one machine).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cria_dist.models import checkpoint
from cria_dist.models.shapes import stored_tensors
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.examples import model_inputs

DTYPES = {"BF16": "bfloat16", "F16": "float16"}


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
    dtypes = {tensor.dtype for tensor in stored_tensors(variant.model_dir).values()}
    stored = DTYPES.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"
    model = variant.load(checkpoint.Numerics(stored), {"": "cpu"})
    return answer_of(model.float(), tokens_path)
