"""Learning from hidden states: which belong together, how far they are apart, and that it is off unless asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned
from cria_dist.pipeline import prune
from cria_dist.stages import distil, recover
from cria_dist.stages.distil import Distillation
from cria_dist.stages.distil_hidden import Hidden, paired_states, relative_error
from cria_dist.stages.recover import Place, RecoverTask, Teacher, read_log


@pytest.fixture
def tokens_ST() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 12)))


def load(directory: Path) -> PreTrainedModel:
    return checkpoint.load_model(directory, checkpoint.Numerics())


def test_an_error_by_hand() -> None:
    """Each token by its own norm: (1 + 0) / (9 + 16) and 400 / 40,000."""
    hidden_STD = torch.tensor([[[3.0, 5.0], [200.0, 20.0]]])
    taught_STD = torch.tensor([[[3.0, 4.0], [200.0, 0.0]]])
    assert float(relative_error(hidden_STD, taught_STD)) == pytest.approx((1 / 25 + 1 / 100) / 2)


@pytest.mark.parametrize(
    ("kept", "chosen", "pairs"),
    [
        (None, (), ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6))),
        ((0, 1, 4, 5), (), ((1, 1), (2, 4), (3, 5), (4, 6))),
        ((1, 2), (), ((1, 2), (2, 6))),
        ((0, 1, 4, 5), (1, 3, 5), ((2, 4), (4, 6))),
    ],
)
def test_a_layer_learns_what_the_next_one_expects(
    kept: tuple[int, ...] | None, chosen: tuple[int, ...], pairs: tuple[tuple[int, int], ...]
) -> None:
    assert paired_states(kept, 6, RecoverConfig(distill_layers=chosen)) == pairs


def test_layers_that_all_left_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"distill_layers=\[2, 3\]: none of them is left; choose among \[0, 1\]"):
        paired_states((0, 1), 4, RecoverConfig(distill_layers=(2, 3)))


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_loss_and_gradients_are_those_of_the_definition(weight: float, pico: Path, tokens_ST: torch.Tensor) -> None:
    student, teacher = load(pico), load(pico)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = Distillation(teacher, weight, 2.0, Hidden(0.7, ((1, 1), (2, 2))))(student, tokens_ST, 0.5)
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    without = Distillation(teacher, weight, 2.0)(student, tokens_ST, 0.5)
    mine, its = (
        model(input_ids=tokens_ST[:, :-1], output_hidden_states=True).hidden_states for model in (student, teacher)
    )
    apart = sum(((a - b) ** 2).sum(-1).div((b**2).sum(-1)).mean() for a, b in zip(mine[1:], its[1:], strict=True)) / 2
    (0.5 * 0.7 * apart).backward()
    assert found == pytest.approx(without + 0.35 * float(apart.detach()), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_a_model_without_a_layer_that_did_nothing_has_nothing_to_learn(
    make_model: Callable[..., Path], tokens_ST: torch.Tensor, tmp_path: Path
) -> None:
    teacher = load(make_model(tmp_path / "model", num_hidden_layers=4))
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            teacher.get_submodule(f"model.layers.2.{name}").weight.zero_()
    teacher.save_pretrained(tmp_path / "model")
    plan = {f"layer-{layer:03d}.block": () if layer == 2 else (0,) for layer in range(4)}
    config = checkpoint.read_config(tmp_path / "model")
    write_pruned(tmp_path / "model", tmp_path / "pruned", Surgery(family_of(config), config, plan))
    student, kept = load(tmp_path / "pruned"), (0, 1, 3)
    for pairs, expected in ((paired_states(kept, 4, RecoverConfig()), 0.0), (((2, 2), (3, 3)), 0.1)):
        hidden = Hidden(1.0, pairs)
        found = hidden.loss(*(distil.states(one, tokens_ST, True).hidden_states for one in (student, teacher)))
        assert (float(found.detach()) > expected) == (expected > 0), pairs


def test_it_brings_the_states_together(task: RecoverTask, pico: Path, tmp_path: Path) -> None:
    half = replace(task, teacher=Teacher(pico, "float32"))
    noisy = load(pico)
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    noisy.save_pretrained(tmp_path / "noisy")
    config = task.config.model_copy(update={"steps": 40, "distill": 1.0, "distill_hidden": 10.0})
    recover.train(replace(half, model_dir=tmp_path / "noisy", config=config), Place(), None, lambda step, write: None)
    losses = [line["loss"] for line in read_log(task.log_path)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_off_it_leaves_weights_and_digests_alone(task: RecoverTask, tmp_path: Path) -> None:
    files: list[bytes] = []
    task = replace(task, teacher=Teacher(task.model_dir, "float32"))
    for number, off in enumerate(({}, {"distill_hidden": 0.0, "distill_layers": (1,)})):
        config = task.config.model_copy(update={"distill": 0.5, "steps": 3, **off})
        recover.train(replace(task, config=config, target=tmp_path / str(number)), Place(), None, lambda *_: None)
        files.append((tmp_path / str(number) / checkpoint.WEIGHTS).read_bytes())
    assert files[0] == files[1]
    assert RecoverConfig(distill_layers=(1,)).content_part() == RecoverConfig().content_part()
    on = RecoverConfig(distill=0, distill_hidden=0.5, distill_layers=(1,)).content_part()
    assert (on["distill_hidden"], on["distill_layers"]) == (0.5, [1])


def test_a_run_that_removes_layers_tells_which_are_left(
    run_config: Callable[..., RunConfig],
    make_context: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...] | None] = []
    pairs = distil.paired_states

    def spy(kept: tuple[int, ...] | None, total: int, config: RecoverConfig) -> Any:
        seen.append(kept)
        return pairs(kept, total, config)

    monkeypatch.setattr(distil, "paired_states", spy)
    config = run_config(
        tmp_path,
        method={"name": "block_influence"},
        prune={"ratio": 0.4, "budget": "units"},
        recover={"steps": 1, "distill": 0, "distill_hidden": 0.5},
    )
    context = make_context(config, until="recover")
    prune(context, until="recover")
    assert len(seen) == 1
    assert seen[0] in ((0,), (1,))
