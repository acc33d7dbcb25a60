"""Recoveries whose workers share the parameters out: they equal one worker that holds them all, and each other."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification

from cria_dist import files
from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.mlp import LAYER_WIDTHS
from cria_dist.stages import recover
from cria_dist.stages.check_recovery import check_recovery
from cria_dist.stages.examples import PADDING
from cria_dist.stages.halving import Race
from cria_dist.stages.prepare import prepare
from cria_dist.stages.recover import Place, RecoverTask, Teacher, read_log

pytestmark = pytest.mark.slow

RECIPES: dict[str, dict[str, Any]] = {
    "all": {"train": "all", "patience": 5, "batch_sequences": 6},
    "distilled": {"train": "all", "distill": 0.5, "distill_hidden": 0.3},
    "half": {"dtype": "bfloat16", "distill": 0.5, "patience": 5},
    "adapted": {"lora_rank": 3, "distill": 0.5, "checkpoint_activations": True, "patience": 5},
    "experts": {"train": "all", "distill": 0.5},
    "sparse": {"train": "mlp", "checkpoint_activations": True},
    "sentences": {"train": "all", "patience": 5, "distill": 0.5, "batch_sequences": 6},
    "images": {"patience": 5, "distill": 0.5},
    "half-images": {"dtype": "bfloat16"},
    "channels": {"train": "all", "patience": 5, "shift_pixels": 2},
}
"""``all``: nine sequences are trained on and one is held out, so that one of two workers has none to look at.
``experts``: of three, one worker has two; what makes up one tensor in memory lies in several files.
``sentences``: nine are held out, in groups of four, so that one of two workers looks twice and the other once; of the
seven ``images``, both look once.
"""
CLASSIFIERS = {
    "sentences": (90, 12),
    "images": (70, 3, 16, 16),
    "half-images": (8, 3, 16, 16),
    "channels": (20, 3, 32, 32),
}
"""Examples of each, by their shape."""
RESUMED = ("all", "adapted", "sentences")
QUICK = ("all", "distilled", "half", "sparse")
"""The rest take a minute and a half together."""


def each(recipes: Iterable[str]) -> pytest.MarkDecorator:
    """One test per recipe."""
    marks = {recipe: () if recipe in QUICK else pytest.mark.soak for recipe in recipes}
    return pytest.mark.parametrize("recipe", [pytest.param(name, marks=mark) for name, mark in marks.items()])


WORLD = 2
WITH_ZEROS = "model.layers.0.mlp.down_proj.weight"

Job = tuple[RecoverTask, Path | None]


@dataclass(frozen=True)
class Trainings:
    """Recoveries by name: a recipe alone, with ``-2`` by two workers, with ``-1-2`` or ``-2-2`` by two who go on."""

    folder: Path
    models: dict[str, Path]
    tasks: dict[str, RecoverTask] = field(default_factory=dict)

    def task(self, recipe: str, followed: str = "") -> RecoverTask:
        """A new recovery of a recipe; two workers share the model out."""
        settings = {"steps": 8, "batch_sequences": 4, "sequence_length": 16, "learning_rate": 2e-3, "distill": 0}
        settings |= {"checkpoint_every": 3, "strategy": "fsdp2" if followed else "ddp", **RECIPES[recipe]}
        model = self.models.get(recipe, self.models["tied" if recipe in ("all", "half") else "untied"])
        name = recipe + followed
        (self.folder / name).mkdir()
        outputs = (self.folder / name / "recovered", self.folder / name / "loss.jsonl")
        held = (WITH_ZEROS,) if recipe == "sparse" else ()
        labels = self.folder / f"{recipe}-labels.npy" if recipe in CLASSIFIERS else None
        data = self.folder / f"{recipe if labels else 'tokens'}.npy"
        config = RecoverConfig.model_validate(settings)
        teacher = Teacher(self.models.get(f"{recipe}-teacher", self.models["teacher"]), "float32")
        self.tasks[name] = RecoverTask(model, data, *outputs, config, "highest", 0, teacher, held, labels)
        return self.tasks[name]

    def state(self, name: str, step: int = 3) -> Path:
        """The first worker's checkpoint after a step."""
        return self.folder / name / "states" / f"{step}-0"

    def alone(self, task: RecoverTask, resume: Path | None = None) -> dict[str, torch.Tensor]:
        def save(step: int, write: Callable[[Path], None]) -> None:
            folder = task.log_path.parent / "states" / f"{step}-0"
            folder.mkdir(parents=True)
            write(folder)

        recover.train(task, Place(), resume, save)
        return self.weights(task)

    def together(self, jobs: list[Job]) -> None:
        (self.folder / "jobs").write_bytes(pickle.dumps(jobs))
        script = str(Path(__file__).with_name("recover_process.py"))
        crew = [
            subprocess.Popen([sys.executable, script, self.folder / "jobs", str(rank), str(WORLD), self.folder / "met"])
            for rank in range(WORLD)
        ]
        assert [process.wait(timeout=240) for process in crew] == [0] * WORLD

    def losses(self, name: str) -> dict[int, tuple[float, float]]:
        """By step; with the held-out loss, or 0 where there was no look."""
        return {line["step"]: (line["loss"], line.get("held_out", 0.0)) for line in read_log(self.tasks[name].log_path)}

    def weights(self, task: RecoverTask) -> dict[str, torch.Tensor]:
        return {
            name: tensor
            for file in sorted(task.target.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }


def narrower(source: Path, target: Path) -> Path:
    """A classifier without the last neurons of its layers, as many left in each as in no other."""
    config, tensors = checkpoint.read_config(source), load_file(source / checkpoint.WEIGHTS)
    family, widths = family_of(config), [20, 36, 48]
    for site, width in zip(family.widths(config), widths, strict=True):
        for name, dimension in family.coupled_tensors(site, config).items():
            tensors[name] = tensors[name].narrow(dimension, 0, width).contiguous()
    shutil.copytree(source, target)
    save_file(tensors, target / checkpoint.WEIGHTS, metadata={"format": "pt"})
    files.write_json(target / "config.json", {**config, LAYER_WIDTHS: widths})
    return target


def save_net(folder: Path) -> Path:
    """A small ResNet of bottleneck blocks."""
    shape = {"depths": [1, 1], "inner_channels": [8, 8], "channels": [16, 24], "stem_channels": 8, "image_size": 32}
    torch.manual_seed(2)
    settings = AutoConfig.for_model("resnet_bottleneck", num_labels=2, **shape)
    AutoModelForImageClassification.from_config(settings).save_pretrained(folder)
    return folder


def save_examples(folder: Path) -> None:
    """What the classifiers learn from: sentences of 4 to 12 tokens, and images, whose labels can be told."""
    rng = np.random.default_rng(1)
    for name, shape in CLASSIFIERS.items():
        if len(shape) == 2:
            inputs = rng.integers(3, 256, shape).astype(np.int32)
            labels = inputs[:, 1] % 2
            inputs[np.arange(shape[1]) >= rng.integers(4, shape[1] + 1, (shape[0], 1))] = PADDING
        else:
            inputs = rng.normal(size=shape).astype(np.float32)
            labels = (inputs.mean(axis=(1, 2, 3)) > 0).astype(np.int64)
        np.save(folder / f"{name}.npy", inputs)
        np.save(folder / f"{name}-labels.npy", labels)


@pytest.fixture(scope="module")
def classifiers(pico_bert: Path, pico_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classifiers")
    return {
        "sentences": narrower(pico_bert, folder / "bert"),
        "sentences-teacher": pico_bert,
        "images": narrower(pico_vit, folder / "vit"),
        "images-teacher": pico_vit,
        "half-images": pico_vit,
        "channels": save_net(folder / "resnet"),
    }


@pytest.fixture(scope="module")
def trainings(
    request: pytest.FixtureRequest,
    pico: Path,
    classifiers: dict[str, Path],
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trainings:
    """The recipes of the tests that run, alone and by two workers, and some by two who go on."""
    asked = {item.callspec.params.get("recipe") for item in request.session.items if hasattr(item, "callspec")}
    recipes = [recipe for recipe in RECIPES if recipe in asked or recipe in ("all", "distilled", "sparse")]
    folder = tmp_path_factory.mktemp("shards")
    save_examples(folder)
    untied = make_model(folder / "untied", dtype="bfloat16", shard_size="20KB", tie_word_embeddings=False)
    sparse = shutil.copytree(pico, folder / "sparse-model")
    tensors = load_file(sparse / checkpoint.WEIGHTS)
    tensors[WITH_ZEROS][::2, 1::3] = 0
    save_file(tensors, sparse / checkpoint.WEIGHTS, metadata={"format": "pt"})
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, (10, 16)).astype(np.int32))
    mixture = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    experts = make_model(folder / "experts-model", "qwen3_moe", shard_size="20KB", **mixture)
    models = {"tied": pico, "untied": untied, "sparse": sparse, "teacher": sparse, "experts": experts}
    them = Trainings(folder, models | classifiers)
    for recipe in recipes:
        them.alone(them.task(recipe))
    jobs: list[Job] = [(them.task(recipe, "-2"), None) for recipe in recipes]
    for recipe in (name for name in RESUMED if name in recipes):
        jobs += [
            (them.task(recipe, "-1-2"), them.state(recipe)),
            (them.task(recipe, "-2-2"), them.state(f"{recipe}-2")),
        ]
    offloaded = them.task("distilled", "-2-cpu")
    jobs.append((replace(offloaded, config=offloaded.config.model_copy(update={"teacher": "cpu"})), None))
    assert Race(folder / "rungs", "better", 3, 2).goes_on(3, 0.0)
    behind = replace(them.task("all", "-2-race"), race=Race(folder / "rungs", "ours", 3, 2))
    them.together([*jobs, (behind, None)])
    return them


@each(RECIPES)
def test_two_workers_that_share_the_model_equal_one_that_has_it(recipe: str, trainings: Trainings) -> None:
    """In mixed precision, what is rounded is rounded elsewhere.

    A key's bias adds the same to all scores of a query, which softmax takes out again: its gradient is rounding alone,
    and AdamW's steps, eight of at most 2e-3, as long as any.
    """
    alone, shared = trainings.losses(recipe), trainings.losses(f"{recipe}-2")
    assert alone.keys() == shared.keys() == set(range(1, 9))
    half = "dtype" in RECIPES[recipe]
    np.testing.assert_allclose(
        list(shared.values()), list(alone.values()), atol=5e-3 if half else 1e-5, rtol=5e-3 if half else 1e-7
    )
    one, two = trainings.tasks[recipe].target, trainings.tasks[f"{recipe}-2"].target
    assert {path.name: path.stat().st_size for path in one.iterdir()} == {
        path.name: path.stat().st_size for path in two.iterdir()
    }
    mine, theirs = trainings.weights(trainings.tasks[recipe]), trainings.weights(trainings.tasks[f"{recipe}-2"])
    assert mine.keys() == theirs.keys()
    for name in mine:
        tolerance = 4e-2 if name.endswith("key.bias") else 1e-2 if half else 3e-4
        assert mine[name].shape == theirs[name].shape
        assert torch.allclose(mine[name].float(), theirs[name].float(), atol=tolerance), name


def test_the_place_of_a_shared_teacher_changes_nothing(trainings: Trainings) -> None:
    beside, offloaded = "distilled-2", "distilled-2-cpu"
    assert trainings.losses(offloaded) == trainings.losses(beside)
    expected, found = (trainings.weights(trainings.tasks[name]) for name in (beside, offloaded))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@each(RESUMED)
def test_two_workers_go_on_where_one_or_two_were(recipe: str, trainings: Trainings) -> None:
    """To the bit where two were."""
    whole = trainings.losses(f"{recipe}-2")
    rest = {step: loss for step, loss in whole.items() if step > 3}
    assert trainings.losses(f"{recipe}-2-2") == rest
    np.testing.assert_allclose(list(trainings.losses(f"{recipe}-1-2").values()), list(rest.values()), atol=1e-5)
    expected, found = (trainings.weights(trainings.tasks[name]) for name in (f"{recipe}-2", f"{recipe}-2-2"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_two_workers_stop_together_when_they_fall_behind(trainings: Trainings) -> None:
    whole = trainings.losses("all-2")
    assert trainings.losses("all-2-race") == {step: loss for step, loss in whole.items() if step <= 3}
    expected, found = (load_file(trainings.state(name) / "state.safetensors") for name in ("all-2", "all-2-race"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not trainings.tasks["all-2-race"].target.exists()


@each(RESUMED)
def test_one_worker_goes_on_where_two_were(recipe: str, trainings: Trainings) -> None:
    trainings.alone(trainings.task(recipe, "-2-1"), trainings.state(f"{recipe}-2"))
    rest = {step: loss for step, loss in trainings.losses(recipe).items() if step > 3}
    found = trainings.losses(f"{recipe}-2-1")
    assert found.keys() == rest.keys()
    np.testing.assert_allclose(list(found.values()), list(rest.values()), atol=1e-5)


def test_checkpoints_are_the_same_files_for_any_number_of_workers(trainings: Trainings) -> None:
    one, two = (trainings.state(name, 6) for name in ("all", "all-2"))
    assert [path.name for path in two.iterdir()] == [path.name for path in one.iterdir()] == ["state.safetensors"]
    mine, theirs = (load_file(folder / "state.safetensors") for folder in (one, two))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }
    assert not list((trainings.folder / "all-2" / "states" / "6-1").iterdir()), "the first worker writes"


def test_zeros_stay_zero(trainings: Trainings) -> None:
    before = load_file(trainings.models["sparse"] / checkpoint.WEIGHTS)[WITH_ZEROS]
    after = trainings.weights(trainings.tasks["sparse-2"])[WITH_ZEROS]
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("recover", "message"),
    [
        ({"distill_hidden": 1.0, "distill_layers": [1, 2]}, r"distill_layers names layer 2 and the model has 2"),
    ],
)
def test_what_does_not_go_together(
    recover: dict[str, Any], message: str, run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(run_config(tmp_path, recover={"strategy": "fsdp2", **recover}))


def test_classifiers_share_parameters_and_compare_no_hidden_states(
    run_config: Callable[..., RunConfig], pico_vit: Path, tmp_path: Path
) -> None:
    model_config = checkpoint.read_config(pico_vit)
    family = family_of(model_config)
    check_recovery(run_config(tmp_path, recover={"strategy": "fsdp2"}), family, model_config)
    with pytest.raises(ConfigError, match=r"is for language models; set recover\."):
        check_recovery(run_config(tmp_path, recover={"distill_hidden": 0.5}), family, model_config)


def test_how_many_share_is_no_part_of_a_result(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def parts(strategy: str) -> list[dict[str, Any]]:
        settings = [{"strategy": strategy, "workers": workers} for workers in (1, 2)]
        return [run_config(tmp_path, recover=one).result_part()["recover"] for one in settings]

    shared, whole = parts("fsdp2"), parts("ddp")
    assert shared[0] == shared[1]
    assert shared[0]["strategy"] == "fsdp2"
    assert whole[0] == whole[1]
    assert "strategy" not in whole[0]
