"""The choice of the array library and the way there and back."""

import importlib.util

import numpy as np
import pytest

from cria_dist import arrays


@pytest.fixture
def fresh_choice():
    arrays.choose.cache_clear()
    yield
    arrays.choose.cache_clear()


def test_choice_comes_with_its_reason():
    library, reason = arrays.choose()
    assert library in ("numpy", "cupy")
    if importlib.util.find_spec("cupy") is None:
        assert (library, reason) == ("numpy", "CuPy is not installed (extras gpu-cu12, gpu-cu13)")
    else:
        assert "CUDA device" in reason


@pytest.mark.usefixtures("fresh_choice")
def test_without_cupy_it_is_numpy_and_says_so(monkeypatch):
    monkeypatch.setattr(arrays.importlib.util, "find_spec", lambda name: None)
    library, reason = arrays.choose()
    assert library == "numpy"
    assert "not installed" in reason


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_arrays_survive_the_device(library, dtype):
    host = np.arange(12).reshape(3, 4).astype(dtype)
    there = arrays.to_device(host, library)
    back = arrays.to_numpy(there)
    assert isinstance(back, np.ndarray)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, host)
    assert library in arrays.namespace(there).__name__


def test_mixed_libraries_are_a_type_error():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError):
        arrays.namespace(np.ones(3), torch.ones(3))


def test_csr_adds_duplicates(library):
    values, rows, columns = np.asarray([1.0, 2.0, 5.0]), np.asarray([0, 0, 2]), np.asarray([1, 1, 0])
    matrix = arrays.csr(*(arrays.to_device(part, library) for part in (values, rows, columns)), (3, 3))
    np.testing.assert_array_equal(
        arrays.to_numpy(arrays.dense(matrix)), [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]
    )


def test_component_labels(library):
    ends = np.asarray([[0, 3], [3, 4], [1, 5]])
    rows, columns = (arrays.to_device(np.concatenate([ends[:, side], ends[:, 1 - side]]), library) for side in (0, 1))
    count, labels = arrays.component_labels(arrays.csr(arrays.to_device(np.ones(6), library), rows, columns, (6, 6)))
    assert (count, type(count)) == (3, int)
    labels = arrays.to_numpy(labels)
    groups = {tuple(np.flatnonzero(labels == label)) for label in range(3)}
    assert groups == {(0, 3, 4), (1, 5), (2,)}


@pytest.mark.parametrize("transposed", [False, True])
def test_solve_lower(library, transposed):
    rng = np.random.default_rng(0)
    factor = np.tril(rng.normal(size=(8, 8))) + 4 * np.eye(8)
    right = rng.normal(size=(8, 3))
    found = arrays.solve_lower(arrays.to_device(factor, library), arrays.to_device(right, library), transposed)
    np.testing.assert_allclose((factor.T if transposed else factor) @ arrays.to_numpy(found), right, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4, 30])
def test_top_eigenpairs_of_a_dense_matrix(library, count):
    square = np.random.default_rng(1).normal(size=(30, 30))
    symmetric = square + square.T
    values, vectors = arrays.top_eigenpairs(arrays.to_device(symmetric, library), count)
    values, vectors = arrays.to_numpy(values), arrays.to_numpy(vectors)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(symmetric)[::-1][:count], atol=1e-12)
    np.testing.assert_allclose(symmetric @ vectors, vectors * values, atol=1e-10)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-12)


def test_solve_positive(library):
    rng = np.random.default_rng(0)
    rows, right = rng.normal(size=(40, 12)), rng.normal(size=(12, 3))
    matrix = arrays.to_device(rows.T @ rows, library)
    found = arrays.to_numpy(arrays.solve_positive(matrix, arrays.to_device(right, library)))
    np.testing.assert_allclose(found, np.linalg.solve(rows.T @ rows, right), atol=1e-10)
    with pytest.raises(ValueError, match="positive definite"):
        arrays.solve_positive(-matrix, arrays.to_device(right, library))
