"""Recovery: its loop beside a bare PyTorch loop, and two workers beside one."""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cria_dist.config import RecoverConfig
from cria_dist.config_file import parse
from cria_dist.models import location
from cria_dist.runtime.session import ray_session
from cria_dist.runtime.train import RayTrainer
from cria_dist.stages.recover import Learner, Place, RecoverTask, read_log, student
from cria_dist.stages.recover_log import append_log
from cria_dist.stages.recover_loss import cross_entropy
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import CLIP_NORM
from jobs.benchmarks import recover_gpu
from jobs.benchmarks.frame import Measurement, alternate, seconds
from jobs.benchmarks.record_setup import one_thread

BUILTIN = "builtin:smollm2-135m"
PROTOCOL = (
    "loop_ratio: steps per second of the recovery's loop (one sequence at a time, clipped, loss logged) over those of "
    "a bare PyTorch loop (the whole batch at once, clipped, AdamW) on SmolLM2-135M, float32, the tensors of the MLPs "
    "trained, 4 sequences of 128 tokens per step, no distillation, one thread.",
    "two_worker_speedup: median seconds per step of the same recovery on Ray Train, one worker against two (gloo, one "
    "thread each), from the loss log, the first step left out; every step averages the gradients of 80 M weights.",
    "equivalence_max_diff: largest difference between the loss curves of one and of two workers.",
)
STEPS = 8
LENGTH, BATCH = 128, 4
TOKENS = 64 * LENGTH


def measure(quick: bool) -> Measurement:
    """The loop in this process, then the workers on a private cluster."""
    with tempfile.TemporaryDirectory(prefix="cria-bench-") as name:
        folder = Path(name)
        tokens = np.random.default_rng(0).integers(0, 40_000, (64, LENGTH)).astype(np.int32)
        np.save(folder / "tokens.npy", tokens)
        config = RecoverConfig(
            steps=STEPS, workers=1, batch_sequences=BATCH, sequence_length=LENGTH, train="mlp", distill=0
        )
        directory = location.locate(BUILTIN, None)
        task = RecoverTask(
            directory, folder / "tokens.npy", folder / "recovered", folder / "loss.jsonl", config, "highest", 0
        )
        with one_thread():
            loop = alternate(_contenders(task, tokens, 1 if quick else 4), 1 if quick else 5)
        steps, difference = _workers(task, folder)
    metrics = {
        "loop_ratio": statistics.median(loop["bare loop"]) / statistics.median(loop["recovery"]),
        "two_worker_speedup": statistics.median(steps["1 worker"]) / statistics.median(steps["2 workers"]),
        "equivalence_max_diff": difference,
    }
    samples = {"seconds of the same steps": loop, "seconds per step on Ray Train": steps}
    on_gpu = recover_gpu.measure(metrics, samples)
    return Measurement("recover", (*PROTOCOL, on_gpu), metrics, samples, dict.fromkeys(samples, "s"))


def _contenders(task: RecoverTask, tokens_ST: np.ndarray, steps: int) -> dict[str, Callable[[], float]]:
    """Seconds of some steps each, both on the same batches."""
    batches = torch.from_numpy(tokens_ST.astype(np.int64)).split(BATCH)[:steps]
    ours, bare = student(task), student(task)
    learner = Learner(ours, TrainState(ours, task.config), cross_entropy, task.config, Place())
    optimizer = torch.optim.AdamW([one for one in bare.parameters() if one.requires_grad], lr=1e-4)

    def recovery() -> None:
        for step, batch_ST in enumerate(batches):
            append_log(task.log_path, step=step + 1, loss=learner.learn(step, batch_ST))

    def bare_loop() -> None:
        for batch_ST in batches:
            optimizer.zero_grad()
            bare(input_ids=batch_ST, labels=batch_ST, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_([one for one in bare.parameters() if one.requires_grad], CLIP_NORM)
            optimizer.step()

    return {"recovery": lambda: seconds(recovery), "bare loop": lambda: seconds(bare_loop)}


def _workers(task: RecoverTask, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Seconds per step with one and with two workers, and how far their losses are apart."""
    times: dict[str, list[float]] = {}
    losses: list[list[float]] = []
    run = parse({"model": {"path": str(task.model_dir)}, "recover": {"workers": 2}, "run": {"workers": 2}})
    with ray_session(run):
        for workers in (1, 2):
            log = folder / f"loss-{workers}.jsonl"
            alone = replace(task, log_path=log, target=folder / f"recovered-{workers}")
            RayTrainer(workers, use_gpu=False)(alone, f"bench-{workers}", folder / f"train-{workers}")
            lines = read_log(log)
            moments = [line["seconds"] for line in lines]
            name = "1 worker" if workers == 1 else "2 workers"
            times[name] = [later - earlier for earlier, later in itertools.pairwise(moments)]
            losses.append([line["loss"] for line in lines])
    return times, float(np.abs(np.subtract(losses[0], losses[1])).max())
