"""A classifier of sentences or images as one ONNX file, for any number of examples, and sentences of any length."""

import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cria_dist.errors import ConfigError, DataError
from cria_dist.files import write_with
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.gguf_file import INSTALL
from cria_dist.models.mlp import ModelDict

NEEDED = ("onnx", "onnxruntime", "onnxscript")
ONE_FILE_BYTES = 1_900_000_000
"""A larger model does not fit the format's one file."""
TOLERANCE = 1e-4
"""Of onnxruntime's logits, relative to the largest."""


class Logits(torch.nn.Module):
    """A model that takes its inputs by place and gives its logits alone."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits [S, C] of S examples."""
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def write_onnx(directory: Path, target: Path) -> float:
    """Write a checkpoint as ONNX in float32, and let onnxruntime compute what the checkpoint computes.

    Args:
        directory: the checkpoint.
        target: the file.

    Returns:
        The largest difference of onnxruntime's logits, relative to the largest logit.

    Raises:
        ConfigError: a package is missing, or the model writes text, or is too large.
        DataError: onnxruntime computes something else.
    """
    config = checkpoint.read_config(directory)
    if family_of(config).takes == "tokens":
        raise ConfigError("models that write text have no ONNX export; export gguf")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the ONNX export needs {', '.join(missing)}, which is not installed; {INSTALL}")
    model = checkpoint.from_pretrained(directory, dtype=torch.float32)
    if sum(parameter.nbytes for parameter in model.parameters()) > ONE_FILE_BYTES:
        raise ConfigError(
            f"the model has more than {ONE_FILE_BYTES / 1e9:.1f} GB in float32, too many for an ONNX file"
        )
    inputs = example(config, 2, 9)
    write_with(
        target, lambda temporary: _write(model, inputs, int(config.get("max_position_embeddings", 0)), temporary)
    )
    difference = _difference(model, example(config, 3, 5), target)
    if not difference <= TOLERANCE:
        target.unlink()
        raise DataError(f"onnxruntime's logits differ by {difference:.1e} of the largest; nothing was written")
    return difference


def example(config: ModelDict, count: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of the model's shapes, random but always the same; every other sentence ends early."""
    generator = torch.Generator().manual_seed(0)
    family = family_of(config)
    if family.takes == "images":
        return {"pixel_values": torch.randn(count, *family.input_shape(config, 0), generator=generator)}
    ids = torch.randint(5, int(config["vocab_size"]), (count, length), generator=generator)
    there = torch.ones_like(ids)
    there[1::2, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": there}
    return inputs | ({"token_type_ids": torch.zeros_like(ids)} if int(config.get("type_vocab_size", 1)) > 1 else {})


def _write(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], positions: int, path: Path) -> None:
    names = tuple(inputs)
    axes = {0: torch.export.Dim("examples", min=1)}
    if "input_ids" in inputs:
        axes[1] = torch.export.Dim("tokens", min=2, max=positions - 2)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, for nothing we have
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own insides
        program = torch.onnx.export(
            Logits(model, names).eval(),
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=(tuple(axes for _ in names),),
            input_names=names,
            output_names=["logits"],
            verbose=False,
        )
        if program is None:
            raise TypeError("the exporter gave no program")
        program.save(path, external_data=False)


def _difference(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        ours = model(**inputs).logits.numpy()
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())
