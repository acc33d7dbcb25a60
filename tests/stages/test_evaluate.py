"""Perplexity, size, and the proof that a checkpoint loads elsewhere."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cria_dist.errors import DataError, NumericError
from cria_dist.models import checkpoint, surgery
from cria_dist.models.checkpoint import Numerics
from cria_dist.models.family import family_of
from cria_dist.records import Evaluation
from cria_dist.stages import verify
from cria_dist.stages.answers import answer_of, answer_of_variant
from cria_dist.stages.decide import Accounts, make_plan
from cria_dist.stages.evaluate import PerplexityMeter, Variant, mean_loss

KEPT = {"layer-000.mlp": tuple(range(0, 48, 2)), "layer-001.mlp": tuple(range(24))}


@pytest.fixture
def tokens_path(tmp_path: Path) -> Path:
    tokens_ST = np.random.default_rng(0).integers(0, 256, (5, 24)).astype(np.int32)
    np.save(tmp_path / "test.npy", tokens_ST)
    return tmp_path / "test.npy"


@pytest.fixture
def plan_path(pico: Path, tmp_path: Path) -> Path:
    widths = dict.fromkeys(KEPT, 48)
    dense = checkpoint.count_parameters(checkpoint.read_config(pico))
    plan = make_plan(KEPT, widths, Accounts(dense, dict.fromkeys(widths, 96)), "m", "d")
    (tmp_path / "plan.json").write_text(plan.to_json())
    return tmp_path / "plan.json"


def surgery_of(pico: Path) -> surgery.Surgery:
    config = checkpoint.read_config(pico)
    return surgery.Surgery(family_of(config), config, KEPT)


def measured(variant: Variant, tokens_path: Path, batch: int = 2) -> Evaluation:
    results = {variant: tokens_path.parent / f"{variant.label}.json"}
    return PerplexityMeter(tokens_path, Numerics(), batch, results)(variant)


def direct_perplexity(directory: Path, tokens_path: Path) -> float:
    """Token by token, in double precision, from the logits of one sequence at a time."""
    model = checkpoint.load_model(directory, Numerics())
    losses: list[float] = []
    for sequence in np.load(tokens_path):
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor(sequence[None]).long()).logits[0].double().numpy()
        for position in range(len(sequence) - 1):
            row_V = logits_TV[position]
            top = row_V.max()
            losses.append(top + math.log(np.exp(row_V - top).sum()) - row_V[sequence[position + 1]])
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_perplexity_is_that_of_a_direct_computation(batch: int, pico: Path, tokens_path: Path) -> None:
    found = measured(Variant("dense", pico), tokens_path, batch)
    assert found.perplexity == pytest.approx(direct_perplexity(pico, tokens_path), rel=1e-5)
    assert found.scored_tokens == 5 * 23


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary(pico: Path, tokens_path: Path) -> None:
    model = checkpoint.load_model(pico, Numerics())
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert math.exp(mean_loss(model, np.load(tokens_path), 2)) == pytest.approx(300, rel=1e-5)


def test_a_real_model(stories: Path, tmp_path: Path) -> None:
    text = (stories / "TinyStories-valid-30k.txt").read_text()[:6000]
    tokens = checkpoint.load_tokenizer(stories)(text, verbose=False)["input_ids"]
    np.save(tmp_path / "test.npy", np.asarray(tokens[: 6 * 256], dtype=np.int32).reshape(6, 256))
    assert 3 < measured(Variant("dense", stories), tmp_path / "test.npy").perplexity < 9


def test_what_was_measured_is_kept(pico: Path, tokens_path: Path) -> None:
    found = measured(Variant("dense", pico), tokens_path)
    assert Evaluation(**json.loads((tokens_path.parent / "dense.json").read_text())) == found
    assert asdict(found)["method"] == ""


def test_a_plan_in_memory_measures_like_its_checkpoint(
    pico: Path, plan_path: Path, tokens_path: Path, tmp_path: Path
) -> None:
    surgery.write_pruned(pico, tmp_path / "pruned", surgery_of(pico))
    on_disk = measured(Variant("disk", tmp_path / "pruned", "m"), tokens_path)
    in_memory = measured(Variant("memory", pico, "m", plan_path=plan_path), tokens_path)
    assert in_memory.perplexity == pytest.approx(on_disk.perplexity, rel=1e-6)
    assert in_memory.parameters == on_disk.parameters == checkpoint.count_parameters(surgery_of(pico).pruned_config())
    assert in_memory.weight_bytes == pytest.approx(on_disk.weight_bytes, rel=0.03)
    dense = measured(Variant("dense", pico), tokens_path)
    assert abs(dense.perplexity - on_disk.perplexity) > 1
    assert dense.weight_bytes == (pico / checkpoint.WEIGHTS).stat().st_size


def test_a_loss_that_is_not_finite_names_the_variant(pico: Path, tokens_path: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(pico, tmp_path / "spoilt"))
    change_a_weight(spoilt, torch.nan)
    with pytest.raises(NumericError, match="the loss of broken is nan"):
        measured(Variant("broken", spoilt), tokens_path)
    assert not (tokens_path.parent / "broken.json").exists()


def change_a_weight(directory: Path, value: float) -> None:
    tensors = load_file(directory / checkpoint.WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = value
    save_file(tensors, directory / checkpoint.WEIGHTS, metadata={"format": "pt"})


def test_a_stranger_finds_a_tampered_weight(pico: Path, tokens_path: Path, tmp_path: Path) -> None:
    """That an honest checkpoint passes is part of the finished run."""
    surgery.write_pruned(pico, tmp_path / "pruned", surgery_of(pico))
    reference = surgery.pruned_copy(checkpoint.load_model(pico, Numerics()), surgery_of(pico))
    change_a_weight(tmp_path / "pruned", 0.5)
    with pytest.raises(DataError, match=r"pruned loads in transformers, but its logits differ by \d"):
        verify.loads_in_transformers(tmp_path / "pruned", answer_of(reference, tokens_path))


def test_weights_in_half_precision_are_compared_in_float32(
    make_model: Callable[..., Path], tokens_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = make_model(tmp_path / "half", dtype="bfloat16")
    expected = answer_of_variant(Variant("dense", half), tokens_path)
    exact = checkpoint.from_pretrained(half, dtype=torch.float32)
    with torch.inference_mode():
        assert np.array_equal(expected.logits, exact(**expected.inputs).logits.numpy())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # this is about the CPU even there
    assert np.array_equal(answer_of_variant(Variant("dense", half), tokens_path).logits, expected.logits)
    assert verify.loads_in_transformers(half, expected).endswith("logits equal (largest difference 0.0e+00)")


def test_a_checkpoint_that_does_not_load_is_an_error(
    pico: Path, tokens_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "STRANGER", "import sys\nraise OSError(f'no weights in {sys.argv[1]}')")
    with pytest.raises(DataError, match=r"pico does not load in transformers: OSError: no weights in .*pico"):
        verify.loads_in_transformers(pico, answer_of(checkpoint.load_model(pico, Numerics()), tokens_path))


def test_the_stranger_cannot_import_this_package(
    pico: Path, tokens_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_lines, _, _ = verify.STRANGER.partition("import numpy")
    monkeypatch.setattr(verify, "STRANGER", f"{first_lines}\nimport cria_dist.models.family")
    with pytest.raises(DataError, match=r"does not load in transformers: ModuleNotFoundError.*cria_dist"):
        verify.loads_in_transformers(pico, answer_of(checkpoint.load_model(pico, Numerics()), tokens_path))


def test_a_logit_that_is_not_a_number_is_not_equal(
    pico: Path, tokens_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = "import sys, numpy\nfrom safetensors.numpy import save_file\nsave_file({'logits': numpy.full((1, 24, 300), "
    monkeypatch.setattr(verify, "STRANGER", f"{quick}numpy.nan, numpy.float32)}}, sys.argv[3])")
    reference = checkpoint.load_model(pico, Numerics())
    with pytest.raises(DataError, match="logits differ by nan"):
        verify.loads_in_transformers(pico, answer_of(reference, tokens_path))


def test_variants_are_named_and_can_be_keys(pico: Path) -> None:
    one = Variant("dense", pico)
    assert str(one) == "evaluate dense"
    assert len({one, replace(one), replace(one, repair="bias")}) == 2
