"""GPT-2 stores its maps with inputs as rows, queries, keys and values in one: every stage computes what it should."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist import load_pruned
from cria_dist.config import RecoverConfig, RunConfig
from cria_dist.errors import ConfigError
from cria_dist.maths.repair import least_squares
from cria_dist.methods import GradientSample, Magnitude, SiteStatistics, Verdict
from cria_dist.models import checkpoint, surgery, writing
from cria_dist.models.blocks import partition
from cria_dist.models.checkpoint import Numerics
from cria_dist.models.family import family_of
from cria_dist.models.mlp import signals_of
from cria_dist.models.tensor_parallel import tensor_ranks_problem
from cria_dist.records import Site
from cria_dist.stages.analyse import AnalyseTask, Analyst
from cria_dist.stages.evaluate import mean_loss
from cria_dist.stages.gradients import GradientTaker, GradientTask, cut
from cria_dist.stages.losses import LossTask, Probe
from cria_dist.stages.prepare import prepare
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from cria_dist.stages.recover_model import Learning, merged_state
from cria_dist.stages.repair import Repairer, RepairTask
from cria_dist.stages.sensitivity import CurveMeter
from cria_dist.store.recording import Recording
from cria_dist.store.saliences import Saliences
from cria_dist.store.site_scores import read_scores
from cria_dist.store.storage import LocalStorage

HEADS, NEURONS = Site(1, "attention"), Site(1)
SITES = [Site(layer, part) for layer in (0, 1) for part in ("attention", "mlp")]
KEPT = {"layer-000.attention": (1, 2, 3), "layer-001.attention": (0, 3)} | {
    f"layer-00{layer}.mlp": tuple(range(layer, 48, 2)) for layer in (0, 1)
}


@dataclass
class Spy:
    """A method that asks for everything and keeps what it got."""

    title: str = "spy"
    needs: frozenset[Any] = frozenset({"signals", "moments", "weights"})
    seen: list[SiteStatistics] = field(default_factory=list)

    def score(self, statistics: SiteStatistics) -> Verdict:
        self.seen.append(statistics)
        return Verdict(np.zeros(statistics.width))


@pytest.fixture(scope="module")
def gpt2(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 4 heads and 48 neurons, and the tokens that were recorded beside it."""
    folder = tmp_path_factory.mktemp("gpt2")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int32))
    return make_model(folder / "model", "gpt2", n_inner=48, num_key_value_heads=None, head_dim=None)


@pytest.fixture(scope="module")
def recording(gpt2: Path) -> Recording:
    made = Recording(LocalStorage(gpt2.parent / "recording"), "digest")
    how = Numerics(), "float32", 4, 4, 120, 0
    recorder = Recorder(RecordTask(made, gpt2, gpt2.parent / "tokens.npy", *how, parts=("attention", "mlp")))
    for shard in range(2):
        recorder(ShardWork(shard, *partition(2, 1)))
    made.write_manifest(SITES, 2)
    return made


@pytest.fixture(scope="module")
def weights(gpt2: Path) -> dict[str, torch.Tensor]:
    """Of the second layer, one row per unit, by hand: what goes in (queries, keys, values side by side), and out."""
    layer = {
        name.removeprefix("transformer.h.1."): tensor for name, tensor in load_file(gpt2 / checkpoint.WEIGHTS).items()
    }
    query, key, value = layer["attn.c_attn.weight"].double().split(32, dim=1)
    heads = [torch.cat([one[:, 8 * head : 8 * head + 8] for one in (query, key, value)], dim=1) for head in range(4)]
    return {
        "attention in": torch.stack([head.flatten() for head in heads]),
        "attention out": layer["attn.c_proj.weight"].double(),
        "mlp in": layer["mlp.c_fc.weight"].double().T,
        "mlp out": layer["mlp.c_proj.weight"].double(),
    }


@pytest.mark.parametrize("site", [HEADS, NEURONS], ids=lambda site: site.part)
def test_a_method_sees_units_as_of_any_family(
    site: Site, gpt2: Path, recording: Recording, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    spy = Spy()
    Analyst(AnalyseTask(recording, gpt2, spy, tmp_path, "d1", 0))(site)
    Analyst(AnalyseTask(recording, gpt2, Magnitude(), tmp_path, "d1", 0))(site)
    (seen,) = spy.seen
    rows, output_ND = weights[f"{site.part} in"], weights[f"{site.part} out"]
    norms = rows.norm(dim=1) * output_ND.reshape(len(rows), -1).norm(dim=1)
    np.testing.assert_allclose(read_scores(tmp_path, site).keep_N, norms.numpy(), rtol=1e-6)
    np.testing.assert_allclose(seen.output_norm_N, output_ND.norm(dim=1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(seen.output_DN, output_ND.T.numpy())
    assert {"attention": ["output", "value"], "mlp": ["input", "output"]}[site.part] == sorted(recording.signals(site))
    assert seen.input_NM is not None
    assert seen.input_NM.shape == (len(output_ND), 120)


def test_values_are_recorded_and_not_queries_or_keys(gpt2: Path, recording: Recording) -> None:
    model, found = checkpoint.load_model(gpt2, Numerics()), list[torch.Tensor]()
    model.transformer.h[1].attn.c_attn.register_forward_hook(lambda *args: found.append(args[2]))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(np.load(gpt2.parent / "tokens.npy")).long())
    values_TN = found[0][..., 64:].flatten(0, 1).numpy()
    column = recording.signals(HEADS)["value"][13]
    assert all(np.abs(values_TN[:, 13] - one).min() < 1e-5 for one in column)


def test_gradients_are_those_of_plain_autograd(gpt2: Path, tmp_path: Path) -> None:
    sample, tokens_ST = GradientSample(3, 3), np.load(gpt2.parent / "tokens.npy")[:3]
    saliences = Saliences(tmp_path, "d1", tuple(one.stop - one.start for one in cut(sample)))
    tokens_path, parts = gpt2.parent / "tokens.npy", ("attention", "mlp")
    GradientTaker(GradientTask(gpt2, tokens_path, Numerics(), saliences, parts))(*cut(sample))
    model, tokens = checkpoint.load_model(gpt2, Numerics()), torch.from_numpy(tokens_ST).long()
    model(input_ids=tokens, labels=tokens).loss.backward()
    layer = model.transformer.h[1]
    slope = {name: (one * one.grad).abs().double() for name, one in layer.named_parameters()}
    heads_N = slope["attn.c_attn.weight"].sum(0) + slope["attn.c_attn.bias"]
    heads_N = heads_N.reshape(3, 4, 8).sum((0, 2)) + slope["attn.c_proj.weight"].reshape(4, -1).sum(1)
    neurons_N = slope["mlp.c_fc.weight"].sum(0) + slope["mlp.c_fc.bias"] + slope["mlp.c_proj.weight"].sum(1)
    for site, wanted_N in ((HEADS, heads_N), (NEURONS, neurons_N)):
        np.testing.assert_allclose(saliences.mean(site), wanted_N.detach().numpy(), rtol=1e-4)


def test_the_repair_writes_maps_as_they_are_stored(gpt2: Path, recording: Recording, tmp_path: Path) -> None:
    """In memory and on disk the model computes what the dense one does with the solved columns, zeros elsewhere."""
    repairer = Repairer(RepairTask(recording, gpt2, KEPT, "least_squares", 1e-3, tmp_path / "repair", "d1"))
    assert [repairer(site) for site in SITES] == [site.key for site in SITES]
    config = checkpoint.read_config(gpt2)
    family, masked = family_of(config), checkpoint.load_model(gpt2, Numerics())
    operation = surgery.Surgery(family, config, KEPT, tmp_path / "repair")
    surgery.write_pruned(gpt2, tmp_path / "pruned", operation)
    tokens = torch.from_numpy(np.load(gpt2.parent / "tokens.npy")).long()
    with torch.inference_mode():
        dense = masked(input_ids=tokens).logits
        for site in SITES:
            output = masked.get_submodule(family.modules(site).output)
            kept_S = signals_of(KEPT[site.key], family.span(site, config))
            solved_DS = least_squares(output.weight.double().numpy().T, recording.moments(site), kept_S, 1e-3)
            output.weight[:] = 0
            output.weight[torch.from_numpy(kept_S)] = torch.from_numpy(solved_DS.T).float()
        expected = masked(input_ids=tokens).logits
        assert (expected - dense).abs().max() > 1e-2
        for found in (
            surgery.pruned_copy(checkpoint.load_model(gpt2, Numerics()), operation),
            load_pruned(tmp_path / "pruned"),
        ):
            torch.testing.assert_close(found(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_curve_is_the_loss_of_pruned_models(gpt2: Path, recording: Recording, tmp_path: Path) -> None:
    for site in SITES:
        Analyst(AnalyseTask(recording, gpt2, Magnitude(), tmp_path, "d1", 0))(site)
    config, tokens_path = checkpoint.read_config(gpt2), gpt2.parent / "tokens.npy"
    task = LossTask(gpt2, Numerics(), tokens_path, range(4, 8), 2, recording, 2, tmp_path, "least_squares", 1e-3, "d")
    meter = CurveMeter(task)
    for site, width in ((HEADS, 2), (NEURONS, 24)):
        order = np.argsort(-read_scores(tmp_path, site).keep_N, kind="stable")
        whole = {one.key: tuple(range(units)) for one, units in family_of(config).widths(config, (site.part,)).items()}
        kept = whole | {site.key: tuple(sorted(order[:width].tolist()))}
        Repairer(RepairTask(recording, gpt2, kept, "least_squares", 1e-3, tmp_path / "repair", "d1"))(site)
        for key in whole.keys() - {site.key}:
            save_file({}, tmp_path / "repair" / f"{key}.safetensors")
        operation = surgery.Surgery(family_of(config), config, kept, tmp_path / "repair")
        pruned = surgery.pruned_copy(checkpoint.load_model(gpt2, Numerics()), operation)
        assert meter(Probe(site, (width,)))[0] == pytest.approx(
            mean_loss(pruned, np.load(tokens_path)[4:8], 2), rel=1e-5
        )


def test_adapters_are_added_to_maps_as_they_are_stored(gpt2: Path) -> None:
    pytest.importorskip("peft")
    tokens = torch.arange(20).reshape(1, 20)
    model, plain = (checkpoint.load_model(gpt2, Numerics()) for _ in range(2))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    learning = Learning(RecoverConfig(lora_rank=2, train="mlp"), ("mlp",), 0)
    learning.prepare(model)
    learning.adapt(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        merged = merged_state(model)
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {f"transformer.h.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("c_fc", "c_proj")}


def test_what_gpt2_cannot_do_is_said(
    gpt2: Path, run_config: Callable[..., RunConfig], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    assert "no plan to share the layers of 'gpt2'" in (tensor_ranks_problem(checkpoint.read_config(gpt2), 2) or "")
    own = {"n_inner": 48, "num_key_value_heads": None, "head_dim": None}
    scaled = make_model(tmp_path / "scaled", "gpt2", scale_attn_by_inverse_layer_idx=True, **own)
    config = run_config(tmp_path, model={"path": str(scaled)}, method={"name": "block_influence"})
    with pytest.raises(ConfigError, match=r"by the layer's number.*; prune mlp or attention"):
        prepare(config)


def test_a_config_has_the_shared_names_in_memory_and_its_own_on_disk(gpt2: Path, tmp_path: Path) -> None:
    config = checkpoint.read_config(gpt2)
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (32, 2, 4)
    writing.finish(gpt2, tmp_path, config)
    there, here = (json.loads((folder / "config.json").read_text()) for folder in (gpt2, tmp_path))
    assert here == there
    del config["n_inner"]
    assert family_of(config).widths(config) == {Site(0): 128, Site(1): 128}, "four times the hidden size"
