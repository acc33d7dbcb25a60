"""Tensors that a config.json promises and a checkpoint does not have, under the names that are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cria_dist.errors import ConfigError
from cria_dist.models.checkpoint import WEIGHTS, read_config
from cria_dist.models.family import family_of
from cria_dist.stages.check_tensors import check_tensors


def test_a_recognised_model_with_other_names_on_disk(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """OLMo's hybrid has them: its MLPs are where they are looked for, the norms of some layers are not."""
    dense = make_model(tmp_path / "dense", "granite")
    config = read_config(dense)
    check_tensors(dense, family_of(config), config)
    tensors = load_file(dense / WEIGHTS)
    save_file({name.replace("1.input_layernorm", "1.norm"): one for name, one in tensors.items()}, dense / WEIGHTS)
    with pytest.raises(ConfigError, match=r"has no tensor 'model\.layers\.1\.input_layernorm\.weight'"):
        check_tensors(dense, family_of(config), config)
