"""Whether a checkpoint has the tensors its config.json promises, from the headers of its files alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cria_dist.errors import ConfigError
from cria_dist.models import attention, checkpoint
from cria_dist.models.generic import GenericFamily
from cria_dist.models.mlp import MlpFamily
from cria_dist.models.shapes import stored_tensors
from cria_dist.models.streaming import DTYPES
from cria_dist.stages.check_experts import expert_tensors


def check_tensors(model_dir: Path, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """The checkpoint must have what is to be pruned, under the names of the stock class, in types that are written.

    Raises:
        ConfigError: names the tensor, or the size that config.json lacks.
    """
    there = stored_tensors(model_dir)
    odd = [f"{name} is {tensor.dtype}" for name, tensor in there.items() if tensor.dtype not in DTYPES.values()]
    if odd:
        raise ConfigError(
            f"{model_dir}: {odd[0]}, and checkpoints are written in {', '.join(DTYPES.values())}; give the checkpoint "
            "in float32, bfloat16 or float16"
        )
    check_sizes(model_dir, family, model_config)
    wanted = [name for site in family.widths(model_config) for name in family.coupled_tensors(site, model_config)]
    shapes = {family.on_disk(name): one.shape for name, one in checkpoint.empty_model(model_config).named_parameters()}
    for name in sorted(shapes.keys() & there.keys()):
        if tuple(shapes[name]) != tuple(there[name].shape):
            raise ConfigError(
                f"{model_dir}: {name} has shape {tuple(there[name].shape)}, config.json says {tuple(shapes[name])}; is "
                "config.json of another model?"
            )
    if family.takes != "tokens":  # transformers would make up the head that a checkpoint of another task lacks
        wanted += shapes
    elif isinstance(family, GenericFamily):  # recognised by its modules, which may be called otherwise on disk
        wanted += [name for name in shapes if name.startswith(f"{family.layers}.")]
    wanted += expert_tensors(family, model_config)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ConfigError(
            f"{model_dir} has no tensor {missing[0]!r}; give a checkpoint that save_pretrained wrote of the model with "
            f"its head ({checkpoint.stock_class(model_config).__name__}) and of this config.json"
        )


def check_sizes(model_dir: Path, family: MlpFamily, model_config: Mapping[str, Any]) -> None:
    """The sizes that are counted with must be in config.json; ``transformers`` would take its defaults.

    Raises:
        ConfigError: names the first that is not.
    """
    heads = ("num_attention_heads",) if attention.PART in family.parts else ()
    missing = [key for key in ("hidden_size", "num_hidden_layers", *heads) if key not in model_config]
    try:
        family.widths(model_config)
    except KeyError as error:
        missing.append(error.args[0])
    if missing:
        raise checkpoint.damaged(model_dir / "config.json", f"it has no {missing[0]!r}")
