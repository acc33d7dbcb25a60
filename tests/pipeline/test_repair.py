"""The sequential repair in whole runs: closer to the dense model than the local one, and resumed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cria_dist import load_pruned, pipeline
from cria_dist.config import RunConfig
from cria_dist.models import checkpoint
from cria_dist.pipeline import Context, prune, results
from cria_dist.pool import LocalPool
from cria_dist.records import PruningPlan

RunConfigMaker = Callable[..., RunConfig]
MakeContext = Callable[..., Context]
MIXED = {"units": ["mlp", "attention", "layer"], "budget": "parameters", "allocation": "sensitivity", "ratio": 0.25}


class MortalPool(LocalPool):
    """Ends like Ctrl-C does, before a number of items."""

    def __init__(self, stage: str, items: int) -> None:
        self._stage, self._left = stage, items

    def map(self, make_worker: Any, *args: Any, **flow: Any) -> Iterator[tuple[Any, Any]]:
        for done in super().map(make_worker, *args, **flow):
            if make_worker.func.__name__ == self._stage:
                self._left -= 1
                if not self._left:
                    raise KeyboardInterrupt
            yield done


def applied(context: Context) -> Path:
    prune(context, until="apply")
    return context.job.folder


def logits(folder: Path, tokens_ST: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return load_pruned(folder)(input_ids=torch.from_numpy(tokens_ST).long()).logits


@pytest.mark.parametrize(
    "prune_changes", [{"ratio": 0.5}, {"ratio": 0.5, "rounds": 2}, MIXED], ids=["one", "two", "mixed"]
)
def test_it_ends_closer_to_the_dense_model_than_the_local_repair(
    prune_changes: dict[str, Any],
    make_model: Callable[..., Path],
    run_config: RunConfigMaker,
    make_context: MakeContext,
    tmp_path: Path,
) -> None:
    """On the calibration text; the plans are the same."""
    dense, errors, plans = make_model(tmp_path / "dense", num_hidden_layers=3), [], []
    for repair in ("least_squares", "sequential"):
        changes = {**prune_changes, "repair": repair}
        data = {"calibration_sequences": 40}
        config = run_config(tmp_path, model={"path": str(dense)}, data=data, method={"name": "wanda"}, prune=changes)
        folder = applied(make_context(config))
        tokens_ST = np.load(folder / "tokens" / "calibration.npy")
        errors.append(float(((logits(folder / "pruned", tokens_ST) - logits(dense, tokens_ST)) ** 2).mean()))
        plans.append(PruningPlan.from_json((folder / "round-00" / "plan.json").read_text()).kept)
        assert not list(folder.rglob("*/repair/s*")), "hidden states and sums are gone"
    assert plans[0] == plans[1]
    assert errors[1] < 0.99 * errors[0]


def test_sentences_and_what_was_interrupted(
    pico_bert: Path, run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path
) -> None:
    """Sentences of different lengths, heads and neurons; killed after every ninth step, the weights are the same."""
    table = tmp_path / "sentences.tsv"
    rows = [f"{number} {'rain ' * (1 + number % 9)}falls\t{('bad', 'good')[number % 2]}" for number in range(120)]
    table.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    half = {"source": str(table), "field": "sentence", "label": "label"}
    data = {
        "calibration": {**half, "part": "first"},
        "test": {**half, "part": "second"},
        "calibration_sequences": 60,
        "test_sequences": 8,
    }
    prune_changes = {"units": ["mlp", "attention"], "budget": "parameters", "repair": "sequential", "multiple": 1}
    record = {"shard_sequences": 30, "batch_sequences": 30}
    found = []
    for name, mortal in (("whole", False), ("killed", True)):
        config = run_config(
            tmp_path / name,
            model={"path": str(pico_bert)},
            data=data,
            record=record,
            method={"name": "wanda"},
            prune=prune_changes,
        )
        while mortal:
            try:
                applied(make_context(config, MortalPool("SequentialRepairer", 10)))
                mortal = False
            except KeyboardInterrupt:
                continue
        folder = applied(make_context(config))
        found.append(load_file(folder / "pruned" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    with checkpoint.open_tensors(pico_bert) as tensors:
        biases = [f"bert.encoder.layer.{layer}.output.dense.bias" for layer in range(3)]
        same = [torch.equal(found[0][name], tensors.read(name)) for name in biases]
    assert not all(same), "maps with biases get new ones"


def test_the_report_says_what_was_repaired_how(
    run_config: RunConfigMaker, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "write_report", lambda *_: None)
    monkeypatch.setattr(results, "verify_exports", lambda *_: {})
    changes = {"prune": {"repair": "sequential"}, "compare": [{"name": "random"}], "recover": {"steps": 0}}
    report = prune(make_context(run_config(tmp_path, **changes, evaluate={"prompts": [], "latency_repeats": 0})))
    assert report is not None
    kinds = [one.repair for one in (*report.variants, *report.comparison)]
    assert kinds == ["none", "none", "sequential", "none", "sequential"]
