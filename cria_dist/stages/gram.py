"""Sums of products of a site's units over tokens, float32, accumulated where the model computes.

Half of a Gram matrix is computed; the other half is its mirror. Shapes: T tokens, N units of the site, U units of it
that this process holds.
"""

import functools
from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import get_blas_funcs
from threadpoolctl import ThreadpoolController

from cria_dist.store.recording import Slice

PANELS = 16
"""Of the upper triangle on a GPU: they cover (1 + 1/16) / 2 of the matrix, in products large enough for the device."""
MIRROR_ROWS = 256


class Gram(Protocol):
    """A running sum of products."""

    def clear(self) -> None:
        """Start again from zero."""
        ...

    def add(self, signal_TN: torch.Tensor) -> None:
        """Add the products of all pairs of units, summed over these tokens."""
        ...

    def diagonal(self) -> torch.Tensor:
        """Sums of squares of the units held here, [U]."""
        ...

    def rows(self) -> np.ndarray:
        """Sums of products of the units held here with all units, float32 [U, N]; valid until the next sum begins."""
        ...


def gram_of(units: Slice, width: int, device: torch.device) -> Gram:
    """The accumulator for the units held here, of ``width`` in all."""
    if device.type == "cpu" and units.stop - units.start == width:
        return HostGram(width)
    return PanelGram(units, width, device)


class HostGram:
    """BLAS ``ssyrk`` in place: of this size 2-4 times as fast per product as PyTorch's ``addmm`` on one AMD core.

    It runs on one thread, as workers do anyway: with two it adds up in another order, and the last bits differ.
    """

    def __init__(self, width: int) -> None:
        self._lower_NN = np.zeros((width, width), dtype=np.float32, order="F")
        self._syrk: Any = get_blas_funcs("syrk", dtype=np.float32)
        self._is_empty = True

    def clear(self) -> None:
        """See :meth:`Gram.clear`."""
        self._is_empty = True

    def add(self, signal_TN: torch.Tensor) -> None:
        """See :meth:`Gram.add`; the transposed signal is Fortran-ordered as it is, so nothing is copied."""
        beta = 0.0 if self._is_empty else 1.0
        signal_NT = signal_TN.float().contiguous().numpy().T
        with _threads().limit(limits=1):
            self._syrk(1.0, signal_NT, beta=beta, c=self._lower_NN, overwrite_c=1, lower=1)
        self._is_empty = False

    def diagonal(self) -> torch.Tensor:
        """See :meth:`Gram.diagonal`."""
        return torch.from_numpy(self._lower_NN.diagonal().copy())

    def rows(self) -> np.ndarray:
        """See :meth:`Gram.rows`; the lower triangle in Fortran's order is the upper one in C's."""
        return _mirrored(self._lower_NN.T)


class PanelGram:
    """Panels of rows: of the upper triangle if all units are here, of whole rows otherwise.

    16-bit signals on a GPU are multiplied as they are: their products are exact in float32, in which the tensor cores
    add them. Float32 signals are multiplied in full float32, whatever ``model.matmul`` allows the model itself.
    """

    def __init__(self, units: Slice, width: int, device: torch.device) -> None:
        self._units = units
        self._is_whole = units.stop - units.start == width
        height = -(-width // PANELS) if self._is_whole else units.stop - units.start
        self._bounds = [(start, min(start + height, units.stop)) for start in range(units.start, units.stop, height)]
        self._panels = [
            torch.zeros(stop - start, width - self._first(start), dtype=torch.float32, device=device)
            for start, stop in self._bounds
        ]

    def clear(self) -> None:
        """See :meth:`Gram.clear`."""
        for panel in self._panels:
            panel.zero_()

    def add(self, signal_TN: torch.Tensor) -> None:
        """See :meth:`Gram.add`."""
        mixed = signal_TN.is_cuda and signal_TN.dtype in (torch.bfloat16, torch.float16)
        signal_TN = signal_TN if mixed else signal_TN.float()
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            for (start, stop), panel in zip(self._bounds, self._panels, strict=True):
                left, right = signal_TN[:, start:stop].T, signal_TN[:, self._first(start) :]
                if mixed:
                    torch.addmm(panel, left, right, out_dtype=torch.float32, out=panel)
                else:
                    panel.addmm_(left, right)
        finally:
            torch.set_float32_matmul_precision(precision)

    def diagonal(self) -> torch.Tensor:
        """See :meth:`Gram.diagonal`."""
        parts = zip(self._bounds, self._panels, strict=True)
        return torch.cat([panel.diagonal(start - self._first(start)) for (start, _), panel in parts])

    def rows(self) -> np.ndarray:
        """See :meth:`Gram.rows`."""
        width = self._panels[0].shape[1] + self._first(self._units.start)
        rows_UN = np.empty((self._units.stop - self._units.start, width), dtype=np.float32)
        for (start, stop), panel in zip(self._bounds, self._panels, strict=True):
            at = slice(start - self._units.start, stop - self._units.start)
            rows_UN[at, self._first(start) :] = panel.cpu().numpy()
        return _mirrored(rows_UN) if self._is_whole else rows_UN

    def _first(self, row: int) -> int:
        """First column kept of a panel that begins with this row."""
        return row if self._is_whole else 0


def add_products(sums_ND: torch.Tensor, signal_TN: torch.Tensor, target_TD: torch.Tensor) -> None:
    """Add the products of a signal with what it is to predict, summed over tokens, in full float32 and in place."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        sums_ND.addmm_(signal_TN.float().T, target_TD.float())
    finally:
        torch.set_float32_matmul_precision(precision)


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _mirrored(upper_NN: np.ndarray) -> np.ndarray:
    """Copy the upper triangle to the lower one, in place and in blocks that fit a cache."""
    for start in range(0, len(upper_NN), MIRROR_ROWS):
        stop = start + MIRROR_ROWS
        block = upper_NN[start:stop, start:stop]
        block[...] = np.triu(block) + np.triu(block, 1).T
        upper_NN[stop:, start:stop] = upper_NN[start:stop, stop:].T
    return upper_NN
