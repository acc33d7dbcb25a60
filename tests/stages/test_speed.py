from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from cria_dist.models import checkpoint
from cria_dist.stages import speed
from cria_dist.stages.demonstrate import Demonstration, Demonstrator, Visit, alternating_visits, medians, summary
from cria_dist.stages.evaluate import Variant

FLOAT32 = checkpoint.Numerics("float32", "highest")
TOKENS = 48


def shapes_seen(model: PreTrainedModel, **inputs: torch.Tensor) -> tuple[speed.Speed, list[tuple[int, ...]]]:
    seen: list[tuple[int, ...]] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    measured = speed.measure(model, inputs, decodes=True)
    handle.remove()
    return measured, seen


def test_one_sequence_and_a_batch_are_timed_and_the_prompt_is_not_decoded_again(pico: Path) -> None:
    model = checkpoint.load_model(pico, FLOAT32)
    tokens_BT = torch.arange(speed.BATCH * TOKENS).reshape(speed.BATCH, TOKENS) % 50
    measured, seen = shapes_seen(model, input_ids=tokens_BT)
    short = min(TOKENS, speed.PROMPT_TOKENS)
    assert seen[:4] == [(1, short), (1, TOKENS), (speed.BATCH, short), (speed.BATCH, TOKENS)]
    decoded = [seen[4 : 5 + speed.DECODED_TOKENS], seen[5 + speed.DECODED_TOKENS :]]
    for batch, steps in zip((1, speed.BATCH), decoded, strict=True):
        assert steps == [(batch, short), *[(batch, 1)] * speed.DECODED_TOKENS]
    assert all(value > 0 for value in measured.known().values())
    assert len(measured.known()) == 5


def test_memory_is_the_weights_and_the_cache_of_the_batch(pico: Path) -> None:
    model, config = checkpoint.load_model(pico, FLOAT32), checkpoint.read_config(pico)
    tokens_BT = torch.zeros(speed.BATCH, TOKENS, dtype=torch.int64)
    weights = 4 * sum(one.numel() for one in model.parameters())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kept = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 4
    measured = speed.measure(model, {"input_ids": tokens_BT}, decodes=False)
    assert measured.memory_bytes == weights + kept * speed.BATCH * TOKENS
    assert "decode_ms" not in measured.known()


def test_few_test_sequences_are_repeated_to_a_batch(pico: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((3, 16), dtype=np.int32))
    task = Demonstration(tmp_path / "tokens.npy", FLOAT32, ("a",), 2, threads=1)
    shown = Demonstrator(task)(Visit(Variant("dense", pico), 0, write_texts=True))
    assert shown.speed.batch_prefill_ms > 0
    assert len(shown.texts) == 1
    faster = replace(shown, speed=replace(shown.speed, prefill_ms=0.0))
    assert medians([shown, faster, shown])["prefill_ms"] == shown.speed.prefill_ms


def test_nothing_is_timed_where_latency_is_switched_off(pico: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((3, 16), dtype=np.int32))
    visits = alternating_visits([Variant("dense", pico), Variant("pruned", pico)], 0)
    assert len(visits) == 2
    demonstrator = Demonstrator(Demonstration(tmp_path / "tokens.npy", FLOAT32, ("a",), 2, threads=1))
    found = summary({visit: demonstrator(visit) for visit in visits})
    assert found["times"] == {"dense": {}, "pruned": {}}
    assert len(found["texts"]["pruned"]) == 1
