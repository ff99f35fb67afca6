"""CUDA kernels, by their PTX on a CPU (emulated.py): the tests of pooling's geometries, layouts and dtypes again, on that device."""

import emulated
import pytest
from test_pooling import (  # noqa: F401
    test_first_inside_is_chosen_where_no_element_wins,
    test_nan_is_found_wherever_it_lies,
    test_selecting,
    test_summing,
)

pytestmark = emulated.needs_toolchain


@pytest.fixture(autouse=True)
def emulator():
    with emulated.device() as found:
        yield found
        assert found.launches
