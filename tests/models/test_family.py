"""What is said of models that no adapter is for."""

from typing import Any

import pytest

from cria_dist.errors import ConfigError
from cria_dist.models.family import family_of


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (
            {"model_type": "resnet"},
            r"; cria_dist\.models\.resnet_bottleneck\.convert makes a known model of torchvision",
        ),
        ({"model_type": "vgg"}, r"; cria_dist\.models\.vgg_cifar\.convert makes a known model"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            r"; its text part is, as 'gemma3_text': save that as a checkpoint of its own",
        ),
        ({"model_type": "mamba"}, r"mlp\.down_proj$"),
        ({"model_type": "gemma9", "text_config": {"model_type": "gemma9_text"}}, r"mlp\.down_proj$"),
    ],
)
def test_a_family_that_is_not_known_and_what_to_do(config: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=r"model family '\w+' is not known; known families: bert, .*" + hint):
        family_of(config)
