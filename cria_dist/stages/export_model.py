"""A finished checkpoint in the form another loader reads: GGUF for llama.cpp, DeciLM for vLLM, ONNX."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, location
from cria_dist.models.decilm import write_decilm
from cria_dist.models.gguf_file import write_gguf
from cria_dist.models.onnx_file import write_onnx

Format = Literal["gguf", "decilm", "onnx"]


def export_model(source: str, target: Path, form: Format) -> str:
    """Write a model for another loader; the target appears when it is whole.

    Args:
        source: folder of a run (its recovered model, else its pruned one), or whatever ``model.path`` may be.
        target: new file (``gguf``, ``onnx``) or folder (``decilm``).
        form: which form.

    Returns:
        A sentence on what was written and who reads it.

    Raises:
        ConfigError: the target is there already or cannot be written, or the form cannot say what the model is.
        DataError: what was written computes something else.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; give a new name, exports are not overwritten")
    directory = model_of(source)
    try:
        return WRITERS[form](directory, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror or error}); choose another place") from error


def model_of(source: str) -> Path:
    """The checkpoint that a run ended with, or the one that a path or name stands for.

    Raises:
        ConfigError: there is none.
    """
    for name in ("recovered", "pruned"):
        if checkpoint.is_complete(Path(source) / name):
            return Path(source) / name
    return location.locate(source, None)


def _gguf(directory: Path, target: Path) -> str:
    layout = write_gguf(directory, target)
    size = target.stat().st_size / 1e6
    return f"{target}: {size:,.1f} MB, llama.cpp's architecture {layout.architecture!r}, for llama.cpp and its kin"


def _decilm(directory: Path, target: Path) -> str:
    temporary = target.with_name(f".{target.name}.tmp.{os.getpid()}")
    try:
        both = write_decilm(directory, checkpoint.read_config(directory), temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    widths = "" if both else " (llama.cpp's converter wants widths that are multiples of 256: export gguf for it)"
    return f"{target}: DeciLMForCausalLM for vLLM, loaded with trust_remote_code for its config{widths}"


def _onnx(directory: Path, target: Path) -> str:
    difference = write_onnx(directory, target)
    size = target.stat().st_size / 1e6
    return (
        f"{target}: {size:,.1f} MB, onnxruntime computes the same (largest difference {difference:.1e} of the logits)"
    )


WRITERS: Mapping[Format, Callable[[Path, Path], str]] = {"gguf": _gguf, "decilm": _decilm, "onnx": _onnx}
