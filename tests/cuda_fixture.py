"""The machines that tests of CUDA kernels run on, each test on every one: `pytest_plugins` of these tests."""

from __future__ import annotations

import pytest

from edgesdk.kernels.cuda.machine import Machine


@pytest.fixture(params=[0, 2, 3, pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Emulated with a seed, or the GPU."""
    from tests.cuda_kernels import machine_of

    return machine_of(request.param)
