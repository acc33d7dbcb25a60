"""Learning gates: held against plain autograd, the same with any number of workers, low for units nobody needs."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, NumericError
from cria_dist.methods import Eigenvalue, Receding
from cria_dist.methods.gates import GateMethod
from cria_dist.models import checkpoint
from cria_dist.records import Site
from cria_dist.stages import learn
from cria_dist.stages.learn import GatedModel, LearnTask
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import Place, read_log
from cria_dist.store.gates import Gates

SHORT: dict[str, Any] = {"steps": 5, "batch_sequences": 4, "sequence_length": 16}
SITES = [Site(0), Site(1)]
TOKENS_ST = np.random.default_rng(0).integers(0, 256, (12, 32)).astype(np.int32)

MakeTask = Callable[..., LearnTask]


@pytest.fixture
def make_task(pico: Path, tmp_path: Path) -> MakeTask:
    """``make_task(method, name="one", **changes)`` on the pico model; 24 training sequences of 16."""
    np.save(tmp_path / "tokens.npy", TOKENS_ST)

    def make(method: GateMethod, name: str = "one", **changes: Any) -> LearnTask:
        gates, log = Gates(tmp_path / name / "gates.npz", "d1"), tmp_path / name / "loss.jsonl"
        return replace(LearnTask(pico, tmp_path / "tokens.npy", gates, log, method, "highest", seed=0), **changes)

    return make


def learned(task: LearnTask) -> np.ndarray:
    """The gates of all sites after training in this process."""
    learn.train(task, Place())
    return np.concatenate([task.gates.read(site) for site in SITES])


def plain_autograd(model_dir: Path, tokens_SD: torch.Tensor) -> tuple[float, np.ndarray]:
    """Loss, and its derivative by a factor on each output column: that column's weights times their gradients."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    loss = model(input_ids=tokens_SD, labels=tokens_SD).loss
    loss.backward()
    columns = [layer.mlp.down_proj.weight for layer in model.model.layers]
    return loss.item(), np.concatenate([(one.detach() * one.grad).sum(dim=0).numpy() for one in columns])


# at the start, of 96 units: dgate/dw = 1 or 1 - opening; penalty: l1 + 2 l2 or strength * -ln(s) s (1 - s)
SLOPES = [
    (Eigenvalue(l1=3.0, l2=1.0), 1.0, (3.0 + 2.0) / 96),
    (Receding(strength=10.0, opening=0.75), 0.25, 10.0 / 96 * -np.log(0.75) * 0.75 * 0.25),
]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("method", "factor", "push"), SLOPES)
def test_one_step_takes_the_gradient_of_loss_and_penalty(
    method: GateMethod, factor: float, push: float, biases: bool, make_task: MakeTask, make_model: Callable[..., Path]
) -> None:
    model_dir = make_model(make_task(method).tokens_path.with_name("model"), mlp_bias=biases)
    blocks_SD = torch.from_numpy(TOKENS_ST[:3].astype(np.int64))
    gated = GatedModel(make_task(method, model_dir=model_dir))
    loss, penalty = gated.step(blocks_SD, 3, 1.0, Place())
    wanted_loss, slope_N = plain_autograd(model_dir, blocks_SD)
    assert loss == pytest.approx(wanted_loss, rel=1e-5), "the gated model starts as the model itself"
    start_N = np.full(96, method.start)
    assert penalty == pytest.approx(float(method.penalty(start_N)) / 96, rel=1e-12)
    found_N = np.concatenate([gated.learned[site].grad.numpy() for site in SITES])
    np.testing.assert_allclose(found_N, factor * slope_N + push, rtol=1e-3, atol=1e-6)
    after_N = np.concatenate([gated.learned[site].detach().numpy() for site in SITES])
    np.testing.assert_allclose(after_N, start_N - method.learning_rate * np.sign(found_N), rtol=1e-3)  # Adam's first


def test_gates_are_what_the_output_columns_are_multiplied_by(make_task: MakeTask, pico: Path, tmp_path: Path) -> None:
    task = make_task(Receding(**SHORT, opening=0.6, learning_rate=0.5, strength=0.0))
    gate_N = task.method.gate(learned(task))
    assert gate_N.min() < 0.5 < 1.2 < gate_N.max()
    tensors = load_file(pico / checkpoint.WEIGHTS)
    for layer, part_N in enumerate(np.split(gate_N, 2)):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= torch.from_numpy(part_N)
    model_dir = shutil.copytree(pico, tmp_path / "folded")
    save_file(tensors, model_dir / checkpoint.WEIGHTS, metadata={"format": "pt"})
    tokens_SD = torch.from_numpy(TOKENS_ST[:2].astype(np.int64))
    gated = GatedModel(make_task(task.method))
    for site in SITES:
        gated.learned[site].data.copy_(torch.from_numpy(task.gates.read(site)))
    assert gated.step(tokens_SD, 2, 0.0, Place())[0] == pytest.approx(plain_autograd(model_dir, tokens_SD)[0], rel=1e-5)


def test_the_same_task_gives_the_same_bytes_and_another_seed_another_order(make_task: MakeTask) -> None:
    method = Eigenvalue(**SHORT)
    task = make_task(method)
    first_N, content = learned(task), task.gates.path.read_bytes()
    assert (learned(make_task(method, "two")) == first_N).all()
    assert (learned(make_task(method, "three", seed=1)) != first_N).any()
    learn.train(task, Place())
    assert task.gates.path.read_bytes() == content


def test_every_step_is_logged_once(make_task: MakeTask) -> None:
    task = make_task(Eigenvalue(**SHORT))
    for _ in range(2):  # the second time as after an interruption
        learn.train(task, Place())
    lines = task.log_path.read_text().splitlines()
    assert [line["step"] for line in read_log(task.log_path)] == [1, 2, 3, 4, 5]
    assert len(lines) == 5
    assert all({"loss", "penalty", "seconds"} <= line.keys() for line in read_log(task.log_path))


@pytest.mark.parametrize("variant", ["gates", "all"])
def test_what_learns(variant: str, make_task: MakeTask, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    load = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", lambda *given: models.append(load(*given)) or models[0])
    before, content = load_file(pico / checkpoint.WEIGHTS), (pico / checkpoint.WEIGHTS).read_bytes()
    learn.train(make_task(Receding(**SHORT, variant=variant)), Place())
    after = models[0].state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == ({name for name in before if ".mlp." in name} if variant == "all" else set())
    frozen = [one for name, one in models[0].named_parameters() if ".mlp." not in name or variant == "gates"]
    assert all(one.grad is None for one in frozen)
    assert (pico / checkpoint.WEIGHTS).read_bytes() == content


def test_the_weights_have_a_rate_of_their_own(make_task: MakeTask, pico: Path) -> None:
    task = make_task(Receding(variant="all", weight_learning_rate=1e-5, learning_rate=1e-2))
    gated = GatedModel(task)
    gated.step(torch.from_numpy(TOKENS_ST[:1].astype(np.int64)), 1, 0.5, Place())
    moved = [abs(gated.learned[Site(0)].detach().numpy() - task.method.start).max()]
    weight = gated._model.get_parameter("model.layers.0.mlp.up_proj.weight").detach()
    before = load_file(pico / checkpoint.WEIGHTS)["model.layers.0.mlp.up_proj.weight"]
    moved.append(float((weight - before).abs().max()))
    assert moved == pytest.approx([5e-3, 5e-6], rel=1e-2)


def test_two_workers_learn_what_one_learns(make_task: MakeTask, tmp_path: Path) -> None:
    """Real processes; of 3 sequences the second worker has one, of 1 it has none."""
    methods = {
        "gates": Eigenvalue(**SHORT | {"batch_sequences": 3}, learning_rate=0.2),
        "few": Receding(**SHORT | {"batch_sequences": 1}),
        "all": Receding(**SHORT, variant="all", learning_rate=0.2, weight_learning_rate=1e-3),
    }
    together = [make_task(method, f"{name}-two") for name, method in methods.items()]
    (tmp_path / "tasks").write_bytes(pickle.dumps(together))
    script = str(Path(__file__).with_name("learn_process.py"))
    crew = [
        subprocess.Popen([sys.executable, script, tmp_path / "tasks", str(rank), "2", tmp_path / "meeting"])
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in crew] == [0, 0]
    for task, (name, method) in zip(together, methods.items(), strict=True):
        alone = make_task(method, name)
        found_N = np.concatenate([task.gates.read(site) for site in SITES])
        tolerance = 1e-4 if name == "all" else 1e-9
        np.testing.assert_allclose(found_N, learned(alone), rtol=0, atol=tolerance, err_msg=name)
        losses = [[line["loss"] for line in read_log(one.log_path)] for one in (task, alone)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_only_the_first_rank_writes(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "add_up", lambda tensors, place: None)  # there is no process group
    task = make_task(Eigenvalue(**SHORT))
    learn.train(task, Place(1, 2))
    assert not task.gates.path.exists()
    assert not task.log_path.exists()


def test_a_loss_that_is_not_finite_is_an_error(make_task: MakeTask, pico: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(pico, tmp_path / "spoilt")
    tensors = load_file(model_dir / checkpoint.WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model_dir / checkpoint.WEIGHTS, metadata={"format": "pt"})
    task = make_task(Eigenvalue(**SHORT), model_dir=model_dir)
    with pytest.raises(NumericError, match=r"^the loss of the gates is nan and .* at step 0; lower learning_rate"):
        learn.train(task, Place())
    assert not task.gates.there()


@pytest.mark.parametrize("method", [Eigenvalue(), Receding()], ids=lambda one: one.name)
def test_units_that_nobody_reads_end_lowest(method: GateMethod, stories: Path, tmp_path: Path) -> None:
    """Of a real model, 8 units of every layer: 4 whose output column is 0, 4 that never fire."""
    model_dir = shutil.copytree(stories, tmp_path / "model", copy_function=shutil.copyfile)
    tensors = load_file(stories / checkpoint.WEIGHTS)
    for layer in range(5):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, [3, 40, 77, 160]] = 0.0
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][[5, 41, 78, 161]] = 0.0
    (model_dir / checkpoint.WEIGHTS).unlink()
    save_file(tensors, model_dir / checkpoint.WEIGHTS, metadata={"format": "pt"})
    text = (stories / "TinyStories-valid-30k.txt").read_text()[:9000]
    tokens = checkpoint.load_tokenizer(stories)(text)["input_ids"]
    np.save(tmp_path / "tokens.npy", np.asarray(tokens[: 20 * 128], dtype=np.int32).reshape(20, 128))
    short = method.model_copy(update={"steps": 30, "batch_sequences": 4, "sequence_length": 128})
    gates = Gates(tmp_path / "gates.npz", "d1")
    learn.train(LearnTask(model_dir, tmp_path / "tokens.npy", gates, tmp_path / "log", short, "highest", 0), Place())
    for layer in range(5):
        keep_N = short.importance(gates.read(Site(layer)))
        idle = [3, 40, 77, 160, 5, 41, 78, 161]
        assert len(set(keep_N[idle].round(12))) == 1, "no data speaks for any of them"
        assert (np.delete(keep_N, idle) > keep_N[idle[0]]).mean() > 0.9


REFUSED = [
    (
        {"method": {"name": "eigenvalue"}},
        r"^eigenvalue learns from batches of 8 sequences of 256 tokens, and 384 calibration tokens are 1; lower batch",
    ),
    (
        {"compare": [{"name": "receding", "sequence_length": 32, "batch_sequences": 13}]},
        r"^receding learns from batches of 13 sequences of 32 tokens, and 384 calibration tokens are 12; lower",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_too_few_tokens_are_said_before_anything_starts(
    changes: dict[str, object], message: str, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        prepare(run_config(tmp_path, **changes))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [{"method": {"name": "eigenvalue"}}, {"compare": [{"name": "receding"}]}])
def test_images_without_labels_have_no_loss(
    changes: dict[str, object], run_config: Callable[..., RunConfig], pico_vit: Path, tmp_path: Path
) -> None:
    images = {"source": "no-such-file.parquet", "format": "images", "field": "image"}
    config = run_config(tmp_path, model={"path": str(pico_vit)}, data={"calibration": images}, **changes)
    with pytest.raises(ConfigError, match=r" takes gradients of the loss and .* needs labels; set data\.calib"):
        prepare(config, "apply")
