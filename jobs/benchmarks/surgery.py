"""Surgery of a checkpoint in the shape of Llama-7B, sharded, bfloat16: its memory and its speed beside a plain copy.

Both run in processes of their own (``surgery_process.py``), in turn, over the same files, none of which is in the page
cache when they start.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from cria_dist import files
from cria_dist.models import checkpoint
from jobs.benchmarks.frame import RESULTS, Measurement, alternate
from jobs.benchmarks.surgery_process import KEPT_SHARE

NAME = "surgery"
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "num_hidden_layers": 32, "heads": 32}
QUICK = {"hidden_size": 1024, "intermediate_size": 2752, "vocab_size": 8000, "num_hidden_layers": 12, "heads": 8}
SHARD_BYTES, QUICK_SHARD_BYTES = 5_000_000_000, 120_000_000
SPARE_BYTES = 5 << 30
"""Left free on the disk."""


def measure(quick: bool) -> Measurement:
    """Copy and prune in turn."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS) as scratch:
        folder = Path(scratch)
        shape = QUICK if quick else _fitting(SHAPE, files.free_bytes(folder))
        written = write_random(folder / "source", shape, QUICK_SHARD_BYTES if quick else SHARD_BYTES)
        found: dict[str, list[Mapping[str, float]]] = {"copy": [], "prune": []}

        def contender(verb: str) -> float:
            _forget(folder / "source")
            found[verb].append(run_process(verb, folder / "source", folder / "target"))
            shutil.rmtree(folder / "target")
            return found[verb][-1]["seconds"]

        taken = alternate({verb: lambda verb=verb: contender(verb) for verb in found}, repeats=2, warm_up=0)
    largest, total = max(written), sum(written)
    ratios = [copied / pruned for copied, pruned in zip(taken["copy"], taken["prune"], strict=True)]
    peaks = [one["peak"] / largest for one in found["prune"]]
    added = [(one["peak"] - one["start"]) / largest for one in found["prune"]]
    return Measurement(
        name=NAME,
        protocol=(
            f"Random bfloat16 weights in the shape of Llama-7B with {shape['num_hidden_layers']} layers of hidden size "
            f"{shape['hidden_size']}: {total / 1e9:.2f} GB in {len(written)} shards, the largest of "
            f"{largest / 1e9:.2f} GB.",
            f"Every layer keeps {KEPT_SHARE:.0%} of its MLP neurons, scattered. Files are flushed to the disk by both.",
            "copy_speed_ratio: seconds of a plain copy of the same files over the seconds of the surgery, the median.",
            "rss_over_largest_shard: highest resident memory of the process, libraries and mapped files included; "
            "added_rss_over_largest_shard: the same without what the process held when it began.",
        ),
        metrics={
            "copy_speed_ratio": median(ratios),
            "rss_over_largest_shard": max(peaks),
            "added_rss_over_largest_shard": max(added),
            "gigabytes": total / 1e9,
        },
        samples={"time": taken, "peak over largest shard": {"prune": peaks}},
        units={"time": "s"},
    )


def run_process(verb: str, source: Path, target: Path) -> dict[str, float]:
    """Copy or prune in a new process: ``seconds``, and resident bytes at the ``start`` and at their ``peak``."""
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "jobs" / "benchmarks" / "surgery_process.py"), verb, str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout)


def _fitting(shape: Mapping[str, int], free: int) -> dict[str, int]:
    """The shape with as many layers as leave room for a copy."""
    ends, one = (_parameters({**shape, "num_hidden_layers": layers}) for layers in (0, 1))
    room = ((free - SPARE_BYTES) // 4 - ends) // (one - ends)  # two copies of two bytes
    return {**shape, "num_hidden_layers": max(1, min(shape["num_hidden_layers"], room))}


def _parameters(shape: Mapping[str, int]) -> int:
    return sum(torch.Size(size).numel() for _, size in _tensors(shape))


def _tensors(shape: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the layers."""
    hidden, width, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from ((f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
        yield from ((f"{prefix}.mlp.{name}_proj.weight", (width, hidden)) for name in ("gate", "up"))
        yield f"{prefix}.mlp.down_proj.weight", (hidden, width)
        yield from ((f"{prefix}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write_random(target: Path, shape: Mapping[str, int], shard_bytes: int) -> list[int]:
    """Write the checkpoint; returns the bytes of its shards."""
    target.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in _tensors(shape):
        count = 2 * torch.Size(dims).numel()
        if size + count > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += count
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(dims) for name, dims in shard}, target / file, metadata={"format": "pt"})
        files.sync(target / file)
        places |= {name: file for name, _ in shard}
    files.write_json(target / checkpoint.INDEX, {"metadata": {}, "weight_map": places})
    config = {key: value for key, value in shape.items() if key != "heads"}
    config |= {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["heads"], "rms_norm_eps": 1e-5}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    files.write_json(target / "config.json", {**config, **kind, "dtype": "bfloat16"})
    return [(target / file).stat().st_size for file in sorted(set(places.values()))]


def _random(dims: tuple[int, ...]) -> torch.Tensor:
    """Random bits of small numbers: what they are worth does not matter, and normal ones take minutes."""
    return torch.randint(0x3C00, 0x3D00, dims, dtype=torch.int16).view(torch.bfloat16)


def _forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
