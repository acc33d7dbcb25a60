"""What a user would write with SciPy and scikit-learn, in a process that can be given up."""

import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
from sklearn.neighbors import kneighbors_graph

from cria_dist.records import Float64
from jobs.benchmarks.frame import seconds
from jobs.benchmarks.spectral_site import Float32


def timed(name: str, pair: tuple[Float32, Float32], neighbours: int, pairs: int, cap: float) -> float:
    """Seconds of a rival's whole site, or its cap if it took longer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "signals.npz"
        np.savez(path, pre=pair[0], post=pair[1])
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(name, path, (neighbours, pairs), theirs))
        process.start()
        ours.recv()  # imported and loaded
        taken = float(ours.recv()) if ours.poll(cap) else cap
        process.kill()
        process.join()
    return taken


def dense_pairs(left: Any, right: Any, pairs: int) -> tuple[Float64, Float64]:
    """The top eigenpairs by a dense solver, values descending; the constant vector shifted out of the null space."""
    size = left.shape[0]
    wanted = (size - pairs, size - 1)
    values, vectors = scipy.linalg.eigh(left.toarray(), right.toarray() + 1 / size, subset_by_index=wanted)
    return values[::-1], vectors[:, ::-1]


def _run(name: str, path: Path, counts: tuple[int, int], answer: Connection) -> None:
    with np.load(path) as stored:
        pre, post = stored["pre"], stored["post"]
    solve = {"eigsh": _sparse_pairs, "dense": dense_pairs}[name]
    answer.send(True)
    answer.send(seconds(lambda: _site((pre, post), counts, solve)))


def _site(pair: tuple[Float32, Float32], counts: tuple[int, int], solve: Any) -> Float64:
    left_graph, right_graph = (_united(kneighbors_graph(one, counts[0])) for one in pair)
    left, right = (scipy.sparse.csr_matrix(scipy.sparse.csgraph.laplacian(one)) for one in (left_graph, right_graph))
    values, vectors = solve(left, right, counts[1])
    edges = scipy.sparse.coo_matrix(scipy.sparse.triu(left_graph))
    edge_scores = (vectors[edges.row] - vectors[edges.col]) ** 2 @ values
    scores = scipy.sparse.csr_matrix((edge_scores, (edges.row, edges.col)), shape=left.shape)
    return np.asarray((scores + scores.T).sum(axis=1), dtype=np.float64).ravel() / left.diagonal().astype(np.float64)


def _united(graph: Any) -> Any:
    return graph.maximum(graph.T)


def _sparse_pairs(left: Any, right: Any, pairs: int) -> tuple[Float64, Float64]:
    metric = (right + 1e-8 * scipy.sparse.eye(right.shape[0])).tocsc()
    values, vectors = scipy.sparse.linalg.eigsh(left.tocsc(), k=pairs, M=metric, which="LA")
    return values[::-1], vectors[:, ::-1]
