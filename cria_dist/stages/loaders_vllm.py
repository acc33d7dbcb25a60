"""Whether vLLM reads a checkpoint as we do: tried in a process of an environment that has it, which may be another one.

vLLM pins its own torch and transformers, so that it seldom lives beside ours.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cria_dist.errors import ConfigError
from cria_dist.stages.fresh_process import complaint

LOOK_SECONDS = 60
"""To see whether a Python has vLLM: nothing of it is imported."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is the only one, and ends with its memory
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
SCRIPT = """
import sys
import numpy
from vllm import LLM, SamplingParams
path, tokens, target, code = sys.argv[1:]
tokens = numpy.load(tokens).tolist()
how = {"max_model_len": len(tokens) + 1, "gpu_memory_utilization": 0.5, "trust_remote_code": code == "ours"}
model = LLM(path, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **how)
wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
[answer] = model.generate({"prompt_token_ids": tokens}, wanted, use_tqdm=False)
found = answer.prompt_logprobs[1:]
own = [one[token].logprob for one, token in zip(found, tokens[1:])]
best = [next(token for token, what in one.items() if what.rank == 1) for one in found]
numpy.savez(target, own=own, best=best)
"""


@dataclass(frozen=True, slots=True)
class Read:
    """What a program makes of T tokens.

    Attributes:
        own_T: log probability of every token but the first, given those before it, in nats.
        best_T: the token it holds for the most likely one there.
    """

    own_T: np.ndarray
    best_T: np.ndarray


def python_with_vllm(named: str | None) -> str | None:
    """The Python to run vLLM in: the one that is named, else this one if it has vLLM.

    Raises:
        ConfigError: there is no vLLM in the one that is named, or it does not start.
    """
    if named is None:
        return sys.executable if find_spec("vllm") else None
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        run = subprocess.run([named, "-c", look], capture_output=True, timeout=LOOK_SECONDS, check=False)
    except OSError as error:
        raise ConfigError(
            f"run.vllm_python={named!r} cannot be started ({error.strerror}); name the python of an environment that "
            "has vLLM, or leave it out"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"run.vllm_python={named!r} does not say within {LOOK_SECONDS} s whether it has vLLM; see what "
            f"`{named} --version` waits for, or leave it out"
        ) from error
    if run.returncode:
        raise ConfigError(f"run.vllm_python={named!r} has no vLLM; install it there, or leave it out")
    return named


def read_by_vllm(python: str, directory: Path, tokens_T: np.ndarray, has_our_code: bool) -> Read | str:
    """What vLLM makes of a checkpoint, in float32, or the reason why it made nothing of it.

    Args:
        python: has vLLM.
        directory: the checkpoint.
        tokens_T: the input.
        has_our_code: the checkpoint was written here with a configuration class beside it, which vLLM has to run.

    Raises:
        NoAnswerError: it did not come to an end.
        OSError: the scratch folder is full, or the Python cannot be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _read_by_vllm(python, directory, tokens_T, Path(folder), "ours" if has_our_code else "none")


def _read_by_vllm(python: str, directory: Path, tokens_T: np.ndarray, scratch: Path, code: str) -> Read | str:
    tokens, found = scratch / "tokens.npy", scratch / "vllm.npz"
    np.save(tokens, tokens_T)
    if reason := complaint([python, "-c", SCRIPT, str(directory), str(tokens), str(found), code], ENVIRONMENT):
        return reason
    with np.load(found, allow_pickle=False) as arrays:
        return Read(arrays["own"], arrays["best"])


def read_of(logits_TV: np.ndarray, tokens_T: np.ndarray) -> Read:
    """The same of logits: [T, V] for T tokens."""
    log_TV = torch.from_numpy(logits_TV[:-1]).log_softmax(dim=1).numpy()
    return Read(log_TV[np.arange(len(log_TV)), tokens_T[1:]], log_TV.argmax(axis=1))
