"""The README.md of a checkpoint: what it is, how it was made and measured, who loads it, under which licence.

Everything in it comes from the report and the base model's own card; times, which no two runs share, are left out.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from cria_dist.files import write_bytes
from cria_dist.models import checkpoint
from cria_dist.models.mlp import layers_differ
from cria_dist.records import Evaluation, Report
from cria_dist.report import grids, text
from cria_dist.report.metrics import metric_of

CARD, BASE_CARD = "README.md", "BASE_MODEL.md"
CARRIED = ("license", "license_name", "license_link", "language")
"""What the front matter takes over from the base model's."""


ABSENT = ("Latency:", "Compared methods:")
"""Beginnings of what the report says of numbers that are not in a card."""


@dataclass(frozen=True, slots=True)
class Base:
    """The model that was pruned.

    Attributes:
        path: as the configuration names it.
        metadata: front matter of its card, empty without one.
        licence_files: names of its licence and notice files.
        unread: why the front matter could not be read, if so.
    """

    path: str
    metadata: Mapping[str, Any]
    licence_files: Sequence[str]
    unread: str = ""

    @property
    def hub_name(self) -> str | None:
        """Its name on the hub, or that of the model it says it comes from."""
        if self.path.count("/") == 1 and not Path(self.path).expanduser().exists():
            return self.path
        named = self.metadata.get("base_model")
        return next(iter(named), None) if isinstance(named, list) else named


def write_cards(report: Report, base: Path, folder: Path) -> list[Path]:
    """Write a card into every finished checkpoint of a run, and the base model's card beside it.

    Args:
        report: the run's report.
        base: checkpoint of the base model.
        folder: the run folder.

    Returns:
        The cards.
    """
    described = read_base(str(report.config["model"]["path"]), base)
    written: list[Path] = []
    for name in ("pruned", "recovered"):
        directory = folder / name
        if checkpoint.is_complete(directory):
            if (base / CARD).is_file():
                shutil.copyfile(base / CARD, directory / BASE_CARD)
            write_bytes(directory / CARD, card(report, directory, described).encode())
            written.append(directory / CARD)
    return written


def read_base(path: str, directory: Path) -> Base:
    """What the base model's folder says of it."""
    readme = directory / CARD
    metadata, unread = {}, ""
    try:
        metadata = (metadata_load(readme) if readme.is_file() else None) or {}
    except (yaml.YAMLError, ValueError) as error:  # a card is worth a note, not a run that ends without a report
        unread = " ".join(str(error).split())
    files = [one.name for pattern in ("LICENSE*", "NOTICE*") for one in sorted(directory.glob(pattern))]
    return Base(path, metadata, files, unread)


def card(report: Report, directory: Path, base: Base) -> str:
    """The card of one checkpoint of a run."""
    shown = _variants(report, directory.name)
    carried = {key: base.metadata[key] for key in CARRIED if key in base.metadata}
    front = ModelCardData(**carried, base_model=base.hub_name, tags=["cria-dist", "pruned"]).to_yaml()
    end = shown[-1]
    size = f"{text.count(end.parameters)} parameters of {text.count(shown[0].parameters)}"
    sections = (
        (f"{report.name}: {base.path}, {end.label}", [f"{_done(report)} {size}."]),
        ("Numbers", [*_numbers(report, shown)]),
        ("How it was made", [*_recipe(report, directory.name)]),
        ("How it was measured", [f"- {sentence}" for sentence in report.protocol if not sentence.startswith(ABSENT)]),
        ("How to load it", [*_loading(directory)]),
        ("What loads it", [*_loaders(report, directory.name)]),
        ("How to make it again", [*_again(report, directory.name)]),
        ("Licence", [_licence(base)]),
    )
    body = "\n\n".join(
        f"{'#' if number == 0 else '##'} {title}\n\n" + "\n".join(lines)
        for number, (title, lines) in enumerate(sections)
        if lines
    )
    return f"---\n{front}\n---\n{body}\n"


def _variants(report: Report, name: str) -> list[Evaluation]:
    """The dense model and what came of it, up to the checkpoint of this name."""
    stages = ("dense", "pruned", "repaired") if name == "pruned" else ("dense", "pruned", "repaired", "recovered")
    return [one for one in report.variants if one.label in stages]


def _done(report: Report) -> str:
    ratio = text.percent(report.effective_parameter_reduction)
    return f"Structured pruning by cria_dist; effective parameter reduction {ratio}."


def _numbers(report: Report, shown: Sequence[Evaluation]) -> Iterator[str]:
    metric, dense = metric_of(report), shown[0]
    base = metric.of(dense)
    yield f"| variant | parameters | removed | {metric.name} | {metric.heading} | weights (MB) |"
    yield "|---|--:|--:|--:|--:|--:|"
    for one in shown:
        quality = f"{metric.show(metric.of(one))} | {metric.beside(metric.of(one), base)}"
        removed = text.percent(1 - one.parameters / dense.parameters)
        yield f"| {one.label} | {one.parameters:,} | {removed} | {quality} | {text.megabytes(one.weight_bytes)} |"


def _recipe(report: Report, name: str) -> Iterator[str]:
    config = report.config
    prune, data, recover = config["prune"], config["data"], config["recover"]
    end = grids.final(report)
    settings = ", ".join(f"{key}={value}" for key, value in sorted(config["method"].items()) if key != "name")
    yield f"- Method: {end.method if end else config['method']['name']} ({settings})"
    yield "- Pruning: " + ", ".join(f"{key}={value}" for key, value in sorted(prune.items()))
    yield (
        f"- Calibration: {data['calibration_sequences']} sequences of {data['sequence_length']} of "
        f"{data['calibration']['source']}"
    )
    if name == "recovered":
        yield "- Recovery: " + ", ".join(f"{key}={value}" for key, value in sorted(recover.items()))
    for key in sorted(report.digests):
        yield f"- Digest, {key.replace('_', ' ')}: `{report.digests[key]}`"


def _loading(directory: Path) -> Iterator[str]:
    config = checkpoint.read_config(directory)
    stock = checkpoint.stock_class(config).__name__
    if not layers_differ(config):
        yield from ("```python", f"from transformers import {stock}", "", f'{stock}.from_pretrained("PATH")', "```")
        return
    yield "Its layers differ in width, which the stock class does not build. Either"
    yield from ("", "```python", "import cria_dist", "", 'cria_dist.load_pruned("PATH")', "```")
    if "auto_map" in config:
        yield from ("", "or, without cria_dist, with the modelling file beside the weights", "", "```python")
        yield from (f"from transformers import {stock}", "")
        yield from (f'{stock}.from_pretrained("PATH", trust_remote_code=True)', "```")
    if stock == "AutoModelForCausalLM":
        hint = "`cria export PATH model.gguf` writes it for llama.cpp, `--format decilm` for vLLM, where they can."
    else:
        hint = "`cria export PATH model.onnx --format onnx` writes it for onnxruntime."
    yield from ("", hint)


def _loaders(report: Report, name: str) -> Iterator[str]:
    ending = f", {name}"
    found = {key.removesuffix(ending): verdict for key, verdict in report.loaders.items() if key.endswith(ending)}
    if found:
        yield from ("| loader | verdict |", "|---|---|")
        yield from (f"| {loader} | {verdict.replace('|', '/')} |" for loader, verdict in found.items())


def _again(report: Report, name: str) -> Iterator[str]:
    yield from ("```", report.command or "cria prune CONFIG.toml", "```")
    if name == "pruned":
        yield from ("", "or, from the plan and the folder of that run,", "", "```")
        yield from ("cria apply-plan RUN/pruned/plan.json BASE OUT", "```")


def _licence(base: Base) -> str:
    files = f"; its {' and '.join(base.licence_files)} lie beside the weights" if base.licence_files else ""
    named = base.metadata.get("license_name") or base.metadata.get("license")
    if named:
        return f"{named}, as the base model says{files}. The weights were changed from the base model's by pruning."
    if files:
        return f"That of the base model{files}. The weights were changed from the base model's by pruning."
    if base.unread:
        return f"See {BASE_CARD}: the front matter of the base model's card cannot be read ({base.unread})."
    return "The base model's folder names no licence: its own terms apply to this one too."
