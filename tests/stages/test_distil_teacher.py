"""Where the dense model lies: it says the same from everywhere, to the bit, and takes the room that it should."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.blocks import skeleton
from cria_dist.models.family import family_of
from cria_dist.stages import distil_teacher, recover, recover_shards
from cria_dist.stages.check_recovery import check_recovery
from cria_dist.stages.distil import Distillation, LabelDistillation
from cria_dist.stages.distil_hidden import Hidden
from cria_dist.stages.distil_teacher import Teacher, answer_on, load_offloaded, load_spread, load_teacher, spread
from cria_dist.stages.examples import Data, Examples
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import Place, RecoverTask, read_log

EXACT = checkpoint.Numerics()
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "gemma2": {},
    "gpt2": {},
    "opt": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
"""Heads of their own and tied ones, positions and experts among the parameters."""
CLASSIFIERS = ("vit", "bert")


@pytest.fixture(scope="module")
def models(
    make_model: Callable[..., Path], pico_vit: Path, pico_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    decoders = {name: make_model(folder / name, name, **changes) for name, changes in MODELS.items()}
    return {**decoders, "vit": pico_vit, "bert": pico_bert}


def examples(name: str) -> Data:
    draw = np.random.default_rng(0)
    if name == "vit":
        return Examples(draw.normal(size=(2, 3, 16, 16)).astype(np.float32), np.array([1, 3]))
    tokens = draw.integers(3, 256, (2, 20))
    return Examples(tokens.astype(np.int32), np.array([0, 1])) if name == "bert" else torch.from_numpy(tokens)


def lesson(name: str, directory: Path, teacher: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a student that differs from its teacher, in two calls."""
    student = checkpoint.load_model(directory, EXACT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
    hidden = Hidden(0.3, ((1, 1), (2, 2)))
    objective = LabelDistillation(teacher, 0.5, 2.0) if name in CLASSIFIERS else Distillation(teacher, 0.5, 2.0, hidden)
    loss = sum(objective(student, examples(name), 0.5) for _ in range(2))
    return loss, {name: p.grad.cpu() for name, p in student.named_parameters() if p.grad is not None}


def same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> bool:
    """To the bit, but for GPUs, which do not always add up in the same order."""
    if torch.cuda.is_available():
        near = (torch.allclose(one[1][name], slope, rtol=1e-3, atol=1e-5) for name, slope in other[1].items())
        return one[0] == pytest.approx(other[0], rel=1e-5) and all(near)
    return one[0] == other[0] and all(torch.equal(one[1][name], slope) for name, slope in other[1].items())


def at_home(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the parameters that are there to compute with, by name."""
    return {name: p.nbytes for name, p in model.named_parameters() if p.device.type != "meta"}


class WeightsThere(TorchDispatchMode):
    """Bytes of a model's parameters that are there at most, looked at whenever anything is computed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model, self.peak = model, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.peak = max(self.peak, sum(at_home(self._model).values()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MODELS, *CLASSIFIERS])
def test_offloaded_weights_come_one_module_at_a_time(name: str, models: dict[str, Path]) -> None:
    """Between calls none are there but the head's."""
    beside = lesson(name, models[name], checkpoint.load_model(models[name], EXACT))
    teacher = load_offloaded(models[name], EXACT)
    body, before = teacher.base_model, at_home(teacher)
    with WeightsThere(body) as weights:
        found = lesson(name, models[name], teacher)
    assert same(found, beside)
    largest = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in body.modules())
    assert largest <= weights.peak < 1.5 * largest, "ViT's embeddings have some beside those of the map within"
    assert at_home(teacher) == before
    assert not at_home(body)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_recovery_is_the_same_wherever_its_teacher_lies(task: RecoverTask, pico: Path, tmp_path: Path) -> None:
    found: list[tuple[list[float], bytes]] = []
    for place in ("beside", "cpu"):
        config = task.config.model_copy(update={"distill": 0.5, "teacher": place})
        paths = {"target": tmp_path / place, "log_path": tmp_path / f"{place}.jsonl"}
        recover.train(replace(task, config=config, teacher=Teacher(pico, "bfloat16"), **paths), Place(), None, print)
        losses = [line["loss"] for line in read_log(paths["log_path"])]
        found.append((losses, (paths["target"] / checkpoint.WEIGHTS).read_bytes()))
    assert found[0] == found[1]


@pytest.mark.usefixtures("group_of_one")
def test_slices_of_a_shared_teacher_lie_in_main_memory(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[Any] = []
    shard = recover_shards.fully_shard

    def spy(module: torch.nn.Module, **settings: Any) -> Any:
        policies.append(settings["offload_policy"])
        return shard(module, **settings)

    monkeypatch.setattr(recover_shards, "fully_shard", spy)
    config = RecoverConfig(strategy="fsdp2", teacher="cpu")
    teacher = load_teacher(Teacher(models["llama"], "float32"), config, "highest", Place(0, 2))
    assert len(policies) == 3
    assert all(isinstance(one, CPUOffloadPolicy) for one in policies)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}
    whole = lesson("llama", models["llama"], checkpoint.load_model(models["llama"], EXACT))
    assert same(lesson("llama", models["llama"], teacher), whole)


# GPUs of its own


def room(model: PreTrainedModel, parts: int) -> dict[int, int]:
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {3 + number: size for number in range(parts)}


@pytest.mark.parametrize("name", MODELS)
def test_a_teacher_is_spread_by_whole_layers(name: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """With what places its modules on devices, all of which are the CPU in this test, it says the same."""
    directory = make_model(tmp_path / "model", name, num_hidden_layers=6, **MODELS[name])
    model = skeleton(directory, EXACT)
    model.tie_weights()
    free = room(model, 2)
    found = spread(model, {number: 2 * size for number, size in free.items()})
    assert set(found.values()) == set(free)
    layers = family_of(model.config.to_dict()).layers
    assert not [one for one in found if one.startswith(f"{layers}.") and one.count(".") > layers.count(".") + 1]
    teacher, beside = checkpoint.load_model(directory, EXACT, {"": "cpu"}), checkpoint.load_model(directory, EXACT)
    dispatch_model(teacher, dict.fromkeys(found, "cpu"), force_hooks=True)
    for called in (teacher.base_model, teacher.get_output_embeddings()):
        answer_on(called, beside.device)
    assert same(lesson(name, directory, teacher), lesson(name, directory, beside))


def test_room_on_gpus(models: dict[str, Path]) -> None:
    model = skeleton(models["llama"], EXACT)
    (size,) = room(model, 1).values()
    assert spread(model, {3: 2 * size}) == {"": 3}
    with pytest.raises(ConfigError, match=r"recover\.teacher_gpus=2: the dense model has 0\.0 GiB.*raise recover\.tea"):
        spread(model, {3: size // 4, 4: size // 4})


def test_it_is_called_from_another_device_and_answers_there() -> None:
    """Inputs go to the module's device: without weights (meta) nothing else can be multiplied with them."""
    module = torch.nn.Linear(3, 2, device="meta")
    answer_on(module, torch.device("meta"))
    assert module(torch.ones(1, 3)).device.type == "meta"
    module = torch.nn.Linear(3, 2)
    answer_on(module, torch.device("meta"))
    assert module(input=torch.ones(1, 3)).device.type == "meta"


def test_only_a_worker_with_spare_gpus_spreads_it(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[int, int]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1000 * number, 10**9))
    monkeypatch.setattr(distil_teacher, "load_spread", lambda directory, numerics, free: seen.append(free))
    teacher = Teacher(models["llama"], "float32")
    load_teacher(teacher, RecoverConfig(teacher_gpus=2), "highest", Place(0, 1, (4, 5)))
    assert seen == [{4: 3600, 5: 4500}]
    assert isinstance(load_teacher(teacher, RecoverConfig(), "highest", Place()), PreTrainedModel)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*MODELS, *CLASSIFIERS])
@pytest.mark.parametrize("parts", [1, 2])
def test_on_gpus_it_says_the_same_from_everywhere(name: str, parts: int, models: dict[str, Path]) -> None:
    if torch.cuda.device_count() < 1 + parts:
        pytest.skip(f"{1 + parts} CUDA devices wanted")
    beside = lesson(name, models[name], checkpoint.load_model(models[name], EXACT))
    free = dict.fromkeys(range(1, 1 + (1 if name in CLASSIFIERS else parts)), 1 << 30)
    assert same(lesson(name, models[name], load_spread(models[name], EXACT, free)), beside)


@pytest.mark.gpu
def test_on_a_gpu_offloading_takes_less_of_it(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """16 layers of 13 MB; at a time the largest of their maps is there, and the head."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    wide = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8}
    directory = make_model(tmp_path / "wide", head_dim=64, num_key_value_heads=8, **wide)
    tokens_ST = torch.arange(32, device="cuda").reshape(1, 32)
    peaks: list[int] = []
    for load in (checkpoint.load_model, load_offloaded):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        teacher = load(directory, EXACT).requires_grad_(False)
        teacher.base_model(input_ids=tokens_ST, use_cache=False)
        peaks.append(torch.cuda.max_memory_allocated() - start)
        del teacher
    assert peaks[1] < 0.15 * peaks[0]


# settings


def test_where_it_lies_is_no_part_of_a_result(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    plain = run_config(tmp_path, recover={"distill": 0.5})
    for place in ({"teacher": "cpu"}, {"teacher_gpus": 2}):
        placed = run_config(tmp_path, recover={"distill": 0.5, **place})
        assert placed.result_part() == plain.result_part()
        assert placed.recover != plain.recover


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "cpu", "distill": 0}, r"teacher='cpu' places the dense model, and nothing is learned from it"),
        ({"teacher_gpus": 1, "distill": 0}, r"teacher_gpus=1, and nothing is learned from the dense model; raise"),
        ({"teacher_gpus": 1, "teacher": "cpu"}, r"recover\.teacher='cpu' is another place .*; set one of them only"),
        ({"teacher_gpus": 1, "strategy": "fsdp2"}, r"strategy='fsdp2' shares the dense model out .*; set it to 0"),
        ({"teacher_gpus": 1, "run": {"pool": "local"}}, r"run\.pool='local' trains in this process.*set it to 0"),
        ({"teacher_gpus": 1, "run": {"gpus_per_worker": 0}}, r"run\.gpus_per_worker=0 gives training workers none"),
    ],
)
def test_places_that_are_none(
    settings: dict[str, Any], message: str, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = {"pool": "ray", **settings.pop("run", {})}
    with pytest.raises(ConfigError, match=message):
        prepare(run_config(tmp_path, run=run, recover={"distill": 0.5, **settings}))


@pytest.mark.parametrize("number", [1, 2])
def test_a_classifier_takes_one_gpu(
    number: int, pico_vit: Path, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    shape = checkpoint.read_config(pico_vit)
    config = run_config(tmp_path, run={"pool": "ray"}, recover={"distill": 0.5, "teacher_gpus": number})
    if number == 1:
        check_recovery(config, family_of(shape), shape)
        return
    with pytest.raises(ConfigError, match=r"teacher_gpus=2, and a classifier fits one GPU; set it to 1"):
        check_recovery(config, family_of(shape), shape)
