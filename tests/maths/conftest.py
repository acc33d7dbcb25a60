"""The array library a test runs on: NumPy always, CuPy where there is a device."""

from typing import Literal

import pytest

from cria_dist import arrays


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest) -> Literal["numpy", "cupy"]:
    if request.param == "cupy" and arrays.choose()[0] != "cupy":
        pytest.skip(arrays.choose()[1])
    return request.param
