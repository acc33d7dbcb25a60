"""Checkpoints on disk: describe, read tensors, load. Safetensors only, no remote code."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from cria_dist.errors import ConfigError, DataError
from cria_dist.files import digest, safe_name
from cria_dist.models.decilm import from_blocks
from cria_dist.models.device import own_device
from cria_dist.models.family import family_of
from cria_dist.models.mlp import ModelDict, Takes, layers_differ
from cria_dist.models.names import parsed, shared_names
from cria_dist.models.widths import resize_layers, resizing_class

WEIGHTS = "model.safetensors"
PLAN = "plan.json"
"""How a checkpoint of ours came about; a checkpoint made of it gets its own."""
INDEX = "model.safetensors.index.json"
SAMPLE_BYTES = 1 << 20
CLASSES: Mapping[Takes, Any] = {
    "tokens": AutoModelForCausalLM,
    "sentences": AutoModelForSequenceClassification,
    "images": AutoModelForImageClassification,
}
"""Stock classes, by what the model takes."""


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json, with shared names; of a DeciLM checkpoint, what it says of the Llama that it is.

    Raises:
        ConfigError: it is not JSON, or does not say of what model it is.
    """
    config = _read_object(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise damaged(directory / "config.json", "it names no model_type")
    return shared_names(from_blocks(config))


def weight_files(directory: Path) -> dict[str, list[str]]:
    """Tensor names per safetensors file, in file order.

    Raises:
        ConfigError: the index names a file that is not beside it (results are written under the same names), or it or
            the one file is damaged.
    """
    if (directory / INDEX).is_file():
        index = _read_object(directory / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise damaged(directory / INDEX, "it has no weight_map")
        files: dict[str, list[str]] = {}
        for name, file in sorted(index.items()):
            files.setdefault(safe_name(str(file)), []).append(name)
        return dict(sorted(files.items()))
    with opened(directory / WEIGHTS) as handle:
        return {WEIGHTS: list(handle.keys())}


@contextmanager
def opened(path: Path) -> Generator[Any]:
    """A weight file; nothing but its header is read before it is asked for.

    Raises:
        ConfigError: it is damaged, or lacks a tensor that is asked for.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise damaged(path, error) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise damaged(path, f"it holds a {type(found).__name__}, not an object")
    return found


def damaged(path: Path, reason: object) -> ConfigError:
    """The error for a file of a model that cannot be what was saved."""
    return ConfigError(f"{path} is damaged ({reason}); take a whole copy of the model")


def fingerprint(directory: Path) -> str:
    """Digest of config.json and, per weight file, its size, its first, middle and last MiB.

    Hashing all of a 70B checkpoint would take minutes. Numbers edited elsewhere, at the same size, go unnoticed: what
    was recorded and scored before is then taken for that of the edited weights. Any change of config.json tells them
    apart. Times and inodes would not do: the same bytes must have the same digest on every machine.
    """
    parts: list[object] = [(directory / "config.json").read_bytes()]
    for file in weight_files(directory):
        size = (directory / file).stat().st_size
        parts += [file, size]
        with (directory / file).open("rb") as handle:
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                handle.seek(start)
                parts.append(handle.read(SAMPLE_BYTES))
    return digest(*parts)


@contextmanager
def open_tensors(directory: Path) -> Generator["TensorReader"]:
    """Read single tensors of a checkpoint without loading the rest."""
    reader = TensorReader(directory)
    try:
        yield reader
    finally:
        reader.close()


class TensorReader:
    """Lazily opened safetensors files of one checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of = {name: file for file, names in weight_files(directory).items() for name in names}
        self._handles: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            DataError: the checkpoint has no tensor of this name.
        """
        if name not in self._file_of:
            raise DataError(f"checkpoint {self._directory} has no tensor {name!r}; is config.json of another model?")
        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = safe_open(self._directory / file, framework="pt").__enter__()
        return self._handles[file].get_tensor(name)

    def close(self) -> None:
        """Close every file."""
        for handle in self._handles.values():
            handle.__exit__(None, None, None)


def stock_class(config: ModelDict) -> Any:
    """The ``transformers`` class that loads and builds the model."""
    return CLASSES[family_of(config).takes]


def empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """The architecture on the meta device: shapes without memory.

    Raises:
        ConfigError: a value of the config is of another type than the architecture's.
    """
    settings = parsed(config)
    with torch.device("meta"):
        model = stock_class(config).from_config(settings, trust_remote_code=False)
        resize_layers(model, family_of(config), config)
        return model


def count_parameters(config: ModelDict) -> int:
    """Parameters of the architecture, tied weights once."""
    return sum(parameter.numel() for parameter in empty_model(config).parameters())


@dataclass(frozen=True, slots=True)
class Numerics:
    """How a model computes: data type, and precision of float32 matrix products (see ``ModelConfig``)."""

    dtype: str = "float32"
    matmul: str = "highest"


def load_model(directory: Path, numerics: Numerics, devices: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a checkpoint for inference, through the stock class.

    Sets this process's matrix-product precision.

    Args:
        directory: checkpoint.
        numerics: how it computes.
        devices: where its modules go, by name; by default all onto the GPU if this process has one.
    """
    transformers_logging.disable_progress_bar()  # the run has its own
    torch.set_float32_matmul_precision(numerics.matmul)
    return from_pretrained(
        directory,
        dtype=getattr(torch, numerics.dtype),
        device_map=devices or {"": own_device()},
    )


def from_pretrained(directory: Path, **settings: Any) -> PreTrainedModel:
    """The model of a checkpoint, an instance of its stock class also where the layers differ in width."""
    config = read_config(directory)
    stock = stock_class(config)
    if layers_differ(config):
        stock = resizing_class(type(empty_model(config)), family_of(config), config)
        named = {key: value for key, value in config.items() if key != "auto_map"}  # save_pretrained copies no code
        settings["config"] = AutoConfig.for_model(**named)
    model = stock.from_pretrained(
        directory, trust_remote_code=False, use_safetensors=True, local_files_only=True, **settings
    )
    if layers_differ(config):
        # what was needed to build it is no class that anybody could import
        model.__class__ = stock.__base__  # pyright: ignore[reportAttributeAccessIssue]  (it is the stock class)
    return model.eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no tokenizer in {directory} ({reason}); put tokenizer.json beside the weights") from error


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint was written to its end, and its weight files are still there."""
    if not (directory / "config.json").is_file():
        return False
    if not (directory / INDEX).is_file():
        return (directory / WEIGHTS).is_file()
    return all((directory / file).is_file() for file in weight_files(directory))
