"""What is refused, in which class of exception (torch's, unless a difference is documented), in words that help."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels.pool import KINDS

import fastpool.functional as F


def map_of(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def refusal(function, *args, **kwargs):
    """The exception that a call raises."""
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return caught.value


# Arguments beside a (1, 1, 4, 4) input -> what the message must hold
WINDOWS = {
    "kernel_size=0": ({"kernel_size": 0}, "kernel_size must be at least 1, got (0, 0)"),
    "kernel_size=-1": ({"kernel_size": -1}, "kernel_size must be at least 1, got (-1, -1)"),
    "kernel_size=(2, 0)": ({"kernel_size": (2, 0)}, "got (2, 0)"),
    "kernel_size='3'": ({"kernel_size": "3"}, "kernel_size must be an int or a tuple of two ints, got '3'"),
    "kernel_size=2.0": ({"kernel_size": 2.0}, "got 2.0"),
    "kernel_size=(2, 2, 2)": ({"kernel_size": (2, 2, 2)}, "got 3 of them: (2, 2, 2)"),
    "kernel_size=()": ({"kernel_size": ()}, "got 0 of them: ()"),
    "kernel_size=True": ({"kernel_size": True}, "got True"),
    "kernel_size=None": ({"kernel_size": None}, "got None"),
    "kernel_size=(2.0, 2)": ({"kernel_size": (2.0, 2)}, "got (2.0, 2)"),
    "kernel_size=(True, 2)": ({"kernel_size": (True, 2)}, "got (True, 2)"),
    "kernel_size=[2, '2']": ({"kernel_size": [2, "2"]}, "got [2, '2']"),
    "kernel_size={2}": ({"kernel_size": {2}}, "got {2}"),
    "kernel_size=array": ({"kernel_size": np.array([2, 2])}, "kernel_size must be an int or a tuple of two ints"),
    "kernel_size=tensor": ({"kernel_size": torch.tensor([2, 2])}, "kernel_size must be an int or a tuple of two ints"),
    "kernel_size=2**40": ({"kernel_size": 2**40}, "1099511627776"),
    "kernel_size=2**31": ({"kernel_size": 2**31}, "2147483648"),
    "kernel_size=2**31 - 1": ({"kernel_size": 2**31 - 1}, "(2147483647, 2147483647) is larger than the padded input (4, 4)"),
    "kernel_size=5": ({"kernel_size": 5}, "kernel_size (5, 5) is larger than the padded input (4, 4)"),
    "kernel_size=(1, 5)": ({"kernel_size": (1, 5)}, "kernel_size (1, 5) is larger than the padded input (4, 4)"),
    "kernel_size=7, padding=1": ({"kernel_size": 7, "padding": 1}, "kernel_size (7, 7) is larger than the padded input (6, 6)"),
    "stride=0": ({"kernel_size": 2, "stride": 0}, "stride must be at least 1, got (0, 0)"),
    "stride=-1": ({"kernel_size": 2, "stride": -1}, "stride must be at least 1, got (-1, -1)"),
    "stride=(1, 0)": ({"kernel_size": 2, "stride": (1, 0)}, "got (1, 0)"),
    "stride=(1, 1, 1)": ({"kernel_size": 2, "stride": (1, 1, 1)}, "got 3 of them: (1, 1, 1)"),
    "stride='2'": ({"kernel_size": 2, "stride": "2"}, "stride must be an int or a tuple of two ints, got '2'"),
    "stride=1.5": ({"kernel_size": 2, "stride": 1.5}, "got 1.5"),
    "stride=2**40": ({"kernel_size": 2, "stride": 2**40}, "1099511627776"),
    "padding=2": ({"kernel_size": 2, "padding": 2}, "padding (2, 2) is more than half of kernel_size (2, 2); at most (1, 1) works"),
    "padding=(0, 2)": (
        {"kernel_size": (4, 3), "padding": (0, 2)},
        "padding (0, 2) is more than half of kernel_size (4, 3); at most (2, 1)",
    ),
    "padding=-1": ({"kernel_size": 2, "padding": -1}, "padding must be at least 0, got (-1, -1)"),
    "padding='a'": ({"kernel_size": 2, "padding": "a"}, "padding must be an int or a tuple of two ints, got 'a'"),
    "padding=None": ({"kernel_size": 2, "padding": None}, "got None"),
    "padding=()": ({"kernel_size": 2, "padding": ()}, "got 0 of them: ()"),
    "ceil_mode='yes'": ({"kernel_size": 2, "ceil_mode": "yes"}, "ceil_mode must be a bool, got 'yes'"),
    "ceil_mode=1": ({"kernel_size": 2, "ceil_mode": 1}, "ceil_mode must be a bool, got 1"),
    "ceil_mode=None": ({"kernel_size": 2, "ceil_mode": None}, "got None"),
}
DILATED = {
    "dilation=0": ({"kernel_size": 2, "dilation": 0}, "dilation must be at least 1, got (0, 0)"),
    "dilation=-1": ({"kernel_size": 2, "dilation": -1}, "dilation must be at least 1, got (-1, -1)"),
    "dilation=1.5": ({"kernel_size": 2, "dilation": 1.5}, "dilation must be an int or a tuple of two ints, got 1.5"),
    "dilation=(1, 1, 1)": ({"kernel_size": 2, "dilation": (1, 1, 1)}, "got 3 of them: (1, 1, 1)"),
    "dilation=3": (
        {"kernel_size": 3, "dilation": 3},
        "kernel_size (3, 3) dilated by (3, 3) to (7, 7) is larger than the padded input (4, 4)",
    ),
    "dilation=2**31 - 1": ({"kernel_size": 2, "dilation": 2**31 - 1}, "larger than the padded input (4, 4)"),
}
AVERAGES = {
    "divisor_override=0": ({"kernel_size": 2, "divisor_override": 0}, "divisor_override must not be zero"),
    "divisor_override=1.5": ({"kernel_size": 2, "divisor_override": 1.5}, "divisor_override must be an int or None, got 1.5"),
    "divisor_override=True": ({"kernel_size": 2, "divisor_override": True}, "got True"),
    "divisor_override='a'": ({"kernel_size": 2, "divisor_override": "a"}, "got 'a'"),
    "count_include_pad=2": ({"kernel_size": 2, "count_include_pad": 2}, "count_include_pad must be a bool, got 2"),
    "count_include_pad=None": ({"kernel_size": 2, "count_include_pad": None}, "got None"),
}


def check(ours, theirs, words, *args, **kwargs):
    """Ours raises an exception that torch's handlers catch, which starts with the function's name and says ``words``."""
    expected = refusal(theirs, *args, **kwargs)
    with pytest.raises(type(expected)) as caught:
        ours(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{ours.__name__}: ")
    assert words in message


@pytest.mark.parametrize(("arguments", "words"), (WINDOWS | DILATED).values(), ids=WINDOWS | DILATED)
def test_max_pool2d_refuses_windows_as_torch(arguments, words):
    check(F.max_pool2d, T.max_pool2d, words, map_of(1, 1, 4, 4), **arguments)


@pytest.mark.parametrize(("arguments", "words"), (WINDOWS | AVERAGES).values(), ids=WINDOWS | AVERAGES)
def test_avg_pool2d_refuses_windows_as_torch(arguments, words):
    check(F.avg_pool2d, T.avg_pool2d, words, map_of(1, 1, 4, 4), **arguments)


EXTRA = {
    F.min_pool2d: {},
    F.l2_pool2d: {},
    F.lp_pool2d: {"norm_type": 3},
    F.stochastic_pool2d: {},
}
by_name = pytest.mark.parametrize("function", EXTRA, ids=lambda f: f.__name__)


@by_name
@pytest.mark.parametrize(("arguments", "words"), (WINDOWS | DILATED).values(), ids=WINDOWS | DILATED)
def test_what_torch_lacks_refuses_the_windows_that_max_pool2d_does(function, arguments, words):
    # No torch function to compare with: max_pool2d's class is the reference.
    x = map_of(1, 1, 4, 4)
    expected = refusal(T.max_pool2d, x, **arguments)
    with pytest.raises(type(expected), match=rf"^{function.__name__}: .*{re.escape(words)}"):
        function(x, **arguments, **EXTRA[function])


# The words of one and three axes

BY_RANK = {
    "1d kernel_size=(2, 2)": (1, {"kernel_size": (2, 2)}, "kernel_size must be a single int or a tuple of one int, got 2 of them: (2, 2)"),
    "1d kernel_size='a'": (1, {"kernel_size": "a"}, "kernel_size must be an int or a tuple of one int, got 'a'"),
    "1d kernel_size=5": (1, {"kernel_size": 5}, "kernel_size (5,) is larger than the padded input (4,)"),
    "1d stride=0": (1, {"kernel_size": 2, "stride": 0}, "stride must be at least 1, got (0,)"),
    "1d padding=2": (1, {"kernel_size": 2, "padding": 2}, "padding (2,) is more than half of kernel_size (2,); at most (1,) works"),
    "3d kernel_size=(2, 2)": (3, {"kernel_size": (2, 2)}, "a single int or a tuple of three ints, got 2 of them: (2, 2)"),
    "3d kernel_size=2.0": (3, {"kernel_size": 2.0}, "kernel_size must be an int or a tuple of three ints, got 2.0"),
    "3d kernel_size=(2, 2, 5)": (3, {"kernel_size": (2, 2, 5)}, "kernel_size (2, 2, 5) is larger than the padded input (4, 4, 4)"),
    "3d padding=(0, 0, 2)": (3, {"kernel_size": 3, "padding": (0, 0, 2)}, "padding (0, 0, 2) is more than half of kernel_size (3, 3, 3)"),
}


@pytest.mark.parametrize("pool", ["max_pool", "avg_pool"])
@pytest.mark.parametrize(("rank", "arguments", "words"), BY_RANK.values(), ids=BY_RANK)
def test_windows_of_one_and_three_axes(pool, rank, arguments, words):
    name = f"{pool}{rank}d"
    check(getattr(F, name), getattr(T, name), words, map_of(1, 1, *[4] * rank), **arguments)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("pool", ["max_pool", "avg_pool", "lp_pool", "adaptive_max_pool"])
def test_shapes_of_one_and_three_axes(pool, rank):
    ours, theirs = (getattr(library, f"{pool}{rank}d") for library in (F, T))
    arguments = (2, 2) if pool == "lp_pool" else (2,)
    expected = {1: r"expected a \(C, L\) or \(N, C, L\)", 3: r"expected a \(C, D, H, W\) or \(N, C, D, H, W\)"}[rank]
    for dimensions in (1, rank + 3):
        x = map_of(*[2] * dimensions)
        with pytest.raises(type(refusal(theirs, x, *arguments)), match=rf"^{ours.__name__}: {expected} input, got {dimensions} dimensions"):
            ours(x, *arguments)
    axes = {1: "channels and length", 3: "channels, depth, height and width"}[rank]
    with pytest.raises(RuntimeError, match=rf"^{ours.__name__}: {axes} must not be empty"):
        ours(map_of(2, 2, *[2] * (rank - 1), 0), *arguments)


OUTPUTS = {
    "-1": (-1, "output_size must be at least 0, got (-1, -1)"),
    "'a'": ("a", "output_size must be an int or a tuple of two ints"),
    "2.5": (2.5, "output_size must be an int or a tuple of two ints"),
    "True": (True, "output_size must be an int or a tuple of two ints"),
    "(1, 2, 3)": ((1, 2, 3), "got 3 of them"),
    "()": ((), "got 0 of them"),
    "(-1, 2)": ((-1, 2), "got (-1, 2)"),
}


@pytest.mark.parametrize("pool", ["adaptive_max_pool2d", "adaptive_avg_pool2d"])
@pytest.mark.parametrize(("asked", "words"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_sizes_that_are_none(pool, asked, words):
    check(getattr(F, pool), getattr(T, pool), words, map_of(1, 1, 4, 4), asked)


def test_a_window_larger_than_its_input_says_both_sizes():
    message = str(refusal(F.max_pool2d, torch.zeros(1, 1, 2, 2), 3))
    assert "max_pool2d: kernel_size (3, 3) is larger than the padded input (2, 2)" in message
    assert "the largest that fits is (2, 2)" in message


# Inputs

SHAPES = {
    "0-d": (),
    "1-d": (4,),
    "2-d": (4, 4),
    "5-d": (1, 1, 1, 4, 4),
    "C = 0": (1, 0, 4, 4),
    "H = 0": (1, 1, 0, 4),
    "W = 0": (1, 1, 4, 0),
    "(0, H, W)": (0, 4, 4),
    "N = 0 and C = 0": (0, 0, 4, 4),
}
POOLS = {
    F.max_pool2d: (T.max_pool2d, (2,)),
    F.avg_pool2d: (T.avg_pool2d, (2,)),
    F.lp_pool2d: (T.lp_pool2d, (2, 2)),
    F.min_pool2d: (None, (2,)),
    F.l2_pool2d: (None, (2,)),
    F.stochastic_pool2d: (None, (2,)),
    F.global_max_pool2d: (None, ()),
    F.global_avg_pool2d: (None, ()),
    F.global_min_pool2d: (None, ()),
    F.global_l2_pool2d: (None, ()),
    # torch's take no channels: adaptive_avg_pool2d (N, 0, H, W), adaptive_max_pool2d (0, H, W).
    F.adaptive_max_pool2d: (None, ((2, 3),)),
    F.adaptive_avg_pool2d: (None, ((2, 3),)),
    F.adaptive_min_pool2d: (None, ((2, 3),)),
}
every_function = pytest.mark.parametrize("function", POOLS, ids=lambda f: f.__name__)


def test_every_function_is_in_the_list():
    faced = {
        f"{whole}{kind.face.stem}_pool2d"
        for kind in KINDS.values()
        if kind.face and kind.name not in ("max", "min", "l2")
        for whole in ("", "global_")
    }  # tests/test_faces.py
    elsewhere = {
        "max_unpool2d",
        "conv2d",
        "conv_transpose2d",
        "conv_pool2d",
    }  # tests/test_unpool.py, test_conv_errors.py, test_conv_pool.py
    assert {function.__name__ for function in POOLS} == {name for name in F.__all__ if name.endswith("2d")} - faced - elsewhere


@every_function
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_that_cannot_be_pooled(function, shape):
    x = map_of(*shape)
    theirs, arguments = POOLS[function]
    error = refusal(theirs, x, *arguments) if theirs else RuntimeError()
    with pytest.raises(type(error), match=rf"^{function.__name__}: .*{re.escape(str(shape))}"):
        function(x, *arguments)


@every_function
def test_an_empty_batch_is_pooled_to_an_empty_batch(function):
    theirs, arguments = POOLS[function]
    x = torch.empty(0, 3, 4, 6, requires_grad=True)
    y = function(x, *arguments)
    assert y.shape == (theirs(x, *arguments).shape if theirs else (0, 3, 2, 3) if arguments else (0, 3, 1, 1))
    y.sum().backward()
    assert x.grad.shape == x.shape


@every_function
@pytest.mark.parametrize("given", [[[1.0]], np.zeros((1, 1, 4, 4)), None, 3], ids=lambda v: type(v).__name__)
def test_an_input_that_is_no_tensor(function, given):
    _, arguments = POOLS[function]
    with pytest.raises(TypeError, match=rf"^{function.__name__}: input must be a Tensor, got {type(given).__name__}"):
        function(given, *arguments)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(F.max_pool2d, torch.complex64), *[(F.avg_pool2d, dtype) for dtype in (torch.bool, torch.complex64, torch.int32, torch.uint8)]],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_dtypes_that_torch_refuses_too(function, dtype):
    check(function, POOLS[function][0], "float32, float64, bfloat16, float16", torch.zeros(1, 1, 4, 4, dtype=dtype), 2)


def without_kernels(function):
    integers = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    if {"max", "min"} & set(function.__name__.split("_")):
        integers = []
    elif function is F.avg_pool2d:
        integers.remove(torch.int64)
    return [*integers, torch.complex64, torch.uint32]


@pytest.mark.parametrize(
    ("function", "dtype"), [(f, dtype) for f in POOLS for dtype in without_kernels(f)], ids=lambda v: getattr(v, "__name__", str(v))
)
def test_dtypes_without_kernels_name_those_that_have(function, dtype):
    _, arguments = POOLS[function]
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: not implemented for {name}; float32, float64, .* work"):
        function(torch.zeros(1, 1, 4, 4, dtype=dtype), *arguments)


@every_function
def test_devices_without_kernels(function):
    _, arguments = POOLS[function]
    with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: no kernels for device 'meta'; cpu"):
        function(torch.zeros(1, 1, 4, 4, device="meta"), *arguments)


def test_what_is_refused_draws_no_random_number():
    before = torch.get_rng_state()
    for x, kernel_size in (torch.zeros(1, 1, 4, 4), 5), (torch.zeros(1, 1, 4, 4, dtype=torch.int32), 2), (torch.zeros(4), 2):
        refusal(F.stochastic_pool2d, x, kernel_size)
        assert torch.equal(torch.get_rng_state(), before), f"{x.dtype}, {tuple(x.shape)}"


# Norms

NORMS = {
    "0": (0, ValueError),  # documented: torch raises ZeroDivisionError
    "0.0": (0.0, ValueError),
    "nan": (float("nan"), ValueError),  # torch returns NaN
    "-inf": (-float("inf"), ValueError),
    "'a'": ("a", TypeError),
    "None": (None, TypeError),
    "True": (True, TypeError),
    "2j": (2j, TypeError),
}


@pytest.mark.parametrize(("norm_type", "error"), NORMS.values(), ids=NORMS)
def test_norms_that_are_none(norm_type, error):
    with pytest.raises(error, match=rf"^lp_pool2d: norm_type must be a number.* got {re.escape(repr(norm_type))}"):
        F.lp_pool2d(map_of(1, 1, 4, 4), norm_type, 2)


def test_torch_divides_by_a_norm_of_zero():
    # The documented difference is still one.
    assert type(refusal(T.lp_pool2d, map_of(1, 1, 4, 4), 0, 2)) is ZeroDivisionError


@pytest.mark.parametrize("norm_type", [2, 2.0, np.float64(2), np.float32(2), np.int64(2)], ids=repr)
def test_norms_of_any_real_type_equal_torchs(norm_type):
    x = map_of(1, 1, 4, 4)
    torch.testing.assert_close(F.lp_pool2d(x, norm_type, 2), T.lp_pool2d(x, norm_type, 2))


# What torch accepts

ACCEPTED = {
    "kernel_size=(2,)": {"kernel_size": (2,)},
    "kernel_size=[2]": {"kernel_size": [2]},
    "kernel_size=[2, 3]": {"kernel_size": [2, 3]},
    "kernel_size=torch.Size": {"kernel_size": torch.Size([2, 3])},
    "kernel_size=int64": {"kernel_size": np.int64(2)},
    "kernel_size=(int64, int)": {"kernel_size": (np.int64(2), 3)},
    "kernel_size=0-d tensor": {"kernel_size": torch.tensor(2)},
    "kernel_size=(0-d tensor, int)": {"kernel_size": (torch.tensor(2), 3)},
    "stride=None": {"kernel_size": 2, "stride": None},
    "stride=()": {"kernel_size": 2, "stride": ()},
    "stride=[]": {"kernel_size": 2, "stride": []},
    "stride=torch.Size([])": {"kernel_size": 2, "stride": torch.Size([])},
    "stride=int64": {"kernel_size": 2, "stride": np.int64(1)},
    "stride=0-d tensor": {"kernel_size": 2, "stride": torch.tensor(1)},
    "stride=(2,)": {"kernel_size": 3, "stride": (2,), "padding": (1,)},
    "stride=2**31 - 1": {"kernel_size": 2, "stride": 2**31 - 1},
    "ceil_mode": {"kernel_size": 2, "stride": 3, "ceil_mode": True},
}


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("function", [F.max_pool2d, F.avg_pool2d], ids=lambda f: f.__name__)
def test_forms_that_torch_accepts(function, arguments):
    x = map_of(1, 2, 7, 8)  # small integers: averages are exact in any order
    torch.testing.assert_close(function(x, **arguments), POOLS[function][0](x, **arguments), rtol=0, atol=0)


@pytest.mark.parametrize("divisor", [3, -2, 2**62, np.int64(3), torch.tensor(3)], ids=repr)
def test_divisors_that_torch_accepts(divisor):
    x = map_of(1, 2, 7, 8)
    ours, theirs = (pool(x, 2, divisor_override=divisor) for pool in (F.avg_pool2d, T.avg_pool2d))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
