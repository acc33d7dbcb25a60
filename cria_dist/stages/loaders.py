"""Which programs besides transformers load a checkpoint: tried here where they are installed, else by their rules.

A verdict begins with one of three words: ``equal`` (loaded here, the same numbers), ``by rule`` (the program reads
this form, it was not tried here) or ``no``; then comes the reason.
"""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cria_dist import files
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.attention import attention_shape
from cria_dist.models.decilm import as_blocks
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.gguf_file import write_gguf
from cria_dist.models.mlp import layers_differ
from cria_dist.models.remote_code import FILE
from cria_dist.models.shapes import stored_tensors

GGUF_BYTES = 4 << 30
"""A larger file (in float32) is not written only to see whether it loads."""
REMOTE = f"by rule: {FILE} beside the weights builds the layers; nothing here ever runs it"
ONNX = ("no: models that write text have no ONNX export", "by rule: `cria export --format onnx` writes and tries it")
"""Trying it takes as long as a small run."""
TIMEOUT_SECONDS = 1800
LLAMA_CPP = """
import sys
import llama_cpp
import numpy
path, tokens, threads, target = sys.argv[1:]
tokens = numpy.load(tokens)
size = {"n_ctx": len(tokens), "n_batch": len(tokens), "n_threads": int(threads)}
model = llama_cpp.Llama(path, logits_all=True, type_k=0, type_v=0, verbose=False, **size)
model.eval(tokens.tolist())
numpy.save(target, model.scores[: len(tokens)])
model.close()
"""
"""What the fresh process runs: its cache in float32 (type 0), for the check is about the weights."""


def verdicts(directory: Path, model: torch.nn.Module, tokens_path: Path) -> dict[str, str]:
    """What llama.cpp, vLLM and onnxruntime make of a checkpoint.

    Args:
        directory: the checkpoint.
        model: the same model in memory.
        tokens_path: test tokens; the first 64 of the first sequence are used.

    Returns:
        A verdict by program.
    """
    config = checkpoint.read_config(directory)
    remote = {"transformers, trust_remote_code": REMOTE} if (directory / FILE).is_file() else {}
    return {
        **remote,
        "llama.cpp": _llama_cpp(directory, config, model, tokens_path),
        "vLLM": _vllm(config),
        "onnxruntime": ONNX[family_of(config).takes != "tokens"],
    }


def _vllm(config: Mapping[str, Any]) -> str:
    unserved = config["model_type"] not in FAMILIES or config["model_type"] == "distilbert"
    if unserved or family_of(config).takes == "images":
        return "no: it is not known to serve this family"
    if (
        config["model_type"] == "qwen2"
        and attention_shape(config).head_dim * config["num_attention_heads"] != config["hidden_size"]
    ):
        return "no: its Qwen2 has heads that make up the hidden size"
    if not layers_differ(config):
        return "by rule: it serves the stock class of this family, which this is"
    try:
        as_blocks(config)
    except ConfigError as error:
        return f"no: {error}"
    return "by rule: as DeciLMForCausalLM, which `cria export --format decilm` writes"


def _llama_cpp(directory: Path, config: Mapping[str, Any], model: torch.nn.Module, tokens_path: Path) -> str:
    if family_of(config).takes != "tokens":
        return "no: it generates text, and this model does not"
    size = 4 * sum(math.prod(tensor.shape) for tensor in stored_tensors(directory).values())
    missing = [name for name, module in (("gguf", "gguf"), ("llama-cpp-python", "llama_cpp")) if not find_spec(module)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        if missing:
            return f"by rule: `cria export --format gguf` writes its form; {missing[0]} is not installed to try it"
        if size > min(GGUF_BYTES, files.free_bytes(path) // 2):
            return "by rule: `cria export --format gguf` writes its form; too large to be tried here"
        try:
            layout = write_gguf(directory, path, float32=True)
        except ConfigError as error:
            return f"no: {error}"
        tokens_T = np.load(tokens_path, mmap_mode="r", allow_pickle=False)[0, :64].astype(np.int64)
        found = _run_llama_cpp(path, tokens_T)
    form = f"GGUF of `cria export`, architecture {layout.architecture!r}"
    if isinstance(found, str):
        return found
    exact = (
        model
        if next(model.parameters()).dtype == torch.float32
        else checkpoint.from_pretrained(directory, dtype=torch.float32)
    )
    return _compared(found, _logits(exact, tokens_T), form, layout.rules.tolerance)


def _run_llama_cpp(path: Path, tokens_T: np.ndarray) -> np.ndarray | str:
    """Logits [T, V] of llama.cpp, or why there are none; in a process of its own, for it may die of a bad file."""
    tokens, logits = path.with_name("tokens.npy"), path.with_name("logits.npy")
    np.save(tokens, tokens_T)
    command = [sys.executable, "-c", LLAMA_CPP, str(path), str(tokens), str(torch.get_num_threads()), str(logits)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env={**os.environ}, check=False
    )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1]
        return f"no: llama.cpp does not load its GGUF ({reason})"
    return np.load(logits)


def _logits(model: torch.nn.Module, tokens_T: np.ndarray) -> np.ndarray:
    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens_T)[None].to(device)).logits[0].float().cpu().numpy()


def _compared(theirs_TV: np.ndarray, ours_TV: np.ndarray, form: str, tolerance: float) -> str:
    difference, allowed = np.abs(theirs_TV - ours_TV).max(), tolerance * np.abs(ours_TV).max()
    same, positions = int((theirs_TV.argmax(axis=1) == ours_TV.argmax(axis=1)).sum()), len(ours_TV)
    greedy = f"the same most likely token at {same} of {positions} positions"
    if difference <= allowed:
        return f"equal: {form}, loaded in a fresh process, logits equal (largest difference {difference:.1e}), {greedy}"
    if same == positions:
        return f"equal: {form}, loaded in a fresh process, {greedy} (logits differ by up to {difference:.1e})"
    return f"no: {form} loads, but has {greedy} (logits differ by up to {difference:.1e})"
