"""The recovery's loop on a GPU: tokens per second and the share of the device's arithmetic, with a 1B-shaped model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from cria_dist.config import RecoverConfig
from cria_dist.models import checkpoint
from cria_dist.models.family import family_of
from cria_dist.models.macs import macs_per_position
from cria_dist.stages.recover import Learner, Place
from cria_dist.stages.recover_loss import cross_entropy, next_token_loss
from cria_dist.stages.recover_state import TrainState
from cria_dist.stages.recover_step import CLIP_NORM
from jobs.benchmarks.frame import alternate, seconds

TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
"""The shape of TinyLlama-1.1B."""
LENGTH, BATCH, REPEATS = 2048, 8, 10
PRODUCT_SIZE = 8192
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16 products per second by the makers' data sheets (SXM modules)."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained, and how fast products of matrices are here.

    Attributes:
        config: config.json of a model with random weights.
        length: tokens of a sequence.
        batch: sequences of a step.
        device: ``cuda`` or ``cpu``.
        product_size: side of the square product the device's speed is measured with.
    """

    config: Mapping[str, Any]
    length: int
    batch: int
    device: str
    product_size: int


def measure(metrics: dict[str, float], samples: dict[str, dict[str, list[float]]]) -> str:
    """Add what was measured; returns what to say of it in the protocol."""
    if not torch.cuda.is_available():
        return "No GPU part (tokens per second and MFU of a 1B-shaped model): torch finds no GPU."
    trained = Trained(TINYLLAMA, LENGTH, BATCH, "cuda", PRODUCT_SIZE)
    taken = loops(trained, REPEATS)
    samples["GPU: seconds of a step"] = taken
    metrics |= figures(trained, taken, torch.cuda.get_device_name())
    return (
        f"GPU: {BATCH} sequences of {LENGTH} tokens per step, TinyLlama-1.1B's shape, all weights but embedding and "
        "head trained, automatic mixed precision, no distillation; the bare loop takes the same sequences one by one. "
        "Operations per token: six per multiplication of the forward pass (T x T attention counted whole; frozen maps "
        "counted as trained). gpu_mfu is over the data sheet's dense bfloat16 peak, gpu_share_of_product over a "
        f"bfloat16 product of size {PRODUCT_SIZE} measured in this run."
    )


def figures(trained: Trained, taken: Mapping[str, list[float]], device: str) -> dict[str, float]:
    """Tokens per second, loop ratio, and the share of the arithmetic that is used."""
    step = min(taken["recovery"])
    tokens = trained.batch * trained.length
    macs = macs_per_position(trained.config, family_of(trained.config), trained.length)
    flops = 6 * macs * tokens / step
    found = {
        "gpu_tokens_per_second": tokens / step,
        "gpu_loop_ratio": min(taken["bare loop"]) / step,
        "gpu_share_of_product": flops / product_flops(trained),
    }
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device]
    return found | ({"gpu_mfu": flops / (known[0] * 1e12)} if known else {})


def product_flops(trained: Trained) -> float:
    """Operations per second of a large square bfloat16 product, the best of some."""
    size = trained.product_size
    square = torch.ones(size, size, dtype=torch.bfloat16, device=trained.device)
    best = min(seconds(lambda: float((square @ square)[0, 0])) for _ in range(6))
    return 2 * size**3 / best


def loops(trained: Trained, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of the recovery and of a bare PyTorch loop, in turns, on the same batch."""
    recipe = RecoverConfig(batch_sequences=trained.batch, workers=1, dtype="bfloat16", distill=0)
    ours, bare = _random(trained), _random(trained)
    learner = Learner(ours, TrainState(ours, recipe), cross_entropy, recipe, Place())
    optimizer = TrainState(bare, recipe).optimizer
    vocabulary = int(trained.config["vocab_size"])
    batch_ST = torch.randint(vocabulary, (trained.batch, trained.length), generator=torch.Generator().manual_seed(0))

    def bare_step() -> None:
        optimizer.zero_grad()
        with torch.autocast(trained.device, torch.bfloat16):
            for one_ST in batch_ST.to(trained.device).split(1):
                (next_token_loss(bare, one_ST) / len(batch_ST)).backward()
        torch.nn.utils.clip_grad_norm_([one for one in bare.parameters() if one.requires_grad], CLIP_NORM)
        optimizer.step()

    return alternate(
        {
            "recovery": lambda: seconds(lambda: _finished(lambda: learner.learn(0, batch_ST))),
            "bare loop": lambda: seconds(lambda: _finished(bare_step)),
        },
        repeats,
    )


def _finished(step: Callable[[], object]) -> None:
    """Carry out a step and wait for the device."""
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _random(trained: Trained) -> PreTrainedModel:
    """A model with random weights of which all but embedding and head learn."""
    torch.manual_seed(0)
    model = checkpoint.stock_class(trained.config).from_config(AutoConfig.for_model(**trained.config))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)
    return model.to(trained.device)
