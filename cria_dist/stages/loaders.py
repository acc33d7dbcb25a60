"""Which programs besides transformers load a checkpoint: tried here where they are installed, else by their rules.

A verdict begins with one of three words: ``equal`` (loaded here, the same numbers), ``by rule`` (the program reads
this form, it was not tried here, or trying it failed for another reason than the model) or ``no``; then comes the
reason. No verdict ends a run.
"""

import math
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
from cria_dist.models.decilm import as_blocks, write_decilm
from cria_dist.models.family import FAMILIES, family_of
from cria_dist.models.gguf_file import check_gguf, write_gguf
from cria_dist.models.mlp import layers_differ
from cria_dist.models.remote_code import FILE
from cria_dist.models.shapes import stored_tensors
from cria_dist.stages.answers import Answer
from cria_dist.stages.fresh_process import NoAnswerError, complaint
from cria_dist.stages.loaders_vllm import python_with_vllm, read_by_vllm, read_of

Config = Mapping[str, Any]

TRIED_BYTES = 4 << 30
"""A larger model (in float32) is not written and loaded only to see whether it loads."""
HEADS_MAKE_UP_HIDDEN_SIZE = {"qwen2": "Qwen2", "stablelm": "StableLM", "olmo2": "OLMo 2"}
"""Families whose class in vLLM reads no ``head_dim`` (read in 0.33, OLMo's in 0.16)."""
GENERIC_IN_VLLM = ("cohere", "ernie4_5", "granite", "helium", "olmo2", "seed_oss", "smollm3", "stablelm")
"""Families without an adapter of their own that vLLM 0.16 was seen to read."""
VLLM_TOLERANCE = 1e-4
"""Of the largest log probability, in float32; 1.5e-7 to 1.3e-6 were found: other kernels add up in another order."""
REMOTE = f"by rule: {FILE} beside the weights builds the layers; nothing here ever runs it"
ONNX = ("no: models that write text have no ONNX export", "by rule: `cria export --format onnx` writes and tries it")
"""Trying it takes as long as a small run."""
GGUF_RULE = "by rule: `cria export --format gguf` writes its form"
DECILM_RULE = "by rule: as DeciLMForCausalLM, which `cria export --format decilm` writes, with trust_remote_code"
STOCK_RULE = "by rule: it serves the stock class of this family, which this is"
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


def verdicts(directory: Path, expected: Answer | None, vllm_python: str | None = None) -> dict[str, str]:
    """What llama.cpp, vLLM and onnxruntime make of a checkpoint.

    Args:
        directory: the checkpoint.
        expected: what it has to answer; None where it is too large to be asked, and nothing is tried.
        vllm_python: a Python that has vLLM; default: this one, if it has.

    Returns:
        A verdict by program.
    """
    config = checkpoint.read_config(directory)
    remote = {"transformers, trust_remote_code": REMOTE} if (directory / FILE).is_file() else {}
    return {
        **remote,
        "llama.cpp": _llama_cpp(directory, config, expected),
        "vLLM": _vllm(directory, config, expected, vllm_python),
        "onnxruntime": ONNX[family_of(config).takes != "tokens"],
    }


def _vllm(directory: Path, config: Config, expected: Answer | None, named: str | None) -> str:
    differ = layers_differ(config)
    if reason := _not_for_vllm(config):
        return f"no: {reason}"
    try:
        rule = DECILM_RULE if differ and as_blocks(config) else STOCK_RULE
    except ConfigError as error:
        return f"no: {error}"
    if expected is None or family_of(config).takes != "tokens":
        return rule
    try:
        python = python_with_vllm(named)
        if python is None or _is_too_large(directory):
            return rule
        return (_decilm_in_vllm if differ else _tried_in_vllm)(python, directory, expected)
    except (ConfigError, NoAnswerError, OSError) as error:
        return f"{rule}; trying it failed: {error}"


def _not_for_vllm(config: Config) -> str:
    """Why vLLM cannot read it, whatever its form; nothing if it can."""
    name = config["model_type"]
    known = name in FAMILIES or name in GENERIC_IN_VLLM
    if not known or name == "distilbert" or family_of(config).takes == "images":
        return "it is not known to serve this family"
    heads = attention_shape(config)
    if name in HEADS_MAKE_UP_HIDDEN_SIZE and heads.head_dim * config["num_attention_heads"] != config["hidden_size"]:
        return f"its {HEADS_MAKE_UP_HIDDEN_SIZE[name]} has heads that make up the hidden size"
    return ""


def _decilm_in_vllm(python: str, directory: Path, expected: Answer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "decilm"
        write_decilm(directory, checkpoint.read_config(directory), target)
        return _tried_in_vllm(python, target, expected, "DeciLM of `cria export`, trust_remote_code")


def _tried_in_vllm(python: str, directory: Path, expected: Answer, export: str | None = None) -> str:
    form = export or "the stock class"
    found = read_by_vllm(python, directory, expected.tokens_T, has_our_code=export is not None)
    if isinstance(found, str):
        return f"no: vLLM was tried and does not load {form} ({found})"
    ours = read_of(expected.logits[0], expected.tokens_T)
    difference, largest = np.abs(found.own_T - ours.own_T).max(), np.abs(ours.own_T).max()
    return _verdict(found.best_T == ours.best_T, difference, VLLM_TOLERANCE * largest, form, "log probabilities")


def _llama_cpp(directory: Path, config: Config, expected: Answer | None) -> str:
    if family_of(config).takes != "tokens":
        return "no: it generates text, and this model does not"
    missing = [name for name, module in (("gguf", "gguf"), ("llama-cpp-python", "llama_cpp")) if not find_spec(module)]
    try:
        check_gguf(directory)
        if missing:
            return f"{GGUF_RULE}; {missing[0]} is not installed to try it"
        if expected is None or _is_too_large(directory):
            return f"{GGUF_RULE}; too large to be tried here"
        return _tried_in_llama_cpp(directory, expected)
    except ConfigError as error:
        return f"no: {error}"
    except (NoAnswerError, OSError) as error:
        return f"{GGUF_RULE}; trying it failed: {error}"


def _tried_in_llama_cpp(directory: Path, expected: Answer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        layout = write_gguf(directory, path, float32=True)
        found_TV = _run_llama_cpp(path, expected.tokens_T)
    form = f"GGUF of `cria export`, architecture {layout.architecture!r}"
    if isinstance(found_TV, str):
        return found_TV
    ours_TV = expected.logits[0]
    difference, largest = np.abs(found_TV - ours_TV).max(), np.abs(ours_TV).max()
    same_T = found_TV.argmax(axis=1) == ours_TV.argmax(axis=1)
    return _verdict(same_T, difference, layout.rules.tolerance * largest, form, "logits")


def _is_too_large(directory: Path) -> bool:
    """Whether its weights in float32 are too many to be written and loaded once more only to see."""
    size = 4 * sum(math.prod(tensor.shape) for tensor in stored_tensors(directory).values())
    return size > min(TRIED_BYTES, files.free_bytes(Path(tempfile.gettempdir())) // 2)


def _run_llama_cpp(path: Path, tokens_T: np.ndarray) -> np.ndarray | str:
    """Logits [T, V] of llama.cpp, or why there are none; in a process of its own, for it may die of a bad file."""
    tokens, logits = path.with_name("tokens.npy"), path.with_name("logits.npy")
    np.save(tokens, tokens_T)
    command = [sys.executable, "-c", LLAMA_CPP, str(path), str(tokens), str(torch.get_num_threads()), str(logits)]
    if reason := complaint(command):
        return f"no: llama.cpp does not load its GGUF ({reason})"
    return np.load(logits)


def _verdict(same_T: np.ndarray, difference: float, allowed: float, form: str, what: str) -> str:
    greedy = f"the same most likely token at {same_T.sum()} of {len(same_T)} positions"
    if difference <= allowed:
        return f"equal: {form}, loaded in a fresh process, {what} equal (largest difference {difference:.1e}), {greedy}"
    if same_T.all():
        return f"equal: {form}, loaded in a fresh process, {greedy} ({what} differ by up to {difference:.1e})"
    return f"no: {form} loads, but has {greedy} ({what} differ by up to {difference:.1e})"
