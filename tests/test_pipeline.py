"""The whole run in one process: what it leaves, what it does not do twice, what survives an interruption."""

import errno
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist import files, pipeline
from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, WorkerError
from cria_dist.models import checkpoint
from cria_dist.pipeline import Context, prune
from cria_dist.pool import Flow, LocalPool
from cria_dist.records import PruningPlan, Report, Site, Stage
from cria_dist.report.writer import report_from_json
from cria_dist.stages import memory
from cria_dist.stages.verify import Verifier
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

KEYS = ("layer-000.mlp", "layer-001.mlp")


class SpyPool(LocalPool):
    """Remembers which worker did which item; skips the fresh process of the verification, which takes seconds."""

    def __init__(self, die_before: int | None = None) -> None:
        self.done: list[tuple[str, str]] = []
        self._die_before = die_before

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        workers: int | None = None,
        flow: Flow[Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        assert isinstance(make_worker, functools.partial)
        if make_worker.func is Verifier:
            for item in items:  # five seconds a process; tests/stages/test_evaluate.py has the real thing
                files.write_json(item.record, {"finding": "not checked", "others": {}})
                yield item, "not checked"
            return
        if make_worker.func.__module__ == memory.__name__:  # asks a worker how much it has: no result
            yield from super().map(make_worker, items, workers, flow)
            return
        yield from super().map(functools.partial(self._spied, make_worker), items, workers, flow)

    def _spied(self, make_worker: functools.partial[Any]) -> Callable[[Any], Any]:
        worker = make_worker()

        def work(item: Any) -> Any:
            if len(self.done) == self._die_before:
                raise KeyboardInterrupt
            self.done.append((make_worker.func.__name__, getattr(item, "key", str(item))))
            return worker(item)

        return work


def carry_out(
    make_context: MakeContext, config: RunConfig, until: Stage = "evaluate", die_before: int | None = None
) -> tuple[Path, list[tuple[str, str]]]:
    """The run folder and what was computed."""
    pool = SpyPool(die_before)
    context = make_context(config, pool)
    prune(context, until=until)
    return context.job.folder, pool.done


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that is a result: all but books, logs and what carries times."""
    left_out = {"timings.json", "progress.json", "log.jsonl", "report.json", "report.html", "README.md"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in left_out
        and not path.name.startswith(("loss-", "demonstration-", "verified-"))
        and ".tmp." not in path.name
        and path.suffix != ".png"
    }


def plan_of(path: Path) -> PruningPlan:
    return PruningPlan.from_json((path / "plan.json").read_text())


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the plots takes two seconds, and timing with all threads of a busy machine takes as long as it likes."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(pipeline, "write_report", lambda report, evidence, folder: None)


# what a run leaves


def test_a_run_leaves_report_page_and_plots(finished_run: Any) -> None:
    folder = finished_run.folder
    assert "<html" in (folder / "report.html").read_text()
    assert list((folder / "plots").glob("*.png"))
    report = report_from_json(folder / "report.json")
    assert [one.label for one in report.variants] == ["dense", "pruned", "repaired", "recovered"]
    assert [(one.label, one.repair) for one in report.comparison] == [
        ("random", "none"),
        ("random", "least_squares"),
        ("magnitude", "none"),
        ("magnitude", "least_squares"),
    ]
    assert [len(one.answers) for one in report.generations] == [4, 4]
    assert len(report.loss) == 6
    assert all(one.prefill_ms and one.decode_ms for one in report.variants)
    others = {f"{loader}, recovered" for loader in ("llama.cpp", "vLLM", "onnxruntime")}
    assert report.loaders.keys() == {"transformers, pruned", "transformers, recovered"} | others
    assert all("logits equal" in report.loaders[f"transformers, {name}"] for name in ("pruned", "recovered"))
    assert not [path for path in folder.rglob("*") if ".tmp." in path.name or path.suffix in {".pkl", ".pt", ".bin"}]


def test_the_report_counts_what_is_really_there(finished_run: Any, pico: Path) -> None:
    report: Report = report_from_json(finished_run.folder / "report.json")
    by_label = {one.label: one for one in report.variants}
    for label, directory in (("dense", pico), ("repaired", "pruned"), ("recovered", "recovered")):
        model = checkpoint.load_model(finished_run.folder / directory, checkpoint.Numerics())
        assert by_label[label].parameters == sum(parameter.numel() for parameter in model.parameters())
    dense, pruned = by_label["dense"].parameters, by_label["pruned"].parameters
    assert dense - pruned == 2 * 12 * 3 * 32
    assert report.effective_parameter_reduction == (dense - pruned) / dense
    assert by_label["repaired"].perplexity != by_label["pruned"].perplexity
    assert by_label["recovered"].perplexity < by_label["repaired"].perplexity


def test_least_squares_brings_the_outputs_closer(finished_run: Any) -> None:
    """On the calibration tokens of layer 0, whose inputs pruning does not change: that is what it minimises."""
    folder, plan = finished_run.folder, plan_of(finished_run.folder / "pruned")
    digest = json.loads((folder / "round-00" / "manifest.json").read_text())["digest"]
    output_NM = Recording(LocalStorage(folder / "round-00"), digest).signals(Site(0))["output"]
    kept = list(plan.kept[KEYS[0]])
    name = "model.layers.0.mlp.down_proj.weight"
    with checkpoint.open_tensors(Path(finished_run.config.model.path)) as tensors:
        dense = tensors.read(name).numpy()
    with checkpoint.open_tensors(folder / "pruned") as tensors:
        repaired = tensors.read(name).numpy()
    wanted = dense @ output_NM
    bare_error = np.square(wanted - dense[:, kept] @ output_NM[kept]).sum()
    repaired_error = np.square(wanted - repaired @ output_NM[kept]).sum()
    assert repaired_error < 0.8 * bare_error


@pytest.mark.parametrize("until", ["record", "analyse", "decide", "apply", "recover"])
def test_a_run_stops_where_it_is_told(
    until: Stage, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    folder, _ = carry_out(make_context, run_config(tmp_path), until)
    order = ["record", "analyse", "decide", "apply", "recover"]
    marks = [
        "round-00/manifest.json",
        "round-00/scores",
        "round-00/plan.json",
        "pruned/config.json",
        "recovered/config.json",
    ]
    there = [(folder / mark).exists() for mark in marks]
    assert there == [order.index(stage) <= order.index(until) for stage in order]
    assert not (folder / "report.json").exists()


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_other_methods(method: str, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    config = run_config(tmp_path, method={"name": method}, recover={"steps": 0})
    folder, _ = carry_out(make_context, config, "apply")
    plan = plan_of(folder / "pruned")
    assert plan.method == method
    assert {len(kept) for kept in plan.kept.values()} == {36}
    assert checkpoint.load_model(folder / "pruned", checkpoint.Numerics()).config.intermediate_size == 36


def test_the_seed_chooses_what_random_removes(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    kept = set()
    for seed in (0, 1):
        config = run_config(tmp_path, method={"name": "random"}, seed=seed)
        kept.add(tuple(plan_of(carry_out(make_context, config, "decide")[0] / "round-00").kept[KEYS[0]]))
    assert len(kept) == 2


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("repair", ["none", "bias"])
def test_other_repairs(repair: str, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    changes = {"prune": {"repair": repair}, "recover": {"steps": 0}, "evaluate": {"latency_repeats": 0}}
    config = run_config(tmp_path, **changes)
    context = make_context(config, SpyPool())
    report = prune(context)
    assert report is not None
    assert checkpoint.read_config(context.job.folder / "pruned")["mlp_bias"] is (repair == "bias")
    labels = ["dense", "pruned"] if repair == "none" else ["dense", "pruned", "repaired"]
    assert [one.label for one in report.variants] == labels
    assert report.variants[-1].repair == repair
    assert {one.prefill_ms for one in report.variants} == {None}
    assert not report.loss


@pytest.mark.usefixtures("no_report")
def test_a_run_without_prompts(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    config = run_config(tmp_path, recover={"steps": 0}, evaluate={"prompts": []})
    report = prune(make_context(config, SpyPool()))
    assert report is not None
    assert report.generations == ()


@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
def test_the_plan_counts_the_parameters_of_the_checkpoint(
    repair: str, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    folder, _ = carry_out(make_context, run_config(tmp_path, prune={"repair": repair}), "apply")
    model = checkpoint.load_model(folder / "pruned", checkpoint.Numerics())
    assert plan_of(folder / "pruned").parameters[1] == sum(parameter.numel() for parameter in model.parameters())


def test_a_budget_in_parameters(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    config = run_config(tmp_path, prune={"ratio": 0.12, "budget": "parameters"})
    plan = plan_of(carry_out(make_context, config, "decide")[0] / "round-00")
    one_multiple = 4 * 2 * 3 * 32 / plan.parameters[0]
    assert 0.12 <= plan.ratio < 0.12 + one_multiple


# what a run does not do twice


@pytest.mark.usefixtures("no_report")
def test_a_finished_run_computes_nothing(finished_run: Any, make_context: MakeContext, tmp_path: Path) -> None:
    copy = finished_run.copy(tmp_path)
    before = contents(copy.folder)
    stamps = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.safetensors")}
    context = make_context(copy.config, SpyPool())
    assert context.job.folder == copy.folder
    report = prune(context)
    assert context.pool.done == []
    assert contents(copy.folder) == before
    assert {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.safetensors")} == stamps
    assert report is not None
    assert report.variants == report_from_json(finished_run.folder / "report.json").variants


SHARD = "shard-00001"
SIGNALS, MOMENTS = f"{SHARD}.units-00000-00048.parquet", f"{SHARD}.units-00000-00048.safetensors"


def recorded(*shards: int) -> list[tuple[str, str]]:
    """What it takes to record shards."""
    return [("Recorder", f"shard {shard}, layers 0-1") for shard in shards]


DELETED = {
    f"round-00/activations/layer-001.mlp/{SIGNALS}": recorded(1),
    f"round-00/moments/layer-000.mlp/{MOMENTS}": recorded(1),
    "round-00/manifest.json": [],
    "round-00/scores/layer-001.mlp.npz": [("Analyst", "layer-001.mlp")],
    "round-00/spectra/layer-001.mlp.npz": [("Analyst", "layer-001.mlp")],
    "round-00/plan.json": [],
    "round-00/repair/layer-000.mlp.safetensors": [("Repairer", "layer-000.mlp")],
    "pruned/plan.json": [],
    "pruned/config.json": [],
    "pruned/model.safetensors": [],
    "comparison/00-random/scores/layer-000.mlp.npz": [("Analyst", "layer-000.mlp")],
    "comparison/01-magnitude/plan.json": [],
    "recover/done.json": [],
    "recovered/config.json": [],
    "recovered/model.safetensors": [],
    "tokens/calibration.npy": [],
    "config.json": [],
    "timings.json": [],
}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", DELETED)
def test_what_is_deleted_is_computed_again_and_nothing_else(
    name: str, finished_run: Any, make_context: MakeContext, tmp_path: Path
) -> None:
    copy = finished_run.copy(tmp_path)
    before = contents(copy.folder)
    (copy.folder / name).unlink()
    if name == "config.json":
        with pytest.raises(ConfigError, match=r"holds .* but no config\.json of a run"):
            carry_out(make_context, copy.config)
        return
    _, done = carry_out(make_context, copy.config)
    assert done == DELETED[name]
    assert contents(copy.folder) == before


@pytest.mark.usefixtures("no_report")
def test_a_lost_commit_record_counts_only_without_a_manifest(
    finished_run: Any, make_context: MakeContext, tmp_path: Path
) -> None:
    """The manifest is all that readers trust; it is merged from the commit records."""
    copy = finished_run.copy(tmp_path)
    before = contents(copy.folder)
    lost = copy.folder / f"round-00/commits/{KEYS[0]}/{SHARD}.json"
    lost.unlink()
    assert carry_out(make_context, copy.config, "record")[1] == []
    (copy.folder / "round-00/manifest.json").unlink()
    assert carry_out(make_context, copy.config, "record")[1] == recorded(1)
    assert contents(copy.folder) == before


@pytest.mark.usefixtures("no_report")
def test_a_deleted_measurement_is_taken_again(finished_run: Any, make_context: MakeContext, tmp_path: Path) -> None:
    copy = finished_run.copy(tmp_path)
    measured = sorted(path for path in (copy.folder / "evaluations").iterdir() if "-" not in path.name)
    assert len(measured) == 8
    before = contents(copy.folder)
    label = json.loads(measured[3].read_text())["label"]
    measured[3].unlink()
    _, done = carry_out(make_context, copy.config)
    assert done == [("PerplexityMeter", f"evaluate {label}")]
    assert contents(copy.folder) == before


def test_a_damaged_recording_is_an_error_that_can_be_obeyed(
    finished_run: Any, make_context: MakeContext, tmp_path: Path
) -> None:
    """Delete the file that the message names, run again: the result is the clean run's."""
    copy = finished_run.copy(tmp_path)
    clean = contents(copy.folder)
    path = copy.folder / "round-00" / "activations" / KEYS[1] / SIGNALS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shutil.rmtree(copy.folder / "round-00" / "scores")
    with pytest.raises(WorkerError, match=rf"{KEYS[1]}.*{SIGNALS} is not what was recorded .*delete it"):
        carry_out(make_context, copy.config, "decide")
    path.unlink()
    _, done = carry_out(make_context, copy.config, "recover")
    assert done == [*recorded(1), ("Analyst", KEYS[1])]
    assert contents(copy.folder) == clean


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_plan_is_decided_again(
    damage: str, finished_run: Any, make_context: MakeContext, tmp_path: Path
) -> None:
    copy = finished_run.copy(tmp_path)
    clean = contents(copy.folder)
    path = copy.folder / "round-00" / "plan.json"
    path.write_bytes(path.read_bytes()[:90] if damage == "cut" else b"")
    carry_out(make_context, copy.config, "apply")
    assert contents(copy.folder) == clean


# several rounds


@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
def test_three_rounds(repair: str, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    config = run_config(tmp_path, prune={"ratio": 0.5, "rounds": 3, "repair": repair})
    folder, done = carry_out(make_context, config, "apply")
    assert [name for name, _ in done].count("Recorder") == 9
    plans = [plan_of(folder / f"round-{index:02d}") for index in range(3)]
    widths = []
    for key in KEYS:
        nested = [set(range(48)), *(set(plan.kept[key]) for plan in plans)]
        assert all(later < earlier for earlier, later in itertools.pairwise(nested))
        assert all(list(plan.kept[key]) == sorted(plan.kept[key]) for plan in plans)
        widths.append([len(kept) for kept in nested])
    assert widths == [[48, 40, 32, 24]] * 2
    for index in range(2):
        assert checkpoint.read_config(folder / f"round-{index:02d}" / "pruned")["intermediate_size"] == 40 - 8 * index
    assert checkpoint.load_model(folder / "pruned", checkpoint.Numerics()).config.intermediate_size == 24
    if repair == "none":  # what is left of the dense weights is what the dense numbering says
        with (
            checkpoint.open_tensors(Path(config.model.path)) as dense,
            checkpoint.open_tensors(folder / "pruned") as ours,
        ):
            for layer, key in enumerate(KEYS):
                kept, name = list(plans[-1].kept[key]), f"model.layers.{layer}.mlp.up_proj.weight"
                assert np.array_equal(ours.read(name).numpy(), dense.read(name).numpy()[kept])


def test_the_plan_beside_the_result_is_the_last_rounds(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, prune={"ratio": 0.5, "rounds": 3})
    folder, _ = carry_out(make_context, config, "apply")
    assert plan_of(folder / "pruned").kept == plan_of(folder / "round-02").kept


def test_three_finished_rounds_compute_nothing(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, prune={"ratio": 0.5, "rounds": 3})
    folder, _ = carry_out(make_context, config, "apply")
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    _, done = carry_out(make_context, config, "apply")
    assert done == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == weights


def test_pruning_a_pruned_checkpoint(
    finished_run: Any, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """The result of one run is the model of the next; its plan.json is not the next one's."""
    config = run_config(tmp_path, model={"path": str(finished_run.folder / "pruned")})
    folder, _ = carry_out(make_context, config, "apply")
    assert plan_of(folder / "pruned").widths == dict.fromkeys(KEYS, 36)
    assert {len(kept) for kept in plan_of(folder / "pruned").kept.values()} == {24}


# neighbours


def test_another_ratio_takes_over_recording_and_scores(
    finished_run: Any, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    copy = finished_run.copy(tmp_path)
    folder, done = carry_out(make_context, run_config(tmp_path, prune={"ratio": 0.5}), "decide")
    assert folder != copy.folder
    assert done == []
    for name in (
        "manifest.json",
        f"activations/{KEYS[1]}/{SIGNALS}",
        f"moments/{KEYS[0]}/{MOMENTS}",
        f"scores/{KEYS[0]}.npz",
        f"spectra/{KEYS[0]}.npz",
    ):
        assert (folder / "round-00" / name).stat().st_ino == (copy.folder / "round-00" / name).stat().st_ino, name
    one, other = plan_of(folder / "round-00"), plan_of(copy.folder / "round-00")
    assert all(set(one.kept[key]) < set(other.kept[key]) for key in KEYS)


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_links_a_neighbours_work_is_copied(
    reason: int,
    finished_run: Any,
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cannot(path: Path, target: Path) -> None:
        raise OSError(reason, "no links here", str(target), None, str(path))

    finished_run.copy(tmp_path)
    config = run_config(tmp_path, prune={"ratio": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "hardlink_to", cannot)
        folder, done = carry_out(make_context, config, "decide")
    assert done == []
    copied = (folder / "round-00" / "plan.json").read_bytes()
    shutil.rmtree(folder)
    carry_out(make_context, config, "decide")
    assert (folder / "round-00" / "plan.json").read_bytes() == copied


def test_another_method_takes_over_only_the_recording(
    finished_run: Any, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    finished_run.copy(tmp_path)
    config = run_config(tmp_path, method={"name": "cria", "neighbours": 6})
    _, done = carry_out(make_context, config, "decide")
    assert done == [("Analyst", key) for key in KEYS]


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"record": {"tokens": 180}}, {"model": {"dtype": "bfloat16"}}], ids=str
)
def test_what_changes_the_recording_is_recorded(
    changes: dict[str, Any], finished_run: Any, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    finished_run.copy(tmp_path)
    _, done = carry_out(make_context, run_config(tmp_path, **changes), "record")
    assert done == recorded(0, 1, 2)


# interruptions

ITEMS = 3 + 2 + 2
"""Shards, sites to score, sites to repair: what a run up to the pruned checkpoint computes."""


@pytest.mark.parametrize("item", range(ITEMS))
def test_killed_before_any_item_the_run_ends_the_same(
    item: int, finished_run: Any, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        carry_out(make_context, config, "apply", die_before=item)
    folder, done = carry_out(make_context, config, "apply")
    assert len(done) == ITEMS - item
    clean = contents(finished_run.folder)
    ours = contents(folder)
    assert {name for name in ours if ours[name] != clean.get(name)} == {"config.json"}  # this one compares nothing


def later_than(stage: str) -> list[str]:
    """Everything that stages after this one leave."""
    left = {
        "tokens": ["round-00"],
        "record": ["round-00/scores", "round-00/spectra"],
        "analyse": ["round-00/plan.json"],
        "decide": ["round-00/repair"],
        "repair": ["pruned"],
        "apply": ["comparison", "recover", "recovered"],
        "recover": ["evaluations", "report.json", "report.html", "plots"],
    }
    stages = list(left)
    return [name for later in stages[stages.index(stage) :] for name in left[later]]


HALF = {
    "half a shard": ("record", ["round-00/manifest.json", "round-00/commits/layer-001.mlp/shard-00002.json"]),
    "half the scores": ("analyse", ["round-00/scores/layer-001.mlp.npz"]),
    "half the repair": ("repair", ["round-00/repair/layer-001.mlp.safetensors"]),
    "half a checkpoint": ("apply", ["pruned/config.json", "pruned/model.safetensors"]),
    "a checkpoint without its config": ("apply", ["pruned/config.json"]),
    "half a recovery": ("recover", ["recover/done.json", "recovered/config.json", "recovered/model.safetensors"]),
    "a recovery without its mark": ("recover", ["recover/done.json"]),
}
WHOLE: dict[str, tuple[str, list[str]]] = {
    f"after {stage}": (stage, []) for stage in ("tokens", "record", "analyse", "decide", "repair", "apply", "recover")
}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("state", [*WHOLE, *HALF])
def test_from_every_intermediate_state_the_run_ends_the_same(
    state: str, finished_run: Any, make_context: MakeContext, tmp_path: Path
) -> None:
    copy = finished_run.copy(tmp_path)
    stage, lost = (WHOLE | HALF)[state]
    for name in [*later_than(stage), *lost]:
        path = copy.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if path.parent.is_dir():  # what the dead process was writing
            (path.parent / f".{path.name}.tmp.1").write_bytes(b"half a file")
    until = "evaluate" if stage == "recover" else "recover"
    folder, _ = carry_out(make_context, copy.config, until)
    assert folder == copy.folder
    clean, ours = contents(finished_run.folder), contents(folder)
    for name in ("round-00/plan.json", "pruned/plan.json", "round-00/manifest.json"):
        assert ours[name] == clean[name], name
    assert {name for name in ours if ours[name] != clean.get(name)} == set()


def test_a_recovery_that_dies_goes_on_with_a_readable_log(
    finished_run: Any, make_context: MakeContext, tmp_path: Path
) -> None:
    copy = finished_run.copy(tmp_path)
    (copy.folder / "recover" / "done.json").unlink()
    (log,) = (copy.folder / "recover").glob("loss-*.jsonl")
    log.write_bytes(log.read_bytes()[:-20])
    carry_out(make_context, copy.config, "recover")
    from cria_dist.stages.recover import read_log

    assert [line["step"] for line in read_log(log)] == [1, 2, 3, 4, 5, 6]
