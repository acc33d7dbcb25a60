"""Recovery: it learns, it resumes to the bit, it does not depend on the number of workers."""

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

from cria_dist.errors import ConfigError, NumericError
from cria_dist.models import checkpoint
from cria_dist.stages import recover, recover_loss, recover_step
from cria_dist.stages.recover import Place, RecoverTask, Teacher, read_log


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
    train(replace(task, config=task.config.model_copy(update={"steps": 40})))
    losses = [line["loss"] for line in read_log(task.log_path)]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_the_result_is_a_checkpoint_like_the_pruned_one(task: RecoverTask, pico: Path) -> None:
    train(task)
    assert {path.name for path in task.target.iterdir()} == {path.name for path in pico.iterdir()}
    assert checkpoint.read_config(task.target) == {**checkpoint.read_config(pico), "rope_theta": 10000.0}
    assert checkpoint.load_model(task.target, checkpoint.Numerics()) is not None


def test_a_bfloat16_checkpoint_is_trained_in_float32_and_stays_bfloat16(
    task: RecoverTask, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make_model(tmp_path / "half", dtype="bfloat16", tie_word_embeddings=False)
    seen: set[torch.dtype] = set()
    loss = recover_loss.next_token_loss

    def spy(model: Any, tokens_ST: torch.Tensor) -> torch.Tensor:
        seen.update(parameter.dtype for parameter in model.parameters())
        return loss(model, tokens_ST)

    monkeypatch.setattr(recover_loss, "next_token_loss", spy)
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
    after = train(replace(task, config=task.config.model_copy(update={"train": "all"})))
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("recipe", "distill"), [("blocks", 0.0), ("all", 0.0), ("all", 0.5)])
def test_a_resumed_training_ends_in_the_same_weights(
    recipe: str, distill: float, task: RecoverTask, tmp_path: Path
) -> None:
    config = task.config.model_copy(update={"train": recipe, "distill": distill})
    task = replace(task, config=config, teacher=Teacher(task.model_dir, "float32"))
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


def test_only_the_first_rank_writes(task: RecoverTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_step, "mean_over_workers", lambda loss, place: loss)  # there is no process group
    monkeypatch.setattr(recover_step, "average_gradients", lambda parameters, place: None)
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
        train(replace(task, config=task.config.model_copy(update={"steps": 60, "learning_rate": 1e30})))


def test_a_log_continued_after_a_torn_line_can_be_read(task: RecoverTask) -> None:
    """The worker died while it logged step 2; the next one appends to the same file."""
    task.log_path.parent.mkdir()
    lines = [json.dumps({"step": step, "loss": 3.0, "seconds": 1.0}) for step in (1, 2)]
    task.log_path.write_text(f"{lines[0]}\n{lines[1][:-7]}")
    train(task)
    assert {one["step"] for one in read_log(task.log_path)} >= set(range(2, task.config.steps + 1))


def perturbed(source: Path, target: Path) -> Path:
    """The same model with a tenth of its MLP units switched off and noise on all matrices of its layers."""
    shutil.copytree(source, target)
    tensors, generator = load_file(source / checkpoint.WEIGHTS), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ".layers." in name:
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        if name.endswith("down_proj.weight"):
            tensor[:, ::10] = 0
    save_file(tensors, target / checkpoint.WEIGHTS, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_comes_to_say_what_its_teacher_says(
    dtype: str, task: RecoverTask, pico: Path, tmp_path: Path
) -> None:
    student = perturbed(pico, tmp_path / "student")
    config = task.config.model_copy(update={"steps": 60, "distill": 1.0, "temperature": 2.0})
    train(replace(task, model_dir=student, config=config, teacher=Teacher(pico, dtype)))
    losses = [line["loss"] for line in read_log(task.log_path)]
    assert 0 < np.mean(losses[-5:]) < 0.3 * losses[0]


def test_without_distillation_the_teacher_is_not_even_looked_for(task: RecoverTask, tmp_path: Path) -> None:
    alone = train(task)
    with_teacher = replace(task, target=tmp_path / "other", teacher=Teacher(tmp_path / "nowhere", "float32"))
    assert same(train(with_teacher), alone)


def test_distillation_without_a_teacher_is_an_error(task: RecoverTask) -> None:
    distilling = replace(task, config=task.config.model_copy(update={"distill": 0.5}))
    with pytest.raises(ConfigError, match=r"recover\.distill=0\.5 needs the dense model and none was given"):
        train(distilling)
    assert not task.log_path.exists()
