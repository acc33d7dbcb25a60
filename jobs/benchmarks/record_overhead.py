"""What recording costs beside the forward pass it rides on, in one process, in turn."""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cria_dist.models.blocks import partition
from cria_dist.models.checkpoint import Numerics, load_model, read_config
from cria_dist.models.location import locate
from cria_dist.stages.record import Recorder, RecordTask, ShardWork
from jobs.benchmarks.frame import alternate, seconds
from jobs.benchmarks.record_setup import Load, Shape, discard, make_task, one_thread, save_model

Samples = dict[str, dict[str, list[float]]]

PROTOCOL = (
    "overhead_ratio: recording a shard of SmolLM2-135M (moments of all tokens, sampled signals as Parquet, hashes, "
    "fsync, commits) over the plain decoder pass of the same tokens in the same batches: float32, "
    "model.matmul=highest, compute on one thread; the recorder writes finished layers from a second thread.",
    "overhead_ratio_medium: the same with model.matmul=medium; ..._with_head: over the pass with the language head.",
)
GPU_PROTOCOL = (
    "gpu_overhead_ratio: the same on the GPU, bfloat16, random weights of a 7B Llama's layers (4096 x 11008), 4 of 32 "
    "of them: every layer costs the same.",
)
BUILTIN = "builtin:smollm2-135m"
CPU_LOAD = Load(shards=1, sequences=8, batch=4, length=512, sampled=85)
QUICK_CPU_LOAD = Load(shards=1, sequences=2, batch=1, length=128, sampled=21)
GPU_SHAPE = Shape(layers=4, hidden=4096, neurons=11008)
GPU_LOAD = Load(shards=1, sequences=64, batch=8, length=2048, sampled=64)
QUICK_GPU_LOAD = Load(shards=1, sequences=4, batch=2, length=512, sampled=16)


def on_cpu(folder: Path, quick: bool) -> tuple[dict[str, float], Samples]:
    """Ratios for SmolLM2-135M at both precisions, and their samples."""
    directory = locate(BUILTIN, None)
    load, repeats = (QUICK_CPU_LOAD, 1) if quick else (CPU_LOAD, 5)
    metrics: dict[str, float] = {}
    samples: Samples = {}
    for matmul, suffix in (("highest", ""), ("medium", "_medium")):
        task = make_task(folder / matmul, directory, load, Numerics("float32", matmul))
        with one_thread():
            found = alternate(_contenders(task, with_head=True), repeats)
        discard(task)
        samples[f"SmolLM2-135M, {load.tokens} tokens, matmul {matmul}"] = found
        metrics[f"overhead_ratio{suffix}"] = ratio(found, "decoder")
        metrics[f"overhead_ratio{suffix}_with_head"] = ratio(found, "decoder and head")
    return metrics, samples


def on_gpu(folder: Path, quick: bool) -> tuple[dict[str, float], Samples]:
    """The ratio for a 7B-shaped model; needs a CUDA device."""
    load, repeats = (QUICK_GPU_LOAD, 1) if quick else (GPU_LOAD, 5)
    directory = save_model(folder / "model", GPU_SHAPE, "bfloat16")
    task = make_task(folder / "gpu", directory, load, Numerics("bfloat16"))
    found = alternate(_contenders(task, with_head=False), repeats)
    discard(task)
    return {"gpu_overhead_ratio": ratio(found, "decoder")}, {f"7B layers on a GPU, {load.tokens} tokens": found}


def ratio(found: dict[str, list[float]], base: str) -> float:
    """Median seconds of recording over those of a plain pass."""
    return statistics.median(found["record"]) / statistics.median(found[base])


def _contenders(task: RecordTask, with_head: bool) -> dict[str, Callable[[], float]]:
    (block,) = partition(int(read_config(task.model_dir)["num_hidden_layers"]), 1)
    recorder, plain = Recorder(task), load_model(task.model_dir, task.numerics)
    tokens_ST = torch.from_numpy(np.load(task.tokens_path)).long().to(plain.device)

    def forward(model: Callable[..., object]) -> float:
        def run() -> None:
            with torch.inference_mode():
                for batch_ST in tokens_ST.split(task.batch_sequences):
                    model(input_ids=batch_ST, use_cache=False)
            if plain.device.type == "cuda":
                torch.cuda.synchronize()

        return seconds(run)

    decoder = getattr(plain, plain.base_model_prefix)
    contenders: dict[str, Callable[[], float]] = {
        "record": lambda: seconds(lambda: recorder(ShardWork(0, block))),
        "decoder": lambda: forward(decoder),
    }
    if with_head:
        contenders["decoder and head"] = lambda: forward(plain)
    return contenders
