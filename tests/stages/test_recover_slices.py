"""Mixtures of experts that are shared out: read and written under the names of their checkpoints, expert by expert."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from cria_dist.errors import DataError
from cria_dist.models import checkpoint
from cria_dist.stages.recover_model import merged_state
from cria_dist.stages.recover_shards import load_shared, write_like
from cria_dist.stages.recover_slices import ExpertMap, whole

pytestmark = pytest.mark.usefixtures("group_of_one")
EXACT = checkpoint.Numerics()
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "mlp_only_layers": [1], "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


@pytest.fixture(params=MODELS)
def dense(request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path: Path) -> Path:
    shape = {"num_experts_per_tok": 2, "num_hidden_layers": 2, "shard_size": "30KB", "dtype": "bfloat16"}
    return make_model(tmp_path / "model", request.param, **shape, **MODELS[request.param])


def test_experts_are_read_as_the_model_has_them_and_written_as_its_files_do(dense: Path, tmp_path: Path) -> None:
    model, expected = load_shared(dense, EXACT), checkpoint.load_model(dense, EXACT).state_dict()
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    assert all(torch.equal(values, expected[name]) for name, values in found.items())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    state = merged_state(model)
    layers = 2 if checkpoint.read_config(dense)["model_type"] == "mixtral" else 1
    assert sum(isinstance(part, ExpertMap) for part in state.values()) == 3 * 3 * layers
    write_like(dense, tmp_path / "written", state, rank=0)
    for file in sorted(dense.glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "written" / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_expert_that_is_missing(dense: Path) -> None:
    file = next(
        path for path in sorted(dense.glob("*.safetensors")) if any(".experts.1." in n for n in load_file(path))
    )
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.1." in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    index = dense / checkpoint.INDEX
    index.write_text(index.read_text().replace(f'"{name}"', '"another"'))
    with pytest.raises(DataError, match=rf"has no tensor '{name}'"):
        load_shared(dense, EXACT)
