"""One site under observation: what is kept of a shard, what is refused, what is forgotten."""

import numpy as np
import pytest
import torch

from cria_dist.errors import NumericError
from cria_dist.records import Site
from cria_dist.stages.observe import SiteObserver
from cria_dist.store import activations
from cria_dist.store.recording import Slice

WIDTH, HIDDEN = 6, 4
WHOLE = Slice(0, WIDTH)


def observer_of(units: Slice = WHOLE, dtype: str = "float32") -> SiteObserver:
    """Of a site whose other units, if there are any, all are 1."""

    def gather(signal_TU: torch.Tensor) -> torch.Tensor:
        whole_TN = torch.ones(len(signal_TU), WIDTH, dtype=signal_TU.dtype)
        whole_TN[:, units.start : units.stop] = signal_TU
        return whole_TN

    return SiteObserver(units, WIDTH, dtype, torch.device("cpu"), gather)


def observe(observer: SiteObserver, signal_STU: torch.Tensor, rows: list[int], hidden: float = 1.0) -> None:
    """A batch: the gate is the signal, the output its double."""
    observer.begin(torch.tensor(rows, dtype=torch.int64))
    module = torch.nn.Identity()
    observer.input_hook("gate")(module, (), signal_STU)
    observer.output_hook(module, (2 * signal_STU,))
    observer.layer_hook(module, (), torch.full((*signal_STU.shape[:2], HIDDEN), hidden))


def batch(seed: int, sequences: int = 2, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(sequences, 5, width, generator=torch.Generator().manual_seed(seed))


def whole(observer: SiteObserver, name: str) -> np.ndarray:
    """A signal without its tiles."""
    return np.concatenate(observer.signals()[name], axis=1)


def test_tiles_make_up_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "TILE_UNITS", 4)
    observer, one = observer_of(), batch(1)
    observer.reset(3)
    observe(observer, one, [1, 4, 9])
    assert [tile.shape for tile in observer.signals()["gate"]] == [(3, 4), (3, 2)]
    assert np.array_equal(whole(observer, "gate"), one.reshape(-1, WIDTH)[[1, 4, 9]])


def test_batches_are_joined_in_order() -> None:
    observer, one, two = observer_of(), batch(1), batch(2, sequences=1)
    observer.reset(5)
    observe(observer, one, [1, 4, 9])
    observe(observer, two, [0, 3])
    expected = np.concatenate([one.reshape(-1, WIDTH)[[1, 4, 9]], two.reshape(-1, WIDTH)[[0, 3]]])
    assert list(observer.signals()) == ["gate", "output"]
    assert np.array_equal(whole(observer, "gate"), expected)
    assert np.array_equal(whole(observer, "output"), 2 * expected)
    count, total_N, gram_NN = observer.moments()
    outputs_TN = 2 * torch.cat([one.reshape(-1, WIDTH), two.reshape(-1, WIDTH)]).double().numpy()
    assert count == 15
    assert np.allclose(total_N, outputs_TN.sum(axis=0), atol=1e-5)
    assert np.allclose(gram_NN, outputs_TN.T @ outputs_TN, atol=1e-4)


@pytest.mark.parametrize("expected", [3, 1, 6])
def test_a_shard_leaves_no_trace_in_the_next(expected: int) -> None:
    """Which may have as many, fewer or more sampled tokens."""
    observer, fresh = observer_of(), observer_of()
    observer.reset(3)
    observe(observer, batch(1) * torch.nan, [1, 4, 9], hidden=torch.inf)
    rows = list(range(expected))
    for one in (observer, fresh):
        one.reset(expected)
        observe(one, batch(2), rows)
        one.check(Site(0), 0)
    assert np.array_equal(whole(observer, "gate"), whole(fresh, "gate"))
    assert whole(observer, "gate").shape == (expected, WIDTH)
    for found, other in zip(observer.moments(), fresh.moments(), strict=True):
        assert np.array_equal(found, other)


def test_no_sampled_tokens() -> None:
    observer = observer_of()
    observer.reset(0)
    observe(observer, batch(1), [])
    observer.check(Site(0), 0)
    assert whole(observer, "output").shape == (0, WIDTH)
    assert observer.moments()[0] == 10


def test_a_slice_has_its_rows_of_the_products() -> None:
    observer, signal = observer_of(Slice(2, 4)), batch(1, width=2)
    observer.reset(2)
    observe(observer, signal, [0, 1])
    count, total_U, gram_UN = observer.moments()
    outputs_TU = 2 * signal.reshape(-1, 2)
    assert (count, total_U.shape, gram_UN.shape) == (10, (2,), (2, WIDTH))
    assert np.allclose(gram_UN[:, 2:4], outputs_TU.T @ outputs_TU, atol=1e-5)
    assert np.allclose(gram_UN[:, 5], outputs_TU.sum(dim=0), atol=1e-5)


def test_bfloat16_is_stored_as_its_words() -> None:
    observer, signal = observer_of(dtype="bfloat16"), batch(1)
    observer.reset(10)
    observe(observer, signal, list(range(10)))
    words = whole(observer, "gate")
    assert words.dtype == np.uint16
    assert torch.equal(torch.from_numpy(words).view(torch.bfloat16), signal.reshape(-1, WIDTH).bfloat16())


def test_sums_of_half_precision_are_in_float32() -> None:
    """65504 is the largest float16; a bfloat16 sum of 10 x 257 would be off by 10."""
    for dtype, value in ((torch.float16, 3e4), (torch.bfloat16, 257.0)):
        observer = observer_of(dtype="float32")
        observer.reset(1)
        signal = torch.full((2, 5, WIDTH), value / 2).to(dtype)
        observe(observer, signal, [0])
        observer.check(Site(0), 0)
        assert observer.moments()[1].tolist() == [10.0 * float(2 * signal[0, 0, 0])] * WIDTH


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_hidden_state_is_counted_by_tokens(value: float) -> None:
    observer = observer_of()
    observer.reset(1)
    observe(observer, batch(1), [0])
    hidden_STD = torch.ones(2, 5, HIDDEN)
    hidden_STD[0, 1, 2], hidden_STD[1, 4, 0] = value, value
    observer.layer_hook(torch.nn.Identity(), (), (hidden_STD,))
    with pytest.raises(NumericError, match=r"^layer-003\.mlp, shard 7: hidden states of 2 tokens are NaN or infinite"):
        observer.check(Site(3), 7)


def test_broken_moments_are_counted_by_values() -> None:
    """One unit overflows in one token that nobody sampled: its sum of squares, not its sum."""
    observer, signal = observer_of(), batch(1)
    signal[1, 2, 3] = 1e25
    observer.reset(1)
    observe(observer, signal, [0])
    with pytest.raises(NumericError, match=r"^layer-003\.mlp, shard 7: 1 moments are NaN or infinite"):
        observer.check(Site(3), 7)


def test_signals_that_do_not_fit_are_counted_by_values() -> None:
    observer, signal = observer_of(dtype="float16"), batch(1)
    signal[0, 0, :2] = 1e6
    observer.reset(2)
    observe(observer, signal, [0, 1])
    with pytest.raises(
        NumericError, match=r"shard 7: 2 values of signal 'gate' do not fit torch\.float16.*record\.dtype"
    ):
        observer.check(Site(3), 7)


def test_large_finite_values_are_no_error() -> None:
    """Their sum is infinite in float32, they are not."""
    observer = observer_of()
    observer.reset(2)
    observer.begin(torch.tensor([0, 1]))
    observer.input_hook("gate")(torch.nn.Identity(), (), torch.full((1, 5, WIDTH), 3e38))
    observer.check(Site(0), 0)


def test_the_end_of_the_last_batch_is_told_once() -> None:
    observer, told = observer_of(), list[int]()
    observer.reset(2)
    hidden_STD = torch.ones(1, 5, HIDDEN)
    observer.begin(torch.tensor([0]))
    observer.layer_hook(torch.nn.Identity(), (), hidden_STD)
    assert told == []
    observer.begin(torch.tensor([0]), lambda: told.append(1))
    observer.layer_hook(torch.nn.Identity(), (), hidden_STD)
    observer.layer_hook(torch.nn.Identity(), (), hidden_STD)
    assert told == [1]
