"""The part of a benchmark that wants a GPU, on the CPU with a tiny model: its arithmetic, and that it runs."""

import pytest

from jobs.benchmarks import recover_gpu
from jobs.benchmarks.recover_gpu import TINYLLAMA, Trained, figures, loops

PICO = {
    **TINYLLAMA,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
TRAINED = Trained(PICO, length=16, batch=2, device="cpu", product_size=64)


def test_both_loops_run() -> None:
    taken = loops(TRAINED, repeats=2)
    assert {name: len(values) for name, values in taken.items()} == {"recovery": 2, "bare loop": 2}
    assert min(min(values) for values in taken.values()) > 0


def test_operations_are_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_gpu, "product_flops", lambda trained: 1e9)
    found = figures(TRAINED, {"recovery": [0.5, 0.7], "bare loop": [0.4]}, "NVIDIA H100 80GB HBM3")
    maps = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * 64
    flops = 6 * (maps + 2 * 2 * 16 * 32) * 32 / 0.5
    assert found == pytest.approx(
        {
            "gpu_tokens_per_second": 64.0,
            "gpu_loop_ratio": 0.8,
            "gpu_share_of_product": flops / 1e9,
            "gpu_mfu": flops / 989e12,
        }
    )


def test_a_device_without_a_data_sheet_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_gpu, "product_flops", lambda trained: 1e9)
    assert "gpu_mfu" not in figures(TRAINED, {"recovery": [1.0], "bare loop": [1.0]}, "some other")
