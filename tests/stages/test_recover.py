"""Recovery: it learns, it resumes to the bit, it does not depend on the number of workers."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.config import RecoverConfig
from cria_dist.errors import NumericError
from cria_dist.models import checkpoint
from cria_dist.stages import recover
from cria_dist.stages.recover import Place, RecoverTask, TrainState, learning_rate, read_log, sequence_order

CONFIG = RecoverConfig(
    steps=8, workers=1, batch_sequences=4, sequence_length=16, learning_rate=2e-3, checkpoint_every=3
)


@pytest.fixture
def task(pico: Path, text_file: Path, tmp_path: Path) -> RecoverTask:
    tokens = checkpoint.load_tokenizer(pico)(text_file.read_text(), verbose=False)["input_ids"]
    np.save(tmp_path / "tokens.npy", np.asarray(tokens[: 12 * 32], dtype=np.int32).reshape(12, 32))
    target, log = tmp_path / "recovered", tmp_path / "log" / "loss.jsonl"
    return RecoverTask(pico, tmp_path / "tokens.npy", target, log, CONFIG, "highest", seed=0)


def train(
    task: RecoverTask,
    resume: Path | None = None,
    save: recover.Checkpoint = lambda step, write: None,
) -> dict[str, torch.Tensor]:
    recover.train(task, Place(), resume, save)
    return load_file(task.target / checkpoint.WEIGHTS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_goes_down(task: RecoverTask) -> None:
    train(replace(task, config=CONFIG.model_copy(update={"steps": 40})))
    losses = [line["loss"] for line in read_log(task.log_path)]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_the_result_is_a_checkpoint_like_the_pruned_one(task: RecoverTask, pico: Path) -> None:
    train(task)
    assert {path.name for path in task.target.iterdir()} == {path.name for path in pico.iterdir()}
    assert checkpoint.read_config(task.target) == checkpoint.read_config(pico)
    assert checkpoint.load_model(task.target, checkpoint.Numerics()) is not None


def test_a_bfloat16_checkpoint_is_trained_in_float32_and_stays_bfloat16(
    task: RecoverTask, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make_model(tmp_path / "half", dtype="bfloat16", tie_word_embeddings=False)
    seen: set[torch.dtype] = set()
    loss = recover.next_token_loss

    def spy(model: Any, tokens_SD: torch.Tensor) -> torch.Tensor:
        seen.update(parameter.dtype for parameter in model.parameters())
        return loss(model, tokens_SD)

    monkeypatch.setattr(recover, "next_token_loss", spy)
    trained = train(replace(task, model_dir=half))
    assert seen == {torch.float32}
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}


def test_mlp_trains_only_what_lost_units(task: RecoverTask) -> None:
    before = load_file(task.model_dir / checkpoint.WEIGHTS)
    after = train(replace(task, config=task.config.model_copy(update={"train": "mlp"})))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_leaves_embeddings_and_head_alone(
    tied: bool, task: RecoverTask, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    before, after = load_file(model / checkpoint.WEIGHTS), train(replace(task, model_dir=model))
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


def test_all_trains_everything(task: RecoverTask, pico: Path) -> None:
    before = load_file(pico / checkpoint.WEIGHTS)
    after = train(replace(task, config=CONFIG.model_copy(update={"train": "all"})))
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("recipe", ["blocks", "all"])
def test_a_resumed_training_ends_in_the_same_weights(recipe: str, task: RecoverTask, tmp_path: Path) -> None:
    task = replace(task, config=CONFIG.model_copy(update={"train": recipe}))
    saved: dict[int, Path] = {}

    def save(step: int, write: Callable[[Path], None]) -> None:
        saved[step] = tmp_path / f"state-{step}"
        saved[step].mkdir()
        write(saved[step])

    whole = train(task, save=save)
    losses = read_log(task.log_path)
    assert sorted(saved) == [3, 6]
    for step, folder in saved.items():
        again = replace(task, target=tmp_path / f"again-{step}", log_path=tmp_path / f"again-{step}.jsonl")
        assert same(train(again, resume=folder), whole), step
        expected = [(line["step"], line["loss"]) for line in losses[step:]]
        assert [(line["step"], line["loss"]) for line in read_log(again.log_path)] == expected
    assert not list(tmp_path.rglob("*.pkl"))
    assert {path.name for path in saved[3].iterdir()} == {"state.safetensors"}


def test_another_seed_trains_in_another_order(task: RecoverTask, tmp_path: Path) -> None:
    other = replace(task, seed=1, target=tmp_path / "other")
    assert same(train(task), train(task))
    assert not same(train(task), train(other))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_the_same_global_batches(world: int) -> None:
    config = RecoverConfig(steps=13, workers=world, batch_sequences=4)
    order = sequence_order(10, config, seed=3)
    alone = sequence_order(10, RecoverConfig(steps=13, workers=1, batch_sequences=4), seed=3)
    for step, batch in enumerate(order):
        parts = [batch[rank::world] for rank in range(world)]
        assert {len(part) for part in parts} == {4 // world}
        assert sorted(np.concatenate(parts)) == sorted(alone[step])


def test_every_epoch_sees_every_sequence_once() -> None:
    order = np.concatenate(sequence_order(10, RecoverConfig(steps=6, workers=1, batch_sequences=5), seed=0))
    epochs = np.split(order, 3)
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_mean_of_the_workers_gradients_is_that_of_the_global_batch(
    world: int, task: RecoverTask, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over micro-batches: 4, 2 or 1 sequences per worker, at most 2 at a time."""
    monkeypatch.setattr(recover, "CLIP_NORM", 1e9)  # clipping comes after the mean
    batch_SD = recover.training_sequences(np.load(task.tokens_path), 16)[:4]

    def gradients(part_SD: torch.Tensor) -> dict[str, torch.Tensor]:
        model = checkpoint.load_model(pico, checkpoint.Numerics())
        recover.optimise(model, TrainState(model, CONFIG), part_SD, 1e-3, Place())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = checkpoint.load_model(pico, checkpoint.Numerics())
    model(input_ids=batch_SD, labels=batch_SD).loss.backward()  # the whole batch at once, by transformers' own loss
    parts = [gradients(batch_SD[rank::world]) for rank in range(world)]
    for name, parameter in model.named_parameters():
        mean = sum(part[name] for part in parts) / world
        assert torch.allclose(mean, parameter.grad, rtol=1e-4, atol=1e-6), name


def test_the_logged_loss_is_that_of_the_whole_part(task: RecoverTask, pico: Path) -> None:
    batch_SD = recover.training_sequences(np.load(task.tokens_path), 16)[:5]
    model = checkpoint.load_model(pico, checkpoint.Numerics())
    with torch.no_grad():
        expected = float(model(input_ids=batch_SD, labels=batch_SD).loss)
    found = recover.optimise(model, TrainState(model, CONFIG), batch_SD, 1e-3, Place())
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_are_clipped(task: RecoverTask, pico: Path) -> None:
    model = checkpoint.load_model(pico, checkpoint.Numerics())
    batch_SD = recover.training_sequences(np.load(task.tokens_path), 16)[:2]
    recover.optimise(model, TrainState(model, CONFIG), batch_SD, 0.0, Place())
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) <= recover.CLIP_NORM * 1.001


def test_only_the_first_rank_writes(task: RecoverTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "mean_over_workers", lambda loss, place: loss)  # there is no process group
    monkeypatch.setattr(recover, "average_gradients", lambda parameters, place: None)
    recover.train(task, Place(1, 2), None, lambda step, write: None)
    assert not task.target.exists()
    assert not task.log_path.exists()


def test_a_loss_that_is_not_finite_is_an_error(task: RecoverTask, pico: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(pico, spoilt)
    tensors = load_file(spoilt / checkpoint.WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, spoilt / checkpoint.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"the loss is nan at step 0; lower recover\.learning_rate"):
        train(replace(task, model_dir=spoilt))
    assert not task.target.exists()


def test_a_learning_rate_that_explodes_is_an_error(task: RecoverTask) -> None:
    with pytest.raises(NumericError, match=r"recovery: the loss is (nan|inf)"):
        train(replace(task, config=CONFIG.model_copy(update={"steps": 60, "learning_rate": 1e30})))


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    config = RecoverConfig(steps=100, learning_rate=1e-3)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1e-3 * 0.55)
    assert 1e-4 < rates[-1] < 1.1e-4


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_learning_rate_of_a_short_training_is_never_zero(steps: int) -> None:
    config = RecoverConfig(steps=steps, learning_rate=1e-3)
    rates = [learning_rate(step, config) for step in range(steps)]
    assert max(rates) == pytest.approx(1e-3)
    assert min(rates) >= 1e-4


def test_training_sequences_cut_the_calibration_stream() -> None:
    tokens_ST = np.arange(70, dtype=np.int32).reshape(7, 10)
    sequences = recover.training_sequences(tokens_ST, 16)
    assert sequences.dtype == torch.int64
    assert torch.equal(sequences, torch.arange(64).reshape(4, 16))
    assert recover.training_sequences(tokens_ST, 500).shape == (1, 70)


def line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss, "seconds": 1.0})


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "loss.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_torn_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_text(f"{line(1, 3.0)}\n{line(2, 2.0)}\n{line(3, 1.0)[:-cut]}")
    assert [(one["step"], one["loss"]) for one in read_log(path)] == [(1, 3.0), (2, 2.0)]


def test_of_a_step_logged_twice_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_text(
        "".join(f"{line(step, loss)}\n" for step, loss in [(1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 1.5)])
    )
    assert [(one["step"], one["loss"]) for one in read_log(path)] == [(1, 3.0), (2, 2.5), (3, 1.5)]


def test_a_log_continued_after_a_torn_line_can_be_read(task: RecoverTask) -> None:
    """The worker died while it logged step 2; the next one appends to the same file."""
    task.log_path.parent.mkdir()
    task.log_path.write_text(f"{line(1, 3.0)}\n{line(2, 2.0)[:-7]}")
    train(task)
    assert {one["step"] for one in read_log(task.log_path)} >= set(range(2, CONFIG.steps + 1))


def test_following_reports_the_steps_others_log(tmp_path: Path) -> None:
    path, seen = tmp_path / "loss.jsonl", list[tuple[int, int]]()
    with recover.following(path, lambda steps, tokens: seen.append((steps, tokens)), tokens_per_step=64):
        path.write_text("".join(f"{line(step, 1.0)}\n" for step in (1, 2, 3)))
    assert sum(steps for steps, _ in seen) == 3
    assert sum(tokens for _, tokens in seen) == 3 * 64
