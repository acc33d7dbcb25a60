"""vLLM is asked in another environment: what it answers there, and what is said when it cannot be asked."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned
from cria_dist.stages import fresh_process, loaders, loaders_vllm
from cria_dist.stages.answers import Answer, answer_of
from cria_dist.stages.loaders import verdicts
from cria_dist.stages.loaders_vllm import python_with_vllm

STAND_IN = """
import os, sys
import torch
from types import SimpleNamespace as Answer
from transformers import AutoModelForCausalLM

def SamplingParams(**wanted):
    return wanted

class LLM:
    def __init__(self, path, **settings):
        if os.environ.get("BREAK") == "loading":
            raise ValueError("no such architecture")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=settings["dtype"])
        if os.environ.get("BREAK") == "weights":
            self.model.model.layers[1].mlp.down_proj.weight.data.zero_()

    def generate(self, prompt, wanted, use_tqdm):
        tokens = torch.tensor([prompt["prompt_token_ids"]])
        with torch.inference_mode():
            logs = self.model(input_ids=tokens).logits[0].log_softmax(-1)
        def entry(position, token):
            row = logs[position]
            rank = int((row > row[token]).sum()) + 1
            return token, Answer(logprob=row[token].item(), rank=rank)
        found = [
            dict([entry(place, token), entry(place, int(logs[place].argmax()))])
            for place, token in enumerate(tokens[0, 1:].tolist())
        ]
        return [Answer(prompt_logprobs=[None, *found])]
"""
"""A module with the face of vLLM, which pins another torch, and transformers inside."""


@pytest.fixture
def expected(pico: Path, tmp_path: Path) -> Answer:
    np.save(tmp_path / "tokens.npy", np.arange(32, dtype=np.int32)[None] * 5 % 250)
    return answer_of(checkpoint.from_pretrained(pico, dtype=torch.float32), tmp_path / "tokens.npy")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return sys.executable


def test_a_stock_checkpoint_is_tried_where_vllm_is(pico: Path, expected: Answer, stand_in: str) -> None:
    found = verdicts(pico, expected, python_with_vllm(stand_in))["vLLM"]
    assert found.startswith("equal: the stock class, loaded in a fresh process, log probabilities equal (largest")
    assert found.endswith("the same most likely token at 31 of 31 positions")


def test_what_computes_something_else_is_no(
    pico: Path, expected: Answer, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BREAK", "weights")
    assert verdicts(pico, expected, stand_in)["vLLM"].startswith("no: the stock class loads, but has the same most ")


def test_what_does_not_load_is_no_with_its_reason(
    pico: Path, expected: Answer, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BREAK", "loading")
    assert verdicts(pico, expected, stand_in)["vLLM"] == (
        "no: vLLM was tried and does not load the stock class (ValueError: no such architecture)"
    )


def test_a_python_without_vllm_is_an_error_before_the_run(tmp_path: Path, pico: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.vllm_python=.* has no vLLM; install it there, or leave it out"):
        python_with_vllm(sys.executable)
    with pytest.raises(ConfigError, match=r"run\.vllm_python='/no/python' cannot be started \(No such file"):
        python_with_vllm("/no/python")


def test_a_python_that_does_not_come_to_an_answer(
    pico: Path, expected: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run that is an error; at its end, on another node, a word in the report."""
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(loaders_vllm, "LOOK_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"run\.vllm_python='.*' does not say within 0\.1 s .* or leave it out"):
        python_with_vllm(str(sleeper))
    found = verdicts(pico, expected, str(sleeper))["vLLM"]
    assert found.startswith(f"{loaders.STOCK_RULE}; trying it failed: run.vllm_python=")


def test_a_try_that_comes_to_no_end_is_by_rule(
    pico: Path, expected: Answer, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_process, "TIMEOUT_SECONDS", 0.01)
    assert verdicts(pico, expected, stand_in)["vLLM"].endswith("; trying it failed: no answer within 0 s")


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python that has vLLM")
def test_real_vllm_reads_both_forms(make_model: Callable[..., Path], tmp_path: Path) -> None:
    python = os.environ["VLLM_PYTHON"]
    dense = make_model(tmp_path / "dense", hidden_size=64, head_dim=32, num_attention_heads=4)
    config = checkpoint.read_config(dense)
    np.save(tmp_path / "tokens.npy", np.arange(64, dtype=np.int32)[None] * 5 % 250)
    forms = {"alike": (32, 32), "uneven": (40, 16)}
    for name, widths in forms.items():
        kept = {f"layer-{layer:03d}.mlp": tuple(range(width)) for layer, width in enumerate(widths)}
        write_pruned(dense, tmp_path / name, Surgery(family_of(config), config, kept))
        ours = answer_of(checkpoint.from_pretrained(tmp_path / name, dtype=torch.float32), tmp_path / "tokens.npy")
        assert verdicts(tmp_path / name, ours, python_with_vllm(python))["vLLM"].startswith("equal: "), name
