"""Recoveries through adapters, in mixed precision, with few activations, and with an end of their own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.stages import check_recovery, recover, recover_watch
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import Place, RecoverTask, read_log, student

RunConfigMaker = Callable[..., RunConfig]


def with_options(task: RecoverTask, **options: Any) -> RecoverTask:
    return replace(task, config=task.config.model_copy(update=options))


def train(task: RecoverTask, resume: Path | None = None, save: recover.Checkpoint = lambda step, write: None) -> Any:
    recover.train(task, Place(), resume, save)
    return load_file(task.target / checkpoint.WEIGHTS)


def losses(task: RecoverTask) -> list[float]:
    return [line["loss"] for line in read_log(task.log_path)]


# adapters


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_mlp_means_the_parts_that_lost_units(part: str, task: RecoverTask) -> None:
    before = load_file(task.model_dir / checkpoint.WEIGHTS)
    after = train(replace(with_options(task, train="mlp"), parts=(part,)))
    wanted = ".mlp." if part == "mlp" else "_proj"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if wanted in name and (part == "mlp" or ".self_attn." in name)}


@pytest.mark.parametrize(("what", "adapted"), [("mlp", (".mlp.",)), ("blocks", (".mlp.", ".self_attn."))])
def test_adapters_change_the_maps_by_a_matrix_of_their_rank(
    what: str, adapted: tuple[str, ...], task: RecoverTask
) -> None:
    before = load_file(task.model_dir / checkpoint.WEIGHTS)
    after = train(with_options(task, lora_rank=3, train=what, learning_rate=2e-2))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(part in name for part in adapted)}
    ranks = {int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3)) for name in changed}
    assert ranks == {3}


def test_adapters_learn_and_start_from_the_model(task: RecoverTask) -> None:
    plain = with_options(task, steps=1, train="blocks")
    train(plain)
    first = losses(plain)[0]
    adapted = with_options(task, steps=60, lora_rank=8, learning_rate=2e-2)
    train(adapted)
    found = losses(adapted)
    assert found[0] == pytest.approx(first, abs=1e-5)
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.3


def test_a_recovery_through_adapters_resumes_to_the_bit(task: RecoverTask, tmp_path: Path) -> None:
    adapted, folder = with_options(task, lora_rank=3), tmp_path / "state"

    def save(step: int, write: Callable[[Path], None]) -> None:
        if step == 3:
            folder.mkdir()
            write(folder)

    whole = train(adapted, save=save)
    assert not any("mlp" in name and "lora" not in name for name in load_file(folder / "state.safetensors"))
    again = train(replace(adapted, target=tmp_path / "again", log_path=tmp_path / "again.jsonl"), resume=folder)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_adapters_need(run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = {"name": "spectrum_preserving"}
    with pytest.raises(ConfigError, match=r"adds a dense matrix to every map.*set recover\.lora_rank=0"):
        prepare(run_config(tmp_path, method=sparse, recover={"steps": 2, "lora_rank": 2, "batch_sequences": 2}))
    monkeypatch.setattr(check_recovery, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cria-dist\[lora\]'"):
        prepare(run_config(tmp_path, recover={"steps": 2, "lora_rank": 2, "batch_sequences": 2}))


# memory and precision


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_activations_computed_again_give_the_same_weights(distill: float, task: RecoverTask, tmp_path: Path) -> None:
    task = replace(with_options(task, distill=distill), teacher=recover.Teacher(task.model_dir, "float32"))
    kept = train(task)
    few = train(replace(with_options(task, checkpoint_activations=True), target=tmp_path / "few"))
    assert all(torch.allclose(kept[name], few[name], rtol=0, atol=1e-6) for name in kept)


def test_few_activations_are_kept(task: RecoverTask) -> None:
    """Counted where autograd packs what it saves for the backward pass."""
    tokens_ST, sizes = torch.arange(64).reshape(2, 32) % 256, []
    for few in (False, True):
        model, saved = student(with_options(task, checkpoint_activations=few)), []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=tokens_ST, use_cache=False).last_hidden_state.sum()
        sizes.append(sum(saved))
    assert sizes[1] < 0.3 * sizes[0]


def test_mixed_precision_keeps_weights_in_float32(task: RecoverTask) -> None:
    exact, mixed = with_options(task, steps=30), with_options(task, steps=30, dtype="bfloat16")
    train(exact)
    found = losses(exact)
    weights = train(mixed)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert losses(mixed) != found
    assert np.allclose(losses(mixed), found, rtol=0.03)


# when to stop


def test_it_stops_and_keeps_the_best(task: RecoverTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses as given: the least comes second, two looks later it is over."""
    given = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    best: dict[str, torch.Tensor] = {}

    def look(model: torch.nn.Module, *_: object) -> float:
        loss = next(given)
        if loss == 2.0:
            best.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return loss

    monkeypatch.setattr(recover, "held_out_loss", look)
    watched = with_options(task, steps=60, patience=2)
    found = train(watched)
    lines = read_log(task.log_path)
    assert [line["held_out"] for line in lines if "held_out" in line] == [3.0, 2.0, 2.5, 2.5]
    assert len(lines) == 4 * task.config.checkpoint_every
    assert all(torch.equal(found[name], best[name]) for name in found)


def test_a_watched_recovery_resumes_to_the_bit(task: RecoverTask, tmp_path: Path) -> None:
    watched = with_options(task, steps=60, patience=2, learning_rate=0.05)
    saved: dict[int, Path] = {}

    def save(step: int, write: Callable[[Path], None]) -> None:
        saved[step] = tmp_path / f"state-{step}"
        saved[step].mkdir()
        write(saved[step])

    whole = train(watched, save=save)
    stopped = len(read_log(task.log_path))
    assert stopped < 60, "with this learning rate it should have stopped"
    for step, folder in saved.items():
        again = replace(watched, target=tmp_path / f"again-{step}", log_path=tmp_path / f"again-{step}.jsonl")
        found = train(again, resume=folder)
        assert all(torch.equal(whole[name], found[name]) for name in whole), step
        assert read_log(again.log_path)[-1]["step"] == stopped


def test_the_held_out_loss_is_that_of_sequences_nothing_learns_from(task: RecoverTask) -> None:
    data = torch.arange(40 * 16).reshape(40, 16) % 256
    rest, held = recover_watch.split(data, patience=1)
    assert held is not None
    assert (len(rest), len(held)) == (36, 4)
    model = checkpoint.load_model(task.model_dir, checkpoint.Numerics())
    with torch.inference_mode():
        expected = float(model(input_ids=held, labels=held).loss)
    assert recover_watch.held_out_loss(model, held, Place(), 8) == pytest.approx(expected, rel=1e-5)
    assert recover_watch.split(data, patience=0)[1] is None


def test_it_looks_in_the_precision_it_trains_in(task: RecoverTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``fsdp2`` the layers are gathered in it, and take nothing else."""
    seen: list[bool] = []

    def look(*_: object) -> float:
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        return 1.0

    monkeypatch.setattr(recover, "held_out_loss", look)
    for dtype in ("bfloat16", "float32"):
        train(with_options(task, steps=2, patience=1, dtype=dtype))
    assert seen == [True, False]


def test_workers_share_the_held_out_sequences(task: RecoverTask, monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.arange(5 * 16).reshape(5, 16) * 3 % 256
    model = checkpoint.load_model(task.model_dir, checkpoint.Numerics())
    alone = recover_watch.held_out_loss(model, held, Place(), 8)
    monkeypatch.setattr(recover_watch, "mean_over_workers", lambda loss, place: loss / place.world)
    parts = [recover_watch.held_out_loss(model, held, Place(rank, 2), 4) for rank in (0, 1)]
    assert sum(parts) == pytest.approx(alone, rel=1e-6)


def test_options_that_are_off_leave_digests_alone() -> None:
    known = {"steps", "batch_sequences", "sequence_length", "learning_rate", "train", "checkpoint_every"}
    off = RecoverConfig(distill=0)
    assert off.content_part().keys() == known
    assert "lora_rank" in off.model_copy(update={"lora_rank": 4}).content_part()
    assert "dtype" in off.model_copy(update={"dtype": "bfloat16"}).content_part()
