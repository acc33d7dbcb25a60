"""NumPy or CuPy, chosen once with a reason; the only file that imports cupy.

Maths asks its arrays for their library (:func:`namespace`); what the array API lacks (sparse matrices, triangular
solves, a few eigenpairs of a dense matrix) is here, once per library.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any, Literal

import array_api_compat
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph

Array = Any
"""An n-dimensional array of NumPy or CuPy."""
Library = Literal["numpy", "cupy"]
Sparse = Any
"""A CSR matrix of SciPy or cupyx."""


@functools.cache
def choose() -> tuple[Library, str]:
    """The array library analysts use on this machine, and why."""
    if importlib.util.find_spec("cupy") is None:
        return "numpy", "CuPy is not installed (extras gpu-cu12, gpu-cu13)"
    import cupy  # pyright: ignore[reportMissingImports]  (an extra; only here, only where it is installed)

    if not cupy.cuda.is_available():
        return "numpy", "CuPy is installed but finds no CUDA device"
    return "cupy", f"CuPy {cupy.__version__} finds {cupy.cuda.runtime.getDeviceCount()} CUDA device(s)"


def limit_memory(share: float) -> None:
    """Keep CuPy in this process within a share of its device's memory; without a device there is nothing to keep."""
    if choose()[0] == "cupy":
        import cupy  # pyright: ignore[reportMissingImports]  (only reached when choose() found it)

        cupy.get_default_memory_pool().set_limit(fraction=share)


def free_memory() -> None:
    """Give back what CuPy keeps in this process for later arrays."""
    if choose()[0] == "cupy":
        import cupy  # pyright: ignore[reportMissingImports]  (only reached when choose() found it)

        cupy.get_default_memory_pool().free_all_blocks()


def to_device(x: Array, library: Library) -> Array:
    """Move a NumPy array to the chosen library."""
    if library == "numpy":
        return np.asarray(x)
    import cupy  # pyright: ignore[reportMissingImports]  (only reached when choose() found it)

    return cupy.asarray(x)


def to_numpy(x: Array) -> Any:
    """Bring an array back to NumPy."""
    if array_api_compat.is_cupy_array(x):
        return x.get()
    return np.from_dlpack(x) if _neither(x) else np.asarray(x)


def namespace(*arrays: Array) -> Any:
    """The array-API namespace of the arguments (mixed libraries are a TypeError)."""
    return array_api_compat.array_namespace(*arrays)


def _neither(x: Array) -> bool:
    """Whether it is of some other library of the array API: what that API lacks is then done by NumPy."""
    return hasattr(x, "__array_namespace__") and not array_api_compat.is_numpy_array(x)


def _on_gpu(x: Array) -> bool:
    return array_api_compat.is_cupy_array(x) or type(x).__module__.startswith("cupyx")


def _cupyx(name: str) -> ModuleType:
    return importlib.import_module(f"cupyx.scipy.{name}")


def pieces(size: int, rows: int) -> list[slice]:
    """Slices that cover ``size`` rows, so many at a time."""
    return [slice(start, min(start + rows, size)) for start in range(0, size, rows)]


def values_at_a_time(x: Array) -> int:
    """How many float64 values of scratch suit the machine: a core's cache, or enough to keep a device busy."""
    return 2**26 if _on_gpu(x) else 100_000


def totals(values_Q: Array, places_Q: Array, size: int) -> Array:
    """Sum of the values that fall on each of ``size`` places, float64."""
    xp = namespace(values_Q)
    if _on_gpu(values_Q):
        return xp.bincount(places_Q, weights=values_Q, minlength=size)
    return xp.asarray(np.bincount(to_numpy(places_Q), weights=to_numpy(values_Q), minlength=size))


def csr(data: Array, rows: Array, columns: Array, shape: tuple[int, int]) -> Sparse:
    """CSR matrix from coordinates; duplicates are added."""
    module = _cupyx("sparse") if _on_gpu(data) else scipy.sparse
    return module.csr_matrix((data, (rows, columns)), shape=shape)


def dense(matrix: Sparse | Array) -> Array:
    """A sparse matrix as a dense array; a copy if it is dense."""
    return matrix.toarray() if hasattr(matrix, "toarray") else namespace(matrix).asarray(matrix, copy=True)


def diagonal(matrix: Sparse | Array) -> Array:
    """The diagonal of a sparse or dense matrix."""
    return matrix.diagonal() if hasattr(matrix, "toarray") else namespace(matrix).linalg.diagonal(matrix)


def component_labels(matrix: Sparse) -> tuple[int, Array]:
    """Number of connected components of an undirected graph and the component of each node."""
    on_gpu = _on_gpu(matrix)  # cupyx would need pylibcugraph for this; the graph is small, the host does it
    count, labels = scipy.sparse.csgraph.connected_components(matrix.get() if on_gpu else matrix, directed=False)
    return int(count), to_device(labels, "cupy" if on_gpu else "numpy")


def smallest_spanning_tree(weights_E: Array, edges_E2: Array, size: int) -> Array:
    """Which edges p < q make up the minimum spanning tree of a connected graph with positive weights, bool [E]."""
    left_E, right_E = to_numpy(edges_E2[:, 0]), to_numpy(edges_E2[:, 1])
    graph = scipy.sparse.csr_matrix((to_numpy(weights_E), (left_E, right_E)), shape=(size, size))
    tree = scipy.sparse.csgraph.minimum_spanning_tree(graph).tocoo()
    chosen = np.isin(left_E * size + right_E, tree.row.astype(np.int64) * size + tree.col)
    return to_device(chosen, "cupy" if _on_gpu(weights_E) else "numpy")


def solve_lower(factor_NN: Array, right_NM: Array, transposed: bool = False) -> Array:
    """Solve ``L X = B`` (or ``L^T X = B``) with a lower triangular factor."""
    trans = 1 if transposed else 0
    if _on_gpu(factor_NN):
        return _cupyx("linalg").solve_triangular(factor_NN, right_NM, lower=True, trans=trans)
    solved = scipy.linalg.solve_triangular(to_numpy(factor_NN), to_numpy(right_NM), lower=True, trans=trans)
    return namespace(factor_NN).asarray(solved)


def solve_positive(symmetric_NN: Array, right_NM: Array) -> Array:
    """Solve ``A X = B`` with a symmetric positive definite matrix.

    Raises:
        ValueError: the matrix is not positive definite.
    """
    if _on_gpu(symmetric_NN):
        factor_NN = namespace(symmetric_NN).linalg.cholesky(symmetric_NN)
        if not bool(namespace(factor_NN).isfinite(factor_NN).all()):  # cupy gives NaN instead of an error
            raise ValueError("the matrix is not positive definite")
        return solve_lower(factor_NN, solve_lower(factor_NN, right_NM), transposed=True)
    factor = scipy.linalg.cho_factor(to_numpy(symmetric_NN), lower=True)  # its LinAlgError is a ValueError
    return namespace(symmetric_NN).asarray(scipy.linalg.cho_solve(factor, to_numpy(right_NM)))


def top_eigenpairs(symmetric_NN: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` largest eigenvalues (descending) and orthonormal eigenvectors of a dense symmetric matrix."""
    xp, size = namespace(symmetric_NN), symmetric_NN.shape[0]
    found = _some_eigenpairs(symmetric_NN, count) if array_api_compat.is_numpy_array(symmetric_NN) else None
    if found is None:
        values, vectors = xp.linalg.eigh(symmetric_NN)
        found = values[size - count :], vectors[:, size - count :]
    return xp.flip(found[0]), xp.flip(found[1], axis=1)


def _some_eigenpairs(symmetric_NN: Array, count: int) -> tuple[Array, Array] | None:
    """The ``count`` largest, ascending, or nothing.

    Among many equal eigenvalues LAPACK's driver for a few of them loses some or stops with an internal error.
    """
    size = symmetric_NN.shape[0]
    try:
        values, vectors = scipy.linalg.eigh(symmetric_NN, subset_by_index=(size - count, size - 1), driver="evr")
    except np.linalg.LinAlgError:
        return None
    return (values, vectors) if values.shape[0] == count else None
