"""What a run will take, from a config.json alone: against numbers computed by hand."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError, CriaError
from cria_dist.models import checkpoint, location
from cria_dist.models.family import family_of
from cria_dist.models.sizes import sizes_of
from cria_dist.stages import probe
from cria_dist.stages.estimate import estimate
from cria_dist.stages.estimate_time import workers_assumed
from cria_dist.stages.footprint import Workload, in_units, num_shards, shard_sequences
from cria_dist.store.moments import stored_bytes

RunConfigMaker = Callable[..., RunConfig]

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip
LLAMA_70B: dict[str, Any] = LLAMA_7B | {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
}  # fmt: skip
TOKENS = 128 * 2048


def bare(folder: Path, config: dict[str, Any]) -> str:
    """A folder with nothing but config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def large(run_config: RunConfigMaker, tmp_path: Path, config: dict[str, Any], **record: Any) -> RunConfig:
    return run_config(
        tmp_path,
        model={"path": bare(tmp_path / "model", config), "dtype": "bfloat16"},
        data={"sequence_length": 2048, "calibration_sequences": 128},
        record={"tokens": 4096, "shard_sequences": 8, "batch_sequences": 4, "memory_gb": 80} | record,
        run={"pool": "ray", "workers": 8},
    )


def test_llama_2_7b_by_hand(run_config: RunConfigMaker, tmp_path: Path) -> None:
    found = estimate(large(run_config, tmp_path, LLAMA_7B, memory_gb=22))
    assert found["parameters"] == 6_738_415_616
    assert found["prunable_parameters"] == 32 * 3 * 4096 * 11008
    assert (found["sites"], found["units_per_site"], found["calibration_tokens"]) == (32, 11008, 262_144)
    assert found["storage_bytes.signals"] == 4096 * 32 * 11008 * 3 * 2
    assert found["shards"] == 16
    assert found["storage_bytes.moments"] == 16 * 32 * stored_bytes(11008)
    assert found["storage_bytes.boundaries"] == TOKENS * 4096 * 2
    assert found["storage_bytes.checkpoints"] == 2 * 2 * 6_738_415_616
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert (found["repair_flop"], found["seconds.repair"]) == (0, 0)
    assert found["storage_bytes.repair"] == 2 * 32 * 4096 * 11008
    assert found["forward_flop"] == TOKENS * 32 * (2 * layer + 4 * 2048 * 4096)
    assert found["moments_flop"] == TOKENS * 32 * 2 * 11008**2
    assert (found["workers"], found["memory.per_worker"]) == (8, "22 GB")
    assert str(found["memory.replicate"]).startswith("31.9 GB, does not fit")
    assert str(found["memory.pipeline"]).endswith("fits: 8 workers hold 4 layers each")
    assert "fits: 2 blocks of 16 layers" in str(found["memory.sweep"])
    assert str(found["memory.tensor"]).endswith("8 workers share every layer")
    assert str(found["schedule"]).startswith("pipeline: 13.2 GB of weights + 15.5 GB of moments")
    assert str(found["memory.evaluate"]).startswith("22.1 GB, does not fit: a worker holds the whole model")
    assert str(found["memory.verify"]).startswith("at most 27 GB, ")  # 4 bytes each; redone in float16 22.1 GB
    assert found["analyst_memory_bytes"] == 6 * 4 * 4096 * 11008


def test_what_is_left_by_hand(run_config: RunConfigMaker, tmp_path: Path) -> None:
    config = large(run_config, tmp_path, LLAMA_7B)
    found = estimate(config)
    assert found["left.units_per_site"] == 8256  # of 11,008 at a quarter
    left = 6_738_415_616 - 32 * 3 * 4096 * (11008 - 8256)
    assert found["left.parameters"] == left
    frozen = 2 * 32000 * 4096
    recovery = 16 * (left - frozen) + 4 * frozen + 2 * 6_738_415_616
    assert str(found["memory.recover"]).startswith(
        f"{in_units(recovery)} per worker, without activations, does not fit"
    )
    assert "recover.strategy='fsdp2' with more workers" in str(found["memory.recover"])
    assert str(found["seconds.basis"]).startswith("record only, not scores, evaluation or recovery; 8 workers as fast")
    without = config.recover.model_copy(update={"steps": 0})
    assert "memory.recover" not in estimate(config.model_copy(update={"recover": without}))


def test_what_is_left_is_a_budget_where_layers_differ(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    del pico
    found = estimate(run_config(tmp_path, prune={"allocation": "global"}))
    assert found["left.budget"] == "0.75 of what prune.budget=units measures, spread by prune.allocation=global"
    found = estimate(run_config(tmp_path, method={"name": "block_influence"}, prune={"ratio": 0.5}))
    assert found["left.layers"] == 1


def test_a_mixture_without_sites(make_model: Callable[..., Path], run_config: RunConfigMaker, tmp_path: Path) -> None:
    """Whole layers go, and there are no neurons to observe."""
    model = {"path": str(make_model(tmp_path / "model", "mixtral", num_local_experts=4, num_experts_per_tok=2))}
    found = estimate(run_config(tmp_path, model=model, method={"name": "block_influence"}, prune={"ratio": 0.5}))
    assert (found["sites"], found["units_per_site"], found["left.layers"]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"ratio": 0.99}}, r"leaves 0 of 48 units"),
        (
            {"prune": {"ratio": 0.5, "budget": "parameters", "units": ["attention"]}},
            r"more than the prunable units hold",
        ),
        ({"prune": {"units": ["attention"]}, "method": {"name": "block_influence"}}, r"does not know prune\.units"),
        ({"prune": {"units": ["experts"]}}, r"experts cannot; leave it out"),
    ],
)
def test_what_a_run_refuses_is_not_estimated(
    changes: dict[str, Any], message: str, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(CriaError, match=message):
        estimate(run_config(tmp_path, **{"method": {"name": "activation"}, **changes}))


def test_a_classifier_without_labels_ends_early(
    make_classifier: Callable[..., Path], run_config: RunConfigMaker, tmp_path: Path
) -> None:
    images = {"source": "x.parquet", "format": "images", "field": "image"}
    model = {"path": str(make_classifier(tmp_path / "model"))}
    data = {"calibration": images, "test": images}
    found = estimate(run_config(tmp_path, model=model, data=data, record={"tokens": 100}))
    assert str(found["ends_with"]).startswith("apply: recover and evaluate (hence prune) need data.calibration.label")
    assert "memory.recover" not in found


def test_a_sequential_repair_by_hand(run_config: RunConfigMaker, tmp_path: Path) -> None:
    config = large(run_config, tmp_path, LLAMA_7B, memory_gb=22)
    config = config.model_copy(update={"prune": config.prune.model_copy(update={"repair": "sequential"})})
    found = estimate(config)
    passing = 4 * TOKENS * 4096 * 2 + 16 * 4 * 11008 * (11008 + 4096)
    assert found["storage_bytes.repair"] == passing + 2 * 32 * 4096 * 11008
    assert str(found["memory.repair"]).startswith("8.34 GB: one worker")  # 8 x 11008 x (6 x 11008 + 7 x 4096)
    forward, moments, repair = (int(str(found[f"{name}_flop"])) for name in ("forward", "moments", "repair"))
    assert repair == 3 * forward + moments + TOKENS * 32 * 2 * 11008 * 4096
    seconds = float(str(found["seconds"])), float(str(found["seconds.repair"]))
    assert seconds[1] / seconds[0] == pytest.approx(repair / (forward + moments), rel=0.02)


def test_repairs_that_stay_are_counted_by_rounds_and_methods(run_config: RunConfigMaker, tmp_path: Path) -> None:
    one = 4 * 2 * 32 * 48  # float32, layers, hidden, neurons
    others = [{"name": "wanda"}, {"name": "flap"}, {"name": "block_influence"}]
    for changes, times in (
        ({"prune": {"rounds": 3}, "compare": others}, 3 + 2),
        ({"method": {"name": "block_influence"}, "prune": {"ratio": 0.5}, "compare": others[:1]}, 1),
        ({"prune": {"repair": "none"}, "compare": others}, 0),
    ):
        assert estimate(run_config(tmp_path, **changes))["storage_bytes.repair"] == times * one


def test_llama_3_70b_by_hand(run_config: RunConfigMaker, tmp_path: Path) -> None:
    started = time.process_time()
    found = estimate(large(run_config, tmp_path, LLAMA_70B))
    assert time.process_time() - started < 20, "seconds, whatever the size"
    assert found["parameters"] == 70_553_706_496
    assert found["storage_bytes.moments"] == 16 * 80 * stored_bytes(28672)
    assert str(found["schedule"]).startswith("pipeline: 139 GB of weights + 263 GB of moments")
    assert str(found["schedule"]).endswith("8 workers hold 10 layers each")


def test_a_model_no_worker_can_hold_is_said_not_raised(run_config: RunConfigMaker, tmp_path: Path) -> None:
    found = estimate(large(run_config, tmp_path, LLAMA_70B, memory_gb=4))
    assert str(found["schedule"]).startswith("none: one layer needs ")
    assert all("does not fit" in str(found[f"memory.{kind}"]) for kind in ("replicate", "pipeline", "sweep", "tensor"))


def test_weights_are_not_needed_but_for_a_probe(run_config: RunConfigMaker, tmp_path: Path) -> None:
    config = large(run_config, tmp_path, LLAMA_7B)
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        estimate(config, measured=True)
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        location.locate(config.model.path, None)


def test_a_hub_name_is_asked_for_its_config_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        del name, revision
        asked.append(allow_patterns)
        return bare(tmp_path / "downloaded", LLAMA_7B)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = location.locate("meta-llama/Llama-2-7b-hf", None, weights=False)
    assert (folder, asked) == (tmp_path / "downloaded", [["config.json"]])


def test_advice_on_moments_is_right(run_config: RunConfigMaker, tmp_path: Path) -> None:
    config = large(run_config, tmp_path, LLAMA_70B, shard_sequences=2)
    before = estimate(config)
    assert before["storage_bytes.advice"] == (
        "moments are most of it; record.shard_sequences=9 makes 15 shards and 2.01 TB of moments"
    )
    record = config.record.model_copy(update={"shard_sequences": 9})
    after = estimate(config.model_copy(update={"record": record}))
    assert (after["shards"], after["storage_bytes.moments"]) == (15, 15 * 80 * stored_bytes(28672))
    assert "storage_bytes.advice" not in after


@pytest.mark.parametrize(
    ("sequences", "wanted", "length", "shards"),
    [
        (12, 0, 8, 2),
        (48, 0, 8, 6),
        (128, 0, 8, 16),
        (129, 0, 9, 15),
        (4096, 0, 256, 16),
        (4096, 3, 3, 1366),
        (5, 9, 9, 1),
    ],
)
def test_shards(
    sequences: int, wanted: int, length: int, shards: int, run_config: RunConfigMaker, tmp_path: Path
) -> None:
    """By default at most 16, of at least 8 sequences; what is set is taken."""
    config = run_config(tmp_path, data={"calibration_sequences": sequences}, record={"shard_sequences": wanted})
    assert (shard_sequences(config), num_shards(config)) == (length, shards)


def test_workers_of_a_run(run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert workers_assumed(run_config(tmp_path, run={"pool": "local", "workers": 5})) == 1
    assert workers_assumed(run_config(tmp_path, run={"pool": "ray", "workers": 5})) == 5
    assert workers_assumed(run_config(tmp_path, run={"pool": "ray"})) == 3


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_checkpoint(
    model_type: str, tied: bool, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_model(tmp_path / "model", model_type, tie_word_embeddings=tied)
    model = checkpoint.load_model(directory, checkpoint.Numerics())
    config = checkpoint.read_config(directory)
    sizes = sizes_of(config, family_of(config))
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.layers == tuple(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert sizes.embedding == 300 * 32
    assert sizes.head == (0 if tied else 300 * 32)
    assert sizes.shared == 32
    assert sizes.widths == (48, 48)
    assert (sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.vocabulary) == (32, 4, 2, 8, 300)
    assert sizes.stores_attention == (model_type == "gemma2")


def test_a_probe_records_for_real(run_config: RunConfigMaker, pico: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    work = Workload(config, checkpoint.read_config(pico))
    for layer in (0, 1):
        found = probe.time_layer(config, work, pico, layer)
        assert 0 < found.token < 0.1
        assert 0 <= found.shard < 10
        assert 0 <= found.load < 30
    assert not (tmp_path / "runs").exists(), "a probe leaves nothing behind"


def test_the_time_of_a_probe_is_extrapolated(
    run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico: Path
) -> None:
    """3 shards of 128 tokens; one layer takes 1 ms a token, 0.1 s a shard and 2 s to load, the other twice that."""
    times = {0: probe.LayerTime(1e-3, 0.1, 2.0), 1: probe.LayerTime(2e-3, 0.2, 4.0)}
    monkeypatch.setattr(probe, "time_layer", lambda config, work, directory, layer: times[layer])
    for workers, rounds in ((1, 3), (2, 2), (8, 1)):
        config = run_config(tmp_path, run={"pool": "ray", "workers": workers})
        found = estimate(config, measured=True)
        assert found["seconds"] == pytest.approx(rounds * (0.128 + 0.1 + 0.256 + 0.2) + 6.0, abs=0.06)
        assert f"{workers} workers" in str(found["seconds.basis"])


def test_without_a_probe_time_is_a_lower_bound(
    run_config: RunConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "flop_per_second", lambda dtype: {"bfloat16": 2e14, "float32": 1e14}[dtype])
    found = estimate(large(run_config, tmp_path, LLAMA_7B))
    forward, moments = int(str(found["forward_flop"])), int(str(found["moments_flop"]))
    assert found["seconds"] == pytest.approx((forward / 2e14 + moments / 1e14) / 8, abs=0.06)
    assert "at best" in str(found["seconds.basis"])


def test_the_speed_of_products_is_a_speed() -> None:
    speeds = [probe.flop_per_second("float32") for _ in range(2)]
    assert all(1e8 < speed < 1e16 for speed in speeds)
    assert math.isfinite(sum(speeds))
