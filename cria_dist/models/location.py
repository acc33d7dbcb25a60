"""Where a checkpoint is: built in, in a local directory, or on the hub."""

from pathlib import Path

from cria_dist.errors import ConfigError
from cria_dist.models.builtin import resolve_builtin
from cria_dist.models.checkpoint import INDEX, WEIGHTS, weight_files

TERMS = ["README.md", "LICENSE*", "NOTICE*"]
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", *TERMS]
"""What is downloaded of a model; its terms go on with what is made of it."""


def locate(path: str, revision: str | None, weights: bool = True) -> Path:
    """The local directory of a checkpoint: built in, local, or downloaded from the hub.

    On a cluster the driver looks, and workers are given the directory: it must lie where all nodes see it. So must the
    cache of what is downloaded (``HF_HOME``) or built in (``CRIA_CACHE``).

    Args:
        path: ``model.path`` of the configuration.
        revision: hub revision.
        weights: whether they are wanted; without, a ``config.json`` is enough.

    Raises:
        ConfigError: it does not exist or has no safetensors weights.
    """
    builtin, directory = resolve_builtin(path), Path(path).expanduser()
    if revision is not None and (builtin is not None or directory.is_dir()):
        raise ConfigError(f"model.revision={revision!r} is for models of the hub; leave it out for {path}")
    if builtin is not None:
        return builtin
    if not directory.is_dir():
        directory = _download(path, revision, FILES if weights else ["config.json"])
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.path={path!r} has no config.json; give a directory in transformers format")
    if weights:
        _check_weights(path, directory)
    return directory.resolve()


def _check_weights(path: str, directory: Path) -> None:
    """All files that belong to the model are there, and no others."""
    if not (directory / WEIGHTS).is_file() and not (directory / INDEX).is_file():
        raise ConfigError(
            f"model.path={path!r} has no {WEIGHTS}; convert it with model.save_pretrained(..., safe_serialization=True)"
        )
    if (directory / WEIGHTS).is_file() and (directory / INDEX).is_file():
        raise ConfigError(
            f"model.path={path!r} has both {WEIGHTS} and {INDEX}, and programs differ in which they read; remove one"
        )
    missing = [file for file in weight_files(directory) if not (directory / file).is_file()]
    if missing:
        raise ConfigError(
            f"model.path={path!r} lacks {missing[0]}, which its index names; take a whole copy of the model"
        )


def _download(path: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path={path!r} is not a directory; give an existing directory or a hub name org/model")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path={path!r} is neither a directory nor reachable on the hub ({reason}); {hub_remedy()}, "
            "and give the directory"
        ) from error


def hub_remedy(kind: str = "model") -> str:
    """What to do about a name that the hub does not answer to; ``kind`` is ``model`` or ``dataset``."""
    from huggingface_hub import constants

    option = "" if kind == "model" else f" --repo-type {kind}"
    offline = "HF_HUB_OFFLINE=1 forbids downloads: unset it, " if constants.HF_HUB_OFFLINE else ""
    return f"{offline}check the name, or download it first (hf download{option}; gated ones want a token)"
