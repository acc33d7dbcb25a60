"""The demo, end to end: quality of every variant, seconds per stage, peak memory."""

import shutil
import sys
import tempfile
from pathlib import Path

from cria_dist.records import Evaluation, Report
from cria_dist.report.writer import report_from_json
from jobs.benchmarks.frame import RESULTS, Measurement, seconds
from jobs.benchmarks.memory import run_measured

CONFIG = "jobs/configs/demo.toml"
QUICK = (
    "name=quick",
    "data.calibration_sequences=12",
    "data.test_sequences=4",
    "record.tokens=2048",
    "record.shard_sequences=6",
    "recover.steps=4",
    "evaluate.latency_repeats=1",
)


def measure(quick: bool) -> Measurement:
    """Run the demo in a fresh folder as the user would, and read its report."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=RESULTS))
    try:
        return _measure(folder, quick)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, quick: bool) -> Measurement:
    command = [sys.executable, "-m", "jobs.prune", CONFIG, f"run.root={folder}", *(QUICK if quick else ())]
    log = RESULTS / "demo.log"
    outcome: list[tuple[int, int]] = []
    total = seconds(lambda: outcome.append(run_measured(command, log)))
    code, peak_bytes = outcome[0]
    if code:
        raise SystemExit(f"the demo ended with exit code {code}; its output is in {log}")
    report = report_from_json(next(folder.glob("*/report.json")))
    perplexity = {one.label: one.perplexity for one in report.variants}
    metrics = {
        **{f"{label}_ppl": value for label, value in perplexity.items()},
        "repaired_over_dense": perplexity["repaired"] / perplexity["dense"],
        "params_removed_ratio": report.effective_parameter_reduction,
        "seconds_total": total,
        "peak_rss_gib": peak_bytes / 2**30,
        **{f"seconds_{entry.stage.replace(' ', '_')}": entry.seconds for entry in report.stages},
    }
    return Measurement(
        name="demo",
        protocol=(*report.protocol, "Seconds and memory: the whole command as one process tree, a fresh run folder."),
        metrics=metrics,
        samples={"perplexity": _by_variant(report), "prefill": _times(report)},
        units={"prefill": "ms"},
    )


def _by_variant(report: Report) -> dict[str, list[float]]:
    compared = {_compared_label(one): [one.perplexity] for one in report.comparison}
    return {one.label: [one.perplexity] for one in report.variants} | compared


def _compared_label(evaluation: Evaluation) -> str:
    return f"{evaluation.label}, {'pruned' if evaluation.repair == 'none' else 'repaired'}"


def _times(report: Report) -> dict[str, list[float]]:
    return {one.label: [one.prefill_ms] for one in report.variants if one.prefill_ms is not None}
