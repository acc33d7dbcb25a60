"""Quality: what every method loses at the same widths, on a public text, before and after its repair."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cria_dist.config_file import load
from cria_dist.models import checkpoint, location
from cria_dist.records import Evaluation, Report
from cria_dist.report.writer import report_from_json
from cria_dist.stages.prepare import run_folder
from jobs.benchmarks import copies
from jobs.benchmarks.frame import RESULTS, Measurement
from jobs.benchmarks.memory import run_measured

CONFIG = "jobs/configs/wikitext.toml"
RATIOS = (0.2, 0.5)
ROOT = RESULTS / "quality"
TEXT = "WIKITEXT2"
"""Environment variable: a folder with WikiText-2's raw ``valid.txt`` and ``test.txt``; default is the hub."""
DEFAULT = "conditional repaired"
REPAIRED = {"none": "", "least_squares": " repaired", "bias": " with bias", "sequential": " in sequence"}
QUICK = ("data.calibration_sequences=16", "data.test_sequences=2", "record.tokens=2048", "record.shard_sequences=8")
FLAP = ("name=flap-bias", "method={name='flap'}", "prune.repair=bias", "compare=[]")
"""FLAP as published: its own score and the mean of what it removes as a bias."""
SEQUENTIAL = ("name=sequential", "prune.repair=sequential", "compare=[{name='flap'},{name='activation'}]")
"""The other repair, of the default and of the rivals that come closest to it; three more passes each."""
RECOVER = (
    "name=recovered",
    "compare=[]",
    "recover.steps=200",
    "recover.batch_sequences=4",
    "recover.sequence_length=128",
    "recover.train=mlp",
    "recover.distill=0.5",
)
FEW_STEPS = ("recover.steps=4",)
RANKED = ("conditional", "flap", "activation")
"""Methods that are recovered, to see whether their ranking holds."""
MIXED = (
    "name=mixed",
    "prune.units=['mlp','attention','layer']",
    "prune.budget=parameters",
    "prune.allocation=sensitivity",
    "compare=[{name='flap'},{name='wanda'},{name='activation'}]",
)
"""Neurons, KV groups and whole layers in one budget; the rivals get the same widths and the same repair."""
DOUBLED = 80
"""Neurons of every layer that get a copy, of 1536."""
COPIES = ("name=copies", "data.calibration_sequences=64", "data.test_sequences=16", "prune.multiple=1")


def measure(quick: bool) -> Measurement:
    """Prune at both ratios by every method; runs share recordings, scores and finished measurements."""
    ROOT.mkdir(parents=True, exist_ok=True)
    common = [f"run.root={ROOT}", *_text(), *(QUICK if quick else ())]
    found: dict[str, Mapping[str, float]] = {}
    metrics: dict[str, float] = {}
    first = _report([*common, f"prune.ratio={RATIOS[0]}"])
    for ratio in RATIOS:
        runs = (_report([*common, f"prune.ratio={ratio}", *changes]) for changes in ((), FLAP))
        lost = {name: value for run in runs for name, value in _over_dense(run).items()}
        found[f"{ratio * 100:.0f}"] = lost
        metrics |= _figures(f"{ratio * 100:.0f}", lost)
        lost = _over_dense(_report([*common, f"prune.ratio={ratio}", *SEQUENTIAL]))
        found[f"{ratio * 100:.0f}, repaired in sequence"] = lost
        metrics |= {f"{name.replace(' ', '_')}_{ratio * 100:.0f}": lost[name] for name in lost if "sequence" in name}
    found["20, recovered"] = _recovered(common, FEW_STEPS if quick else ())
    found["20 of all but embeddings, mixed units"] = mixed = _mixed(common)
    metrics |= _figures("mixed_20", mixed)
    found["copies"] = _without_copies(common)
    metrics["recovered_over_dense_20"] = found["20, recovered"]["conditional recovered"]
    metrics["copies_over_dense"] = found["copies"][DEFAULT]
    digests = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(first.digests.items()) if name != "plan")
    samples = {
        f"perplexity over dense, {what}": {name: [value] for name, value in lost.items()}
        for what, lost in found.items()
    }
    return Measurement("quality", (*first.protocol, f"Digests: {digests}."), metrics, samples)


def _figures(percent: str, lost: Mapping[str, float]) -> dict[str, float]:
    """Every method, the default and the best of the others."""
    rivals = [value for name, value in lost.items() if not name.startswith("conditional")]
    return {
        **{f"{name.replace(' ', '_')}_{percent}": value for name, value in lost.items()},
        f"default_over_dense_{percent}": lost[DEFAULT],
        f"best_rival_{percent}": min(rivals),
    }


def _recovered(common: list[str], last: tuple[str, ...]) -> Mapping[str, float]:
    """After training, by method; every run starts from the same recording and the same scores."""
    lost: dict[str, float] = {}
    for name in RANKED:
        changes = (*RECOVER, f"name=recovered-{name}", f"method={{name='{name}'}}", f"prune.ratio={RATIOS[0]}")
        lost |= _over_dense(_report([*common, *changes, *last]))
    return lost


def _mixed(common: list[str]) -> Mapping[str, float]:
    """A fifth of all parameters but the embedding's."""
    config = checkpoint.read_config(location.locate(load(CONFIG).model.path, None))
    whole, embedding = checkpoint.count_parameters(config), int(config["vocab_size"]) * int(config["hidden_size"])
    return _over_dense(_report([*common, *MIXED, f"prune.ratio={RATIOS[0] * (whole - embedding) / whole!r}"]))


def _without_copies(common: list[str]) -> Mapping[str, float]:
    """As many neurons go as were doubled: what is lost, by method."""
    folder = ROOT / "with-copies"
    share = copies.widen(location.locate(load(CONFIG).model.path, None), folder, DOUBLED)
    return _over_dense(_report([*common, *COPIES, f"model.path={folder}", f"prune.ratio={share!r}"]))


def _text() -> list[str]:
    """Where the text lies, when it is not to come from the hub."""
    folder = os.environ.get(TEXT)
    if folder is None:
        return []
    files = {"calibration": "valid.txt", "test": "test.txt"}
    return [f"data.{name}={{source='{Path(folder) / file}'}}" for name, file in files.items()]


def _report(overrides: list[str]) -> Report:
    """Carry a run out, or read what it has left."""
    log = RESULTS / "quality.log"
    code, _ = run_measured([sys.executable, "-m", "jobs.prune", CONFIG, *overrides], log)
    if code:
        raise SystemExit(f"the run ended with exit code {code}; its output is in {log}")
    return report_from_json(run_folder(load(CONFIG, overrides)) / "report.json")


def _over_dense(report: Report) -> Mapping[str, float]:
    """Perplexity over that of the dense model, by method and repair."""
    dense = report.variants[0].perplexity
    return {_name(one): one.perplexity / dense for one in (*report.variants[1:], *report.comparison)}


def _name(evaluation: Evaluation) -> str:
    if evaluation.label == "recovered":
        return f"{evaluation.method} recovered"
    return f"{evaluation.method}{REPAIRED[evaluation.repair]}"
