"""Runs that prune by gradients: the same with any number of workers, resumed, in rounds, and beside another method."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.config import RunConfig
from cria_dist.methods import Taylor, Wanda
from cria_dist.pipeline import Context, prune, results, rounds
from cria_dist.pipeline.gradients import take_gradients
from cria_dist.pool import Flow, LocalPool
from cria_dist.records import PruningPlan, Site, Stage
from cria_dist.stages.gradients import GradientTaker
from cria_dist.store import site_scores

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]

TAYLOR = {"name": "taylor", "sequences": 10, "shard_sequences": 4}
"""Shards of 4, 4 and 2 of the 12 sequences."""


class Dealing(LocalPool):
    """Deals the items from the last to the first to several workers in turn, and notes whose items they were."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.done: list[tuple[str, str]] = []

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], Any]],
        items: Sequence[Any],
        workers: int | None = None,
        flow: Flow[Any] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        del workers, flow
        assert isinstance(make_worker, functools.partial)
        hands = [make_worker() for _ in range(min(self.workers, len(items)))]
        for turn, item in enumerate(reversed(items)):
            self.done.append((getattr(make_worker.func, "__name__", ""), str(item)))
            yield item, hands[turn % len(hands)](item)

    def taken(self) -> list[str]:
        """Gradients that were computed."""
        return sorted(item for worker, item in self.done if worker == GradientTaker.__name__)


def carry_out(make_context: MakeContext, config: RunConfig, until: Stage, workers: int = 1) -> tuple[Path, Dealing]:
    pool = Dealing(workers)
    context = make_context(config, pool, until)
    prune(context, until=until)
    return context.job.folder, pool


def results_in(folder: Path) -> dict[str, bytes]:
    parts = ("gradients", "scores", "plan.json", "pruned")
    paths = [path for path in folder.rglob("*") if path.is_file() and not {*parts}.isdisjoint(path.parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def shards(*numbers: int) -> list[str]:
    return [f"gradients of shard {number}" for number in numbers]


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_any_number_of_workers_gives_the_same_checkpoint(
    num_rounds: int, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    prune_part = {"rounds": num_rounds, "repair": "bias"}
    found = []
    for workers in (1, 2):
        config = run_config(tmp_path / str(workers), method=TAYLOR, prune=prune_part)
        folder, pool = carry_out(make_context, config, "apply", workers)
        assert pool.taken() == sorted(shards(0, 1, 2) * num_rounds)
        found.append(results_in(folder))
    assert found[0] == found[1]
    assert [f"round-{index:02d}/gradients/shard-00002.npz" in found[0] for index in (0, 1)] == [True, num_rounds == 2]
    plan = PruningPlan.from_json(found[0]["pruned/plan.json"].decode())
    assert plan.method == "taylor"
    assert {len(kept) for kept in plan.kept.values()} == {36}


def test_the_lowest_go(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    folder, _ = carry_out(make_context, run_config(tmp_path, method=TAYLOR), "decide")
    plan = PruningPlan.from_json((folder / "round-00" / "plan.json").read_text())
    for key, kept in plan.kept.items():
        keep_N = site_scores.read_scores(folder / "round-00", Site.from_key(key)).keep_N
        assert (keep_N > 0).all()
        assert sorted(kept) == sorted(np.argsort(keep_N)[12:].tolist())


def test_only_the_shards_that_are_lost_are_taken_again(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    config = run_config(tmp_path, method=TAYLOR)
    folder, _ = carry_out(make_context, config, "decide")
    before = results_in(folder)
    assert carry_out(make_context, config, "decide")[1].taken() == []
    (folder / "round-00/scores/layer-001.mlp.npz").unlink()
    damaged = folder / "round-00/gradients/shard-00001.npz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert carry_out(make_context, config, "decide")[1].taken() == shards(1)
    assert results_in(folder) == before


def test_gradients_are_of_one_model_and_one_cut(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    context = make_context(run_config(tmp_path), Dealing(1))

    def num_taken(model_digest: str, method: Any) -> int:
        context.pool.done.clear()
        folder, model_dir = tmp_path / "analysis", context.job.model_dir
        assert take_gradients(context, "gradients", folder, model_dir, model_digest, method) is not None
        return len(context.pool.taken())

    ten = Taylor(sequences=10, shard_sequences=4)
    assert [num_taken("m1", ten), num_taken("m1", ten), num_taken("m2", ten)] == [3, 0, 3]
    assert num_taken("m2", Taylor(sequences=10, shard_sequences=5)) == 2
    assert num_taken("m2", ten) == 2, "the third shard is still that of the cut in three"
    assert take_gradients(context, "gradients", tmp_path, context.job.model_dir, "m1", Wanda()) is None


def test_a_compared_method_takes_its_own(run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path) -> None:
    config = run_config(tmp_path, method={"name": "wanda"}, compare=[{"name": "flap"}, TAYLOR])
    context = make_context(config, Dealing(2))
    recording = rounds.record_round(context, 0, rounds.dense_model(context))
    variants = results.comparison_variants(context, recording)
    assert [variant.label for variant, _ in variants] == ["flap", "flap", "taylor", "taylor"]
    assert (context.job.folder / "comparison/01-taylor/gradients/shard-00000.npz").is_file()
    assert not (context.job.folder / "comparison/00-flap/gradients").exists()
    assert not (context.job.folder / "round-00/gradients").exists()
