"""Activations on plain numpy numbers against torch: values and slopes; and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels.activation import ACTIVATIONS

PARAMETERS = {"leaky_relu": [(0.01,), (0.5,), (1.5,)]}
CASES = [(name, p) for name in ACTIVATIONS for p in PARAMETERS.get(name, [()])]
VALUES = [-math.inf, -1e30, -7.5, -1.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, 5.999999, 6.0, 6.000001, 7.0, 1e30, math.inf, math.nan]
DTYPES = [np.float32, np.float64]


def test_every_activation_is_torchs_by_name():
    assert list(ACTIVATIONS) == ["relu", "relu6", "leaky_relu"]
    for name, activation in ACTIVATIONS.items():
        assert activation.name == name
        assert callable(getattr(T, name))
        assert repr(activation) == f"Activation({name!r})"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "p"), CASES)
def test_values_and_slopes_are_torchs(name, p, dtype):
    """Bit for bit, zeros by their value; NaN stays NaN; at a corner the slope is torch's."""
    activation = ACTIVATIONS[name]
    x = np.array(VALUES, dtype)
    t = torch.tensor(x, requires_grad=True)
    y = getattr(T, name)(t, *p)
    y.sum().backward()
    numbers = tuple(map(dtype, p))
    values = [activation.value(v, numbers) for v in x]
    assert all(v.dtype == dtype for v in values)
    np.testing.assert_array_equal(values, y.detach().numpy())
    for v, at, expected in zip(values, x, t.grad.numpy(), strict=True):
        if not np.isnan(at):  # the slope of NaN is nobody's concern: the gradient meets a NaN result anyway
            slope = activation.slope(v, numbers)
            assert slope.dtype == dtype
            assert slope == expected, at


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_defaults_are_torchs(name):
    activation = ACTIVATIONS[name]
    x = np.linspace(-9, 9, 37)
    p = tuple(map(np.float64, activation.defaults.values()))
    np.testing.assert_array_equal([activation.value(v, p) for v in x], getattr(T, name)(torch.tensor(x)).numpy())


@pytest.mark.parametrize("slope", [0.0, -0.5, math.nan])
def test_slopes_that_hide_the_sign(slope):
    """The derivative is told from the result: its sign must be the input's."""
    assert "negative_slope must be above 0" in ACTIVATIONS["leaky_relu"].refuse(slope)
    assert ACTIVATIONS["leaky_relu"].refuse(1e-9) is None


def test_the_source_is_the_file_it_is_written_in():
    """Part of what a compiled kernel is kept by."""
    for activation in ACTIVATIONS.values():
        assert "def " + activation.name in Path(activation.source).read_text()
