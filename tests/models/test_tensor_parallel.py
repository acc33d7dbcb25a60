"""Tensor parallelism: two real processes that share every layer record what one process records."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from transformers import AutoConfig

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint, ranks
from cria_dist.models.blocks import Block
from cria_dist.models.family import family_of
from cria_dist.models.tensor_parallel import TensorParallelModel, tensor_ranks_problem
from cria_dist.records import Site
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.store.recording import Recording
from cria_dist.store.storage import LocalStorage

FAMILIES: Mapping[str, Mapping[str, Any]] = {"llama": {}, "qwen2": {}, "gemma2": {"sliding_window": 8}}
SITES = [Site(0), Site(1)]
ITEMS = [ShardWork(shard, Block(0, 2, 2)) for shard in range(2)]
TIMEOUT_SECONDS = 6


@dataclass(frozen=True)
class Crew:
    """What two processes did: their outcomes by step, and the tasks they were given."""

    tasks: Mapping[str, RecordTask]
    first: Mapping[str, Any]
    second: Mapping[str, Any]

    def recording(self, name: str) -> Recording:
        return self.tasks[name].recording


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[str, RecordTask]:
    """By family: 6 sequences in shards of 4 and 2, batches of 3, 3 and 2."""
    folder = tmp_path_factory.mktemp("tensor")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, (6, 24)).astype(np.int32))
    return {
        family: RecordTask(
            recording=Recording(LocalStorage(folder / f"{family}-alone"), "digest"),
            model_dir=make_model(folder / family, family, **changes),
            tokens_path=folder / "tokens.npy",
            numerics=checkpoint.Numerics(),
            signal_dtype="float32",
            shard_sequences=4,
            batch_sequences=3,
            sampled_tokens=57,
            seed=5,
        )
        for family, changes in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def alone(tasks: dict[str, RecordTask]) -> dict[str, Recording]:
    """What one process records."""
    for task in tasks.values():
        recorder = Recorder(task)
        for item in ITEMS:
            recorder(item)
        task.recording.write_manifest(SITES, len(ITEMS))
    return {family: task.recording for family, task in tasks.items()}


@pytest.fixture(scope="module")
def crew(tasks: dict[str, RecordTask], tmp_path_factory: pytest.TempPathFactory) -> Crew:
    """Two processes record every family, once with either rank slow, with a rank that hangs and one that dies."""
    folder = tmp_path_factory.mktemp("crew")

    def steps() -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {family: {"task": task} for family, task in tasks.items()}
        for rank in (0, 1):
            found[f"slow {rank}"] = {"task": tasks["llama"], "slow_rank": rank}
        found["half"] = {"task": replace(tasks["llama"], signal_dtype="bfloat16")}
        found["hangs"] = {"task": tasks["llama"], "fault": "hangs", "timeout": TIMEOUT_SECONDS}
        found["dies"] = {"task": tasks["llama"], "fault": "dies"}
        return found

    plan = steps()
    for name, step in plan.items():
        storage = LocalStorage(folder / name.replace(" ", "-"))
        step |= {"task": replace(step["task"], recording=Recording(storage, "digest"))}
        step |= {"items": ITEMS, "size": 2, "place": f"file://{folder}/meet-{name.replace(' ', '-')}"}
    (folder / "steps").write_bytes(pickle.dumps(list(plan.values())))
    outcomes = run_ranks(folder)
    for step in plan.values():
        if not step.get("fault"):
            step["task"].recording.write_manifest(SITES, len(ITEMS))
    first, second = (dict(zip(plan, outcome, strict=False)) for outcome in outcomes)
    return Crew({name: step["task"] for name, step in plan.items()}, first, second)


def run_ranks(folder: Path) -> list[list[Any]]:
    """The outcomes of rank 0 and rank 1."""
    script = Path(__file__).with_name("rank_process.py")
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "steps"), str(folder / f"outcomes-{rank}")],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 1], "\n".join(errors)
    return [pickle.loads((folder / f"outcomes-{rank}").read_bytes()) for rank in (0, 1)]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_record_what_one_process_records(family: str, crew: Crew, alone: dict[str, Recording]) -> None:
    for site in SITES:
        one, two = alone[family].signals(site), crew.recording(family).signals(site)
        assert sorted(one) == sorted(two) == ["gate", "output", "up"]
        for name, signal_NM in one.items():
            assert relative_error(two[name], signal_NM) < 1e-6, (site.key, name)
        expected, found = alone[family].moments(site), crew.recording(family).moments(site)
        assert found.count == expected.count == 6 * 24
        assert relative_error(found.total_N, expected.total_N) < 1e-6
        assert relative_error(found.gram_NN, expected.gram_NN) < 1e-6


def test_every_rank_writes_its_own_units(crew: Crew) -> None:
    for commits in crew.recording("llama").manifest()["sites"].values():
        assert [[(part["start"], part["stop"]) for part in commit["parts"]] for commit in commits] == [
            [(0, 24), (24, 48)]
        ] * 2
    sizes = crew.recording("llama").storage.sizes("activations") | crew.recording("llama").storage.sizes("moments")
    assert sum(done.bytes_written for done in crew.first["llama"][0]) == sum(sizes.values())
    assert [done.tokens for done in crew.first["llama"][0]] == [4 * 24, 2 * 24]


def test_the_same_tokens_are_sampled(crew: Crew, alone: dict[str, Recording]) -> None:
    for shard in range(2):
        origins = [
            parquet.read_table(path, columns=["sequence", "position"]).to_pydict()
            for recording in (alone["llama"], crew.recording("llama"))
            for path in sorted((recording.storage.folder / "activations").glob(f"*/shard-{shard:05d}.*"))
        ]
        assert len(origins) == 2 + 4
        assert all(origin == origins[0] for origin in origins)


def test_the_slower_rank_changes_no_byte(crew: Crew) -> None:
    manifests = [crew.recording(name).storage.read("manifest.json") for name in ("llama", "slow 0", "slow 1")]
    assert manifests[0] == manifests[1] == manifests[2]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_commit_comes_after_all_slices(slow: int, crew: Crew) -> None:
    folder = crew.recording(f"slow {slow}").storage.folder
    commits = list(folder.glob("commits/*/*.json"))
    assert len(commits) == len(SITES) * len(ITEMS)
    for commit in commits:
        slices = list(folder.glob(f"*/{commit.parent.name}/{commit.stem}.units-*"))
        assert len(slices) == 2 * 2
        assert all(one.stat().st_mtime_ns <= commit.stat().st_mtime_ns for one in slices)


def test_bfloat16_slices_are_read_together(crew: Crew, alone: dict[str, Recording]) -> None:
    for name, signal_NM in alone["llama"].signals(SITES[1]).items():
        assert relative_error(crew.recording("half").signals(SITES[1])[name], signal_NM) < 2**-8


@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_the_other_rank_raises(fault: str, crew: Crew) -> None:
    message, seconds = crew.first[fault]
    assert isinstance(message, str), message
    assert seconds < 90  # the timeout of the group is 6 s for the rank that hangs, 120 s for the one that dies
    assert crew.recording(fault).committed() == {(site, 0) for site in SITES}


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_that_can_share(size: int, pico: Path) -> None:
    assert tensor_ranks_problem(checkpoint.read_config(pico), size) is None


@pytest.mark.parametrize(
    ("changes", "size", "named"),
    [
        ({}, 3, "3 ranks cannot share 4 attention heads, 2 KV heads evenly; set run.workers=1 or 2"),
        ({}, 4, "4 ranks cannot share 2 KV heads evenly; set run.workers=1 or 2"),
        ({"intermediate_size": 45}, 2, "2 ranks cannot share 45 MLP units evenly; set run.workers=1"),
        ({"num_key_value_heads": 4}, 8, "8 ranks cannot share 4 attention heads, 4 KV heads evenly; .*=1 or 2 or 4"),
    ],
)
def test_ranks_that_cannot_share_are_told_why(changes: dict[str, int], size: int, named: str, pico: Path) -> None:
    problem = tensor_ranks_problem({**checkpoint.read_config(pico), **changes}, size) or ""
    assert re.fullmatch(f"{named}, or record.schedule=auto", problem)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("phi3", "gathers what mlp.gate_up_proj and mlp.down_proj of 'phi3' give"),
        ("glm", "gathers what mlp.gate_up_proj and mlp.down_proj of 'glm' give"),
        ("opt", "no plan to share the layers of 'opt'"),
    ],
)
def test_families_whose_units_no_rank_sees_are_refused(family: str, named: str) -> None:
    problem = tensor_ranks_problem(AutoConfig.for_model(family).to_dict(), 2) or ""
    assert named in problem
    assert problem.endswith("take record.schedule=sweep")


def test_heads_the_config_leaves_out_are_those_of_the_architecture(pico: Path) -> None:
    config = {key: value for key, value in checkpoint.read_config(pico).items() if key != "num_key_value_heads"}
    assert tensor_ranks_problem(config, 4) is None


def test_a_model_is_refused_before_its_weights_are_read(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((pico / "config.json").read_bytes())
    family = family_of(checkpoint.read_config(pico))
    with pytest.raises(ConfigError, match="4 ranks cannot share 2 KV heads"):
        TensorParallelModel(tmp_path, checkpoint.Numerics(), family, Block(0, 2, 2), ranks.Ranks(0, 4))
    with pytest.raises(ConfigError, match="not layers 0-0"):
        TensorParallelModel(tmp_path, checkpoint.Numerics(), family, Block(0, 1, 2), ranks.Ranks(0, 2))


def test_a_process_on_its_own_cannot_be_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="needs 2 processes that know each other, this one knows of none"):
        ranks.join(2)


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some other launcher
    assert ranks.join(1) == ranks.Ranks()


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_a_rank_takes_its_own_gpu(visible: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only one it sees, or that of its number; transformers binds the number in ``LOCAL_RANK``."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert ranks._own_gpu().index == index
    assert os.environ["LOCAL_RANK"] == str(index)
