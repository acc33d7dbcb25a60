"""The check at a run's end: what it takes, and what is said where it cannot be made."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cria_dist import files
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.surgery import Surgery, write_pruned
from cria_dist.stages import fresh_process, verify
from cria_dist.stages.answers import bytes_to_compare
from cria_dist.stages.evaluate import Variant
from cria_dist.stages.verify import Export, Verifier

WIDTH, HIDDEN = 24, 32


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", np.arange(32, dtype=np.int32)[None] * 5 % 250)
    return tmp_path / "tokens.npy"


def pruned(dense: Path, target: Path) -> Path:
    config = checkpoint.read_config(dense)
    kept = {f"layer-{layer:03d}.mlp": tuple(range(WIDTH)) for layer in range(2)}
    write_pruned(dense, target, Surgery(family_of(config), config, kept))
    return target


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_what_it_takes_by_hand(dtype: str, itemsize: int, make_model: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", dtype=dtype)
    small = pruned(dense, tmp_path / "pruned")
    whole, left = (checkpoint.count_parameters(checkpoint.read_config(one)) for one in (dense, small))
    maps = 2 * 3 * WIDTH * HIDDEN
    in_memory = Variant("reference", dense, plan_path=tmp_path / "plan.json")
    assert bytes_to_compare(small, in_memory) == max(itemsize * (whole + maps), 4 * left)
    assert bytes_to_compare(small, Variant("reference", small)) == 4 * left
    masks = tmp_path / "masks"  # of maps that keep their shape
    masks.mkdir()
    shutil.copy(dense / checkpoint.WEIGHTS, masks)
    masked = Variant("reference", dense, plan_path=tmp_path / "plan.json", repair_dir=masks)
    assert bytes_to_compare(dense, masked) == max(itemsize * 2, 4) * whole


def test_what_memory_does_not_hold_is_not_tried(
    pico: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "usable_bytes", lambda: 1000)
    monkeypatch.setattr(verify, "answer_of_variant", lambda *_: pytest.fail("it was loaded"))
    export = Export(pico, Variant("reference", pico), tmp_path / "found.json", final=True)
    finding = Verifier(tokens)(export)
    assert finding == "not tried: needs 100 kB of main memory, 1 kB are free"
    found = files.read_json(export.record)
    assert found["finding"] == finding
    assert found["others"]["llama.cpp"].startswith("by rule: ")
    assert found["others"]["vLLM"].startswith("by rule: ")


def test_a_process_without_an_end_says_nothing_of_the_checkpoint(
    pico: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_process, "TIMEOUT_SECONDS", 0.1)
    export = Export(pico, Variant("reference", pico), tmp_path / "found.json", final=False)
    assert Verifier(tokens)(export) == "not tried to the end: no answer within 0 s"
