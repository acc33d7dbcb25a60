"""Products of weights and gradients, held against plain autograd; what refuses to be taken."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, NumericError
from cria_dist.methods import GradientSample
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.stages import gradients
from cria_dist.stages.gradients import GradientTaker, GradientTask, cut, unit_salience
from cria_dist.stages.prepare import prepare
from cria_dist.store.saliences import Saliences

SAMPLE = GradientSample(5, 2)
"""Shards of 2, 2 and 1 sequences."""

MakeTask = Callable[..., GradientTask]


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """Gradients of the first 5 of 6 sequences."""
    tokens_ST = np.random.default_rng(0).integers(0, 256, (6, 24)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens_ST)

    def make(model_dir: Path) -> GradientTask:
        saliences = Saliences(tmp_path / "gradients", "d1", tuple(one.stop - one.start for one in cut(SAMPLE)))
        return GradientTask(model_dir, tmp_path / "tokens.npy", checkpoint.Numerics(), saliences)

    return make


def plain_autograd(model_dir: Path, tokens_ST: np.ndarray, layer: int) -> np.ndarray:
    """Sum of ``|w * dL/dw|`` per neuron, one weight at a time, with the loss of ``transformers`` on the whole batch."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokens = torch.from_numpy(tokens_ST.astype(np.int64))
    model(input_ids=tokens, labels=tokens).loss.backward()
    mlp = model.model.layers[layer].mlp
    total_N = np.zeros(48)
    for unit in range(48):
        weights = [mlp.gate_proj.weight[unit], mlp.up_proj.weight[unit], mlp.down_proj.weight[:, unit]]
        slopes = [mlp.gate_proj.weight.grad[unit], mlp.up_proj.weight.grad[unit], mlp.down_proj.weight.grad[:, unit]]
        if mlp.gate_proj.bias is not None:
            weights += [mlp.gate_proj.bias[unit : unit + 1], mlp.up_proj.bias[unit : unit + 1]]
            slopes += [mlp.gate_proj.bias.grad[unit : unit + 1], mlp.up_proj.bias.grad[unit : unit + 1]]
        for weight, slope in zip(weights, slopes, strict=True):
            total_N[unit] += sum(abs(float(w) * float(g)) for w, g in zip(weight.detach(), slope, strict=True))
    return total_N


def test_worked_by_hand() -> None:
    """Rows are units of an incoming map, columns those of the outgoing one; signs never cancel."""
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    weight.grad = torch.tensor([[2.0, 1.0], [-1.0, 0.5]])
    assert unit_salience(weight, 0, 2).tolist() == [4.0, 5.0]  # |2| + |-2|, |-3| + |2|; the sums are 0 and -1
    assert unit_salience(weight, 1, 2).tolist() == [5.0, 4.0]
    bias = torch.tensor([-1.0, 2.0])
    bias.grad = torch.tensor([3.0, -0.5])
    assert unit_salience(bias, 0, 2).tolist() == [3.0, 1.0]
    assert unit_salience(bias, 0, 2).dtype == torch.float64


def test_a_tensor_without_gradient_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="took no part"):
        unit_salience(torch.ones(2), 0, 2)


@pytest.mark.parametrize("biases", [False, True])
def test_they_are_those_of_plain_autograd(
    biases: bool, make_task: MakeTask, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = make_model(tmp_path / "model", mlp_bias=biases)
    task = make_task(model_dir)
    taker = GradientTaker(task)
    assert [taker(shard) for shard in cut(SAMPLE)] == [48, 48, 24]
    tokens_ST = np.load(task.tokens_path)
    for layer in (0, 1):
        parts = [plain_autograd(model_dir, tokens_ST[shard.start : shard.stop], layer) for shard in cut(SAMPLE)]
        wanted_N = (2 * parts[0] + 2 * parts[1] + parts[2]) / 5
        np.testing.assert_allclose(task.saliences.mean(Site(layer)), wanted_N, rtol=1e-5)


def test_one_shard_of_all_sequences_is_the_papers_gradient(make_task: MakeTask, pico: Path) -> None:
    task = make_task(pico)
    task = replace(task, saliences=replace(task.saliences, counts=(5,)))
    (shard,) = cut(GradientSample(5, 5))
    GradientTaker(task)(shard)
    wanted_N = plain_autograd(pico, np.load(task.tokens_path)[:5], 1)
    np.testing.assert_allclose(task.saliences.mean(Site(1)), wanted_N, rtol=1e-5)


def test_shards_do_not_know_of_each_other(make_task: MakeTask, pico: Path, tmp_path: Path) -> None:
    """The same bytes whichever worker takes them, and in whatever order."""
    task = make_task(pico)
    taker = GradientTaker(task)
    for shard in cut(SAMPLE):
        taker(shard)
    apart = replace(task, saliences=replace(task.saliences, folder=tmp_path / "apart"))
    for shard in reversed(cut(SAMPLE)):
        GradientTaker(apart)(shard)
    for number in range(3):
        name = f"shard-{number:05d}.npz"
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "gradients" / name).read_bytes()


def test_gradients_are_kept_of_the_mlps_alone(make_task: MakeTask, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    load = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *given: models.append(load(*given)) or models[0])
    GradientTaker(make_task(pico))(cut(SAMPLE)[0])
    with_gradient = {name for name, parameter in models[0].named_parameters() if parameter.grad is not None}
    maps = ("gate_proj", "up_proj", "down_proj")
    assert with_gradient == {f"model.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in maps}


def test_gradients_that_are_not_finite_name_shard_and_site(make_task: MakeTask, pico: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(pico, tmp_path / "model")
    tensors = load_file(model_dir / checkpoint.WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 7] = float("inf")
    save_file(tensors, model_dir / checkpoint.WEIGHTS, metadata={"format": "pt"})
    task = make_task(model_dir)
    with pytest.raises(NumericError, match=r"^gradients of shard 1, layer-000\.mlp: the gradients of 48 of 48 units"):
        GradientTaker(task)(cut(SAMPLE)[1])
    assert not task.saliences.has(1)


def test_a_gpu_that_is_too_small_is_explained(make_task: MakeTask, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gradients, "mean_loss", refuse)
    with pytest.raises(ConfigError, match=r"^gradients of shard 0: out of GPU memory; .*data\.sequence_length"):
        GradientTaker(make_task(pico))(cut(SAMPLE)[0])


REFUSED = [
    ({"method": {"name": "taylor"}}, r"^taylor takes gradients of 16 sequences and there are 12 .*; lower sequences"),
    ({"compare": [{"name": "taylor", "sequences": 13}]}, r"^taylor takes gradients of 13 sequences"),
    (
        {"method": {"name": "taylor", "sequences": 12}, "model": {"dtype": "float16"}},
        r"^taylor needs gradients, most of which float16 rounds to zero; set model\.dtype=bfloat16",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_taken_is_said_before_anything_starts(
    changes: dict[str, object], message: str, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        prepare(run_config(tmp_path, **changes))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [{"method": {"name": "taylor"}}, {"compare": [{"name": "taylor"}]}])
def test_images_without_labels_have_no_loss(
    changes: dict[str, object], run_config: Callable[..., RunConfig], pico_vit: Path, tmp_path: Path
) -> None:
    images = {"source": "no-such-file.parquet", "format": "images", "field": "image"}
    config = run_config(tmp_path, model={"path": str(pico_vit)}, data={"calibration": images}, **changes)
    with pytest.raises(ConfigError, match=r"^taylor takes gradients of the loss and .* needs labels; set data\.calib"):
        prepare(config, "apply")
