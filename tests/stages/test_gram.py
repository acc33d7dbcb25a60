"""Sums of products: float32 accuracy, exact symmetry, nothing copied, whatever the device and the slice."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from cria_dist.stages import gram
from cria_dist.stages.gram import Gram, HostGram, PanelGram, gram_of
from cria_dist.store.recording import Slice

CPU = torch.device("cpu")
KINDS = [HostGram, lambda width: PanelGram(Slice(0, width), width, CPU)]
WIDTH = 300  # more than a block of the mirror, no multiple of the panels


def batches(count: int = 3, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(64, width, generator=generator).to(dtype) for _ in range(count)]


def summed(accumulator: Gram, signals: list[torch.Tensor]) -> np.ndarray:
    for signal_TN in signals:
        accumulator.add(signal_TN)
    return accumulator.rows()


def exact(signals: list[torch.Tensor]) -> np.ndarray:
    whole_TN = torch.cat(signals).double().numpy()
    return whole_TN.T @ whole_TN


@pytest.mark.parametrize(
    "kind", [HostGram, lambda width: PanelGram(Slice(0, width), width, CPU)], ids=["host", "panel"]
)
@pytest.mark.parametrize("width", [1, 7, 256, WIDTH])
def test_the_sum_is_symmetric_and_accurate(kind, width: int) -> None:
    signals = batches(width=width)
    accumulator = kind(width)
    found_NN = summed(accumulator, signals)
    assert found_NN.dtype == np.float32
    assert np.abs(found_NN - exact(signals)).max() < 1e-4
    assert np.array_equal(found_NN, found_NN.T)
    assert np.array_equal(accumulator.diagonal().numpy(), found_NN.diagonal())


@pytest.mark.parametrize(
    "kind", [HostGram, lambda width: PanelGram(Slice(0, width), width, CPU)], ids=["host", "panel"]
)
def test_a_cleared_sum_starts_at_zero(kind) -> None:
    """Also after a NaN, and after it was read (and mirrored)."""
    signals = batches()
    accumulator, fresh = kind(WIDTH), kind(WIDTH)
    summed(accumulator, [torch.full((2, WIDTH), torch.nan)])
    accumulator.clear()
    assert np.array_equal(summed(accumulator, signals), summed(fresh, signals))


@pytest.mark.parametrize("part", [Slice(0, 100), Slice(100, 200), Slice(200, 300)])
def test_a_slice_holds_its_rows(part: Slice) -> None:
    signals = batches()
    accumulator = gram_of(part, WIDTH, CPU)
    found_UN = summed(accumulator, signals)
    expected_UN = exact(signals)[part.start : part.stop]
    assert found_UN.shape == (100, WIDTH)
    assert np.abs(found_UN - expected_UN).max() < 1e-4
    assert np.allclose(accumulator.diagonal(), expected_UN.diagonal(part.start), rtol=1e-5)


@pytest.mark.parametrize("part", [Slice(0, WIDTH), Slice(0, 100)])
def test_matmul_medium_changes_nothing(part: Slice) -> None:
    """On this CPU or another, bfloat16 products would be off by 2^-8; the model's setting comes back afterwards."""
    signals, exactly = batches(), exact(batches())[part.start : part.stop]
    torch.set_float32_matmul_precision("medium")
    try:
        found = summed(gram_of(part, WIDTH, CPU), signals)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert np.abs(found - exactly).max() < 1e-4
    assert np.array_equal(found, summed(gram_of(part, WIDTH, CPU), signals))


def test_half_precision_signals_are_summed_in_float32() -> None:
    signals = batches(dtype=torch.bfloat16)
    assert np.abs(summed(HostGram(WIDTH), signals) - exact(signals)).max() < 1e-4


def test_the_host_sums_in_place_and_copies_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS wrappers copy silently what is not in their order: twice the memory, and the sum is somewhere else."""
    accumulator = HostGram(WIDTH)
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    syrk = accumulator._syrk

    def spy(alpha: float, a: np.ndarray, **arguments) -> None:
        seen.append((a, arguments["c"], syrk(alpha, a, **arguments)))

    monkeypatch.setattr(accumulator, "_syrk", spy)
    (signal_TN,) = batches(1)
    accumulator.add(signal_TN)
    ((given, target, result),) = seen
    assert given.flags.f_contiguous
    assert given.ctypes.data == signal_TN.data_ptr()
    assert result is target or np.shares_memory(result, target)
    assert np.shares_memory(accumulator.rows(), target)


def test_the_number_of_threads_changes_no_byte() -> None:
    signals = batches(width=700)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(summed(HostGram(700), signals).tobytes())
    assert found[0] == found[1]


def test_panels_cover_little_more_than_half() -> None:
    width = 16 * 64
    panels = PanelGram(Slice(0, width), width, CPU)._panels
    assert sum(panel.numel() for panel in panels) == width * width * (1 + 1 / gram.PANELS) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_sum_is_as_accurate(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    signals = batches(dtype=dtype)
    torch.set_float32_matmul_precision("medium")
    try:
        found = summed(gram_of(Slice(0, WIDTH), WIDTH, torch.device("cuda")), [one.cuda() for one in signals])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert np.abs(found - exact(signals)).max() < 1e-4
