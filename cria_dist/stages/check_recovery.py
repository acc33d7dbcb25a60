"""What a recovery needs beside its settings, checked before anything is computed."""

from importlib.util import find_spec

from cria_dist.config import RunConfig
from cria_dist.errors import ConfigError


def check_recovery(config: RunConfig) -> None:
    """Adapters need peft, and would fill the zeros of a sparse model.

    Raises:
        ConfigError: names what is missing, or what does not go together.
    """
    recover = config.recover
    if not recover.steps or not recover.lora_rank:
        return
    if config.method.unit == "weight":
        raise ConfigError(
            f"recover.lora_rank={recover.lora_rank} adds a dense matrix to every map, and {config.method.title} makes "
            "weights zero; set recover.lora_rank=0"
        )
    if find_spec("peft") is None:
        raise ConfigError(
            f"recover.lora_rank={recover.lora_rank} needs peft, which is not installed; pip install 'cria-dist[lora]'"
        )
