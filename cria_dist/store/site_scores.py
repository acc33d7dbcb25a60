"""Scores and spectra of one site as npz files; no pickle on either side."""

import io
import zipfile
from pathlib import Path

import numpy as np

from cria_dist.errors import DataError
from cria_dist.files import link, take_over, write_bytes
from cria_dist.records import Scores, Site, Spectrum

DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What NumPy raises at a file that is missing, cut, of another kind, or pickled."""


def write_scores(folder: Path, scores: Scores, digest: str) -> None:
    """Write ``spectra/<site>.npz`` (if there is a spectrum), then ``scores/<site>.npz``."""
    if scores.spectrum is not None:
        _write(
            _spectrum_path(folder, scores.site),
            values=scores.spectrum.values_K,
            residual=np.float64(scores.spectrum.residual),
            complete=np.bool_(scores.spectrum.complete),
        )
    edges_E2 = np.zeros((0, 2), dtype=np.int32) if scores.edges_E2 is None else scores.edges_E2
    _write(
        folder / "scores" / f"{scores.site.key}.npz",
        digest=np.str_(digest),
        keep=scores.keep_N,
        cost=scores.cost_N,
        edges=edges_E2,
        guarded=np.bool_(scores.edges_E2 is not None),
        has_spectrum=np.bool_(scores.spectrum is not None),
        fact_names=np.asarray(list(scores.facts), dtype=np.str_),
        fact_values=np.asarray(list(scores.facts.values()), dtype=np.float64),
    )


def has_scores(folder: Path, site: Site, digest: str) -> bool:
    """Whether the site was scored from the same inputs."""
    path = folder / "scores" / f"{site.key}.npz"
    if not path.is_file():
        return False
    try:
        arrays = _load(path)
        spectrum_is_there = not arrays["has_spectrum"] or _spectrum_path(folder, site).is_file()
        return str(arrays["digest"]) == digest and spectrum_is_there
    except DAMAGE:
        return False


def read_scores(folder: Path, site: Site) -> Scores:
    """Scores of one site.

    Raises:
        DataError: missing or damaged.
    """
    path = folder / "scores" / f"{site.key}.npz"
    try:
        arrays = _load(path)
        spectrum = _read_spectrum(folder, site) if arrays["has_spectrum"] else None
        return Scores(
            site=site,
            keep_N=arrays["keep"],
            cost_N=arrays["cost"],
            edges_E2=arrays["edges"] if arrays["guarded"] else None,
            spectrum=spectrum,
            facts=dict(zip(arrays["fact_names"].tolist(), arrays["fact_values"].tolist(), strict=True)),
        )
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and run the same command again") from error


def _read_spectrum(folder: Path, site: Site) -> Spectrum:
    arrays = _load(_spectrum_path(folder, site))
    return Spectrum(arrays["values"], float(arrays["residual"]), bool(arrays["complete"]))


def _spectrum_path(folder: Path, site: Site) -> Path:
    return folder / "spectra" / f"{site.key}.npz"


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return dict(arrays)


def _write(path: Path, **arrays: np.ndarray | np.generic) -> None:
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # pyright: ignore[reportArgumentType]  (numpy scalars are arrays to savez)
    write_bytes(path, sink.getvalue())


def adopt(folder: Path, root: Path, sites: list[Site], digest: str) -> bool:
    """Take over the scores of a neighbouring run with the same digest; True if all sites were found."""

    def take(scores: Path) -> bool:
        other = scores.parent
        if other == folder or not all(has_scores(other, site, digest) for site in sites):
            return False
        for part in ("spectra", "scores"):
            for site in sites:
                if (source := other / part / f"{site.key}.npz").is_file():
                    link(source, folder / part / source.name)
        return all(has_scores(folder, site, digest) for site in sites)

    return take_over(root, "*/*/scores", take) is not None
