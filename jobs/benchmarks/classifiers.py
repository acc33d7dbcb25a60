"""Classifiers: accuracy by every method at the same ratios, pruned, repaired and recovered, on one table."""

import functools
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cria_dist import files
from cria_dist.config import RunConfig
from cria_dist.config_file import load, parse
from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint
from cria_dist.models.resnet_cifar import convert
from cria_dist.pipeline import Context, recovery, results, rounds, shrink
from cria_dist.pipeline.protocol import protocol
from cria_dist.pool import LocalPool
from cria_dist.records import Evaluation
from cria_dist.report.progress import Progress
from cria_dist.runtime import launch
from cria_dist.stages import recover
from cria_dist.stages.evaluate import AccuracyMeter, Variant
from cria_dist.stages.prepare import prepare
from jobs.benchmarks.frame import RESULTS, Measurement

ROOT = RESULTS / "classifiers"
DATA = "CLASSIFIERS"
"""Environment variable: a folder with ``sst2``, ``minilm-l6-sst2``, ``cifar10`` and ``resnet-cifar10``."""
RATIOS = (0.2, 0.4, 0.6)
STATES = ("pruned", "repaired", "recovered")
METHODS: Mapping[str, Mapping[str, object]] = {
    "conditional": {"name": "conditional"},
    "cria": {"name": "cria", "preset": "recommended"},
    "activation": {"name": "activation"},
    "wanda": {"name": "wanda"},
    "flap": {"name": "flap"},
    "taylor": {"name": "taylor", "sequences": 256, "shard_sequences": 32},
    "magnitude": {"name": "magnitude"},
    "random": {"name": "random"},
    "eigenvalue": {"name": "eigenvalue"},
    "receding": {"name": "receding"},
}
QUICK = (
    "data.calibration_sequences=256",
    "data.test_sequences=200",
    "record.shard_sequences=128",
    "record.tokens=1024",
    "recover.steps=4",
)
Found = dict[str, dict[str, float]]
"""Accuracy by state and ratio (``recovered 20``), then by method."""


@dataclass(frozen=True, slots=True)
class Task:
    """A model and its data.

    Attributes:
        config: the run.
        local: overrides for the local copies in a folder.
        hub: whether model and data can come from the hub.
        told: what must be known beside the protocol of the runs.
    """

    config: str
    local: Callable[[Path], list[str]]
    hub: bool
    told: tuple[str, ...] = ()


def _sst2(folder: Path) -> list[str]:
    columns = "field='sentence',label='label'"
    return [
        f"model.path={folder}/minilm-l6-sst2",
        f"data.calibration={{source='{folder}/sst2/train.tsv',{columns}}}",
        f"data.test={{source='{folder}/sst2/test.tsv',{columns}}}",
    ]


def _cifar10(depth: int, folder: Path) -> list[str]:
    model = ROOT / f"resnet{depth}"
    if not checkpoint.is_complete(model):
        convert(folder / "resnet-cifar10" / f"resnet{depth}.safetensors", model)
    columns = "format='images',field='image',label='label'"
    return [
        f"model.path={model}",
        f"data.calibration={{source='{folder}/cifar10/train.parquet',{columns}}}",
        f"data.test={{source='{folder}/cifar10/test.parquet',{columns}}}",
    ]


CHANNELS = (
    "Units: inner channels of the basic blocks; batch norm is folded into the convolutions, its statistics stay fixed.",
    "Published beside it (Receding Neuron Importances, ResNet-56, CIFAR-10 as lossless images; trained with its "
    "regulariser / 50 % / 90 % of the filters removed by one threshold over all layers, then 160 epochs of fine-tuning "
    "on 50,000 augmented images): 93.2 / 93.3 / 90.0 %; L1 slimming 94.0 / 93.4 / 89.9 %; uniform channel selection "
    "93.5 / 93.5 / 88.8 %. Here the net is pretrained without a regulariser, every block loses the same share, and the "
    "recovery is short and without augmentation.",
)
TASKS: Mapping[str, Task] = {
    "sst2": Task("jobs/configs/sst2.toml", _sst2, hub=True),
    "resnet20": Task("jobs/configs/cifar10.toml", functools.partial(_cifar10, 20), False, CHANNELS),
    "resnet56": Task("jobs/configs/cifar10.toml", functools.partial(_cifar10, 56), False, CHANNELS),
}


def measure(quick: bool) -> Measurement:
    """Prune by every method at every ratio; runs share recordings, scores and what is finished."""
    ROOT.mkdir(parents=True, exist_ok=True)
    told, metrics = list[str](), dict[str, float]()
    samples: dict[str, dict[str, list[float]]] = {}
    for name, task in TASKS.items():
        if not task.hub and DATA not in os.environ:
            told.append(f"{name}: left out, its weights are not on the hub; set {DATA} to a folder that has them.")
            continue
        found, sentences = _accuracies(name, task, quick)
        told += [f"{name}: {sentence}" for sentence in sentences]
        for quantity, by_method in found.items():
            samples[f"{name}, {quantity} %"] = {method: [value] for method, value in by_method.items()}
            metrics |= {f"{name} {quantity} {method}".replace(" ", "_"): value for method, value in by_method.items()}
    return Measurement("classifiers", tuple(told), metrics, samples, dict.fromkeys(samples, "share found"))


def _accuracies(name: str, task: Task, quick: bool) -> tuple[Found, list[str]]:
    """Accuracy of every variant of a task, and how it was measured; the table grows with every run."""
    make = functools.partial(_config, name, task, quick)
    found: Found = {f"{state} {ratio * 100:.0f}": {} for ratio in RATIOS for state in STATES}
    sentences: list[str] = []
    for method, ratio in itertools.product(METHODS, RATIOS):
        context = _context(make(method, ratio))
        dense, *others = _variants(context)
        if not sentences:
            found["dense"] = {"as given": _accuracy(dense), "trained by the same recipe": _trained(context)}
            sentences = [*_protocol(context), *task.told]
        for one in others:
            found[f"{one.label} {ratio * 100:.0f}"][method] = _accuracy(one)
        files.write_bytes(RESULTS / f"classifiers-{name}.md", table(name, found, sentences).encode())
    return found, sentences


def _context(config: RunConfig) -> Context:
    """A run in this process, with one thread as a worker has."""
    torch.set_num_threads(1)
    job = prepare(config)
    return Context(job, LocalPool(), launch.train_here, Progress(job.folder))


def _variants(context: Context) -> list[Evaluation]:
    """Prune, repair, recover and measure, without a report and without the proof that the result loads."""
    shrunk = shrink(context)
    if shrunk is None:
        raise RuntimeError(f"the run {context.job.config.name} stopped before its end")
    recovered = recovery.recover_model(context, shrunk.model)
    variants = results.main_variants(context, rounds.dense_model(context), shrunk.model, recovered)
    return results.evaluate_variants(context, variants)


def _protocol(context: Context) -> list[str]:
    config, recipe = context.job.config, context.job.config.recover
    digests = ", ".join(f"{key} {digest[:12]}" for key, digest in sorted(context.job.digests.items()))
    return [
        *(sentence for sentence in protocol(context) if not sentence.startswith(("Latency", "Compared"))),
        f"Repair: {config.prune.repair}. Recovery: {recipe.steps} steps of {recipe.batch_sequences} examples, learning "
        f"rate {recipe.learning_rate:g}, weight of the dense model's logits {recipe.distill:g}; the same for all.",
        f"Ratio: share of the units of every site; seed {config.seed}; digests: {digests}.",
    ]


def _config(name: str, task: Task, quick: bool, method: str, ratio: float) -> RunConfig:
    folder = os.environ.get(DATA)
    local = task.local(Path(folder)) if folder else []
    changes = [*local, *(QUICK if quick else ()), f"prune.ratio={ratio}", f"run.root={ROOT}", "run.pool=local"]
    tree = load(task.config, [*changes, f"name={name}-{method}"]).model_dump(exclude={"method", "compare"})
    return parse({**tree, "method": METHODS[method]})


def _accuracy(evaluation: Evaluation) -> float:
    if evaluation.accuracy is None:
        raise ConfigError(f"{evaluation.label} is no classifier; this benchmark measures accuracy")
    return evaluation.accuracy


def _trained(context: Context) -> float:
    """Accuracy of the dense model after the recipe of the recovery: what of a recovery is training alone."""
    job, config = context.job, context.job.config
    if job.test_labels_path is None:
        raise ConfigError("this benchmark needs labels; set data.calibration.label and data.test.label")
    digest = files.digest(job.digests, config.recover.content_part(), config.seed)
    folder = ROOT / f"{config.name}-dense-{digest[:8]}"
    if not checkpoint.is_complete(folder):
        teacher, log = recover.Teacher(job.model_dir, job.numerics.dtype), folder.with_name(f"{folder.name}.jsonl")
        what = job.model_dir, job.calibration_path, folder, log, config.recover, job.numerics.matmul, config.seed
        launch.train_here(recover.RecoverTask(*what, teacher, (), job.calibration_labels_path), "dense", folder)
    dense = Variant("dense", folder)
    results_of = {dense: folder.with_name(f"{folder.name}.json")}
    paths, batch = (job.test_path, job.test_labels_path), config.evaluate.batch_sequences
    return _accuracy(AccuracyMeter(paths, job.numerics, batch, results_of)(dense))


def table(name: str, found: Found, told: list[str]) -> str:
    """The task as a table in Markdown, with how it was measured below it."""
    columns = [quantity for quantity in found if quantity != "dense"]
    lines = [f"# {name}: accuracy in percent", ""]
    lines += [f"dense, {how}: {value:.1%}  " for how, value in found["dense"].items()]
    lines += ["", "| method | " + " | ".join(f"{one} %" for one in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in METHODS:
        cells = (f"{100 * found[one][method]:.1f}" if method in found[one] else "-" for one in columns)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in told)]) + "\n"
