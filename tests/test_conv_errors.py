"""What convolution refuses, in torch's class of exception, with the sizes in the message; and what of torch's forms it takes."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from test_errors import refusal

import fastpool.functional as F
from fastpool import convolution


def of(*shape, dtype=torch.float32, **more):
    return torch.zeros(shape, dtype=dtype, **more)


def check(ours, theirs, words, *args, **kwargs):
    """Ours raises an exception that torch's handlers catch, which starts with the function's name and says ``words``."""
    expected = refusal(theirs, *args, **kwargs)
    with pytest.raises(type(expected), match=rf"^{ours.__name__}: .*{re.escape(words)}"):
        ours(*args, **kwargs)


X, W = of(2, 6, 8, 9), of(4, 6, 3, 3)

# Arguments of conv2d -> what the message must hold
REFUSED = {
    "channels": ((X, of(4, 5, 3, 3)), {}, "a weight of (4, 5, 3, 3) with groups=1 takes 5 channels, the input (2, 6, 8, 9) has 6"),
    "channels-of-groups": ((X, W), {"groups": 2}, "a weight of (4, 6, 3, 3) with groups=2 takes 12 channels, the input (2, 6, 8, 9) has 6"),
    "groups-of-outputs": ((X, of(4, 2, 3, 3)), {"groups": 3}, "groups=3 does not divide the 4 output channels of a weight of (4, 2, 3, 3)"),
    "groups=0": ((X, W), {"groups": 0}, "groups must be at least 1, got 0"),
    "groups=-1": ((X, W), {"groups": -1}, "groups must be at least 1, got -1"),
    "groups='a'": ((X, W), {"groups": "a"}, "groups must be an int or a tuple of one int, got 'a'"),
    "groups=1.0": ((X, W), {"groups": 1.0}, "groups must be an int or a tuple of one int, got 1.0"),
    "groups=True": ((X, W), {"groups": True}, "groups must be an int or a tuple of one int, got True"),
    "H=0": ((of(1, 6, 0, 9), W), {"padding": 2}, "height and width must not be empty, got (1, 6, 0, 9)"),
    "H=W=0": ((of(2, 6, 0, 0), W), {"padding": 2}, "height and width must not be empty, got (2, 6, 0, 0)"),
    "kernel-larger": ((X, of(4, 6, 9, 3)), {}, "kernel_size (9, 3) is larger than the padded input (8, 9): the output would be (0, 7)"),
    "kernel-larger-padded": ((X, of(4, 6, 13, 3)), {"padding": (2, 0)}, "kernel_size (13, 3) is larger than the padded input (12, 9)"),
    "kernel-larger-dilated": ((X, W), {"dilation": 4}, "kernel_size (3, 3) dilated by (4, 4) is larger than the padded input (8, 9)"),
    "weight-3d": ((X, of(4, 6, 3)), {}, "expected a weight of 4 dimensions, (out_channels, in_channels / groups, H, W), got 3: (4, 6, 3)"),
    "weight-5d": ((X, of(4, 6, 3, 3, 3)), {}, "expected a weight of 4 dimensions"),
    "weight-empty": ((X, of(4, 6, 0, 3)), {}, "a weight must not be empty, got (4, 6, 0, 3)"),
    "input-2d": ((of(6, 8), W), {}, "expected a (C, H, W) or (N, C, H, W) input, got 2 dimensions: (6, 8)"),
    "input-5d": ((of(1, 2, 6, 8, 9), W), {}, "expected a (C, H, W) or (N, C, H, W) input, got 5 dimensions: (1, 2, 6, 8, 9)"),
    "bias-longer": ((X, W, of(5)), {}, "expected a bias of shape (4,), as the weight's, got (5,)"),
    "bias-2d": ((X, W, of(4, 1)), {}, "expected a bias of shape (4,), as the weight's, got (4, 1)"),
    "dtype-of-weight": ((X, W.double()), {}, "input is torch.float32, weight or bias torch.float64; all must be of one dtype"),
    "dtype-of-bias": ((X, W, of(4, dtype=torch.bfloat16)), {}, "input is torch.float32, weight or bias torch.bfloat16"),
    "padding=-1": ((X, W), {"padding": -1}, "padding must be at least 0, got (-1, -1)"),
    "padding=(1, 2, 3)": ((X, W), {"padding": (1, 2, 3)}, "padding must be a single int or a tuple of two ints, got 3 of them: (1, 2, 3)"),
    "padding='full'": ((X, W), {"padding": "full"}, "padding must be ints, 'same' or 'valid', got 'full'"),
    "padding=1.5": ((X, W), {"padding": 1.5}, "padding must be an int or a tuple of two ints, got 1.5"),
    "same-with-a-stride": ((X, W), {"padding": "same", "stride": 2}, "padding='same' needs stride 1, got (2, 2)"),
    "same-with-one-stride": ((X, W), {"padding": "same", "stride": (1, 2)}, "padding='same' needs stride 1, got (1, 2)"),
    "stride=0": ((X, W), {"stride": 0}, "stride must be at least 1, got (0, 0)"),
    "stride=(1, -1)": ((X, W), {"stride": (1, -1)}, "stride must be at least 1, got (1, -1)"),
    "stride='a'": ((X, W), {"stride": "a"}, "stride must be an int or a tuple of two ints, got 'a'"),
    "stride=(1, 1, 1)": ((X, W), {"stride": (1, 1, 1)}, "stride must be a single int or a tuple of two ints, got 3 of them"),
    "dilation=0": ((X, W), {"dilation": 0}, "dilation must be at least 1, got (0, 0)"),
    "dilation=2.0": ((X, W), {"dilation": 2.0}, "dilation must be an int or a tuple of two ints, got 2.0"),
    "input-none": ((None, W), {}, "input must be a Tensor, got NoneType"),
    "input-array": ((np.zeros((2, 6, 8, 9), np.float32), W), {}, "input must be a Tensor, got ndarray"),
    "weight-none": ((X, None), {}, "weight must be a Tensor, got NoneType"),
    "bias-int": ((X, W, 3), {}, "bias must be a Tensor, got int"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "more", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_as_torch_refuses(tensors, more, words):
    check(F.conv2d, T.conv2d, words, *tensors, **more)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((X, W.to("meta")), "input is on cpu, weight or bias on meta"),
        ((X, W, of(4, device="meta")), "input is on cpu, weight or bias on meta"),
    ],
    ids=["weight", "bias"],
)
def test_tensors_of_two_devices(tensors, words):
    # torch takes the meta device's for shapes alone here; of a real second device it raises a RuntimeError.
    with pytest.raises(RuntimeError, match=f"^conv2d: {words}; all must be on one device"):
        F.conv2d(*tensors)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.uint8], ids=str)
def test_dtypes_without_kernels(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=rf"^conv2d: not implemented for {name}; float32, float64, bfloat16, float16 work"):
        F.conv2d(X.to(dtype), W.to(dtype))


def test_devices_without_kernels():
    with pytest.raises(NotImplementedError, match=r"^conv2d: no kernels for device 'meta'; cpu, cuda works"):
        F.conv2d(X.to("meta"), W.to("meta"))


@pytest.mark.parametrize("rank", [1, 3])
def test_words_of_other_ranks(rank):
    ours, theirs = (getattr(library, f"conv{rank}d") for library in (F, T))
    sizes, kernel = (4,) * rank, (3,) * rank
    axes = {1: "(C, L) or (N, C, L)", 3: "(C, D, H, W) or (N, C, D, H, W)"}[rank]
    w = of(2, 3, *kernel)
    check(ours, theirs, f"expected a {axes} input, got {rank + 3} dimensions", of(*[3] * (rank + 3)), w)
    check(ours, theirs, f"takes 3 channels, the input {(1, 5, *sizes)} has 5", of(1, 5, *sizes), w)
    check(ours, theirs, f"kernel_size {(5,) * rank} is larger than the padded input {sizes}", of(1, 3, *sizes), of(2, 3, *[5] * rank))
    check(ours, theirs, f"stride must be at least 1, got {(0,) * rank}", of(1, 3, *sizes), w, stride=0)
    check(ours, theirs, f"got {rank + 1} of them" if rank > 1 else "got 2 of them", of(1, 3, *sizes), w, dilation=(1,) * (rank + 1))


def test_an_empty_batch():
    assert F.conv2d(of(0, 6, 8, 9), W).shape == T.conv2d(of(0, 6, 8, 9), W).shape == (0, 4, 6, 7)


# What torch lacks

AFTER = {
    "'swish'": ("swish", ValueError, "an activation must be one of "),
    "'threshold'": ("threshold", ValueError, "threshold has no default threshold or value: give a torch.nn.Threshold"),
    "''": ("", ValueError, "got ''"),
    "Softmax()": (torch.nn.Softmax(), TypeError, "after must be a name or one of torch.nn's elementwise activations, got Softmax"),
    "ReLU": (torch.nn.ReLU, TypeError, "got type"),
    "torch.relu": (torch.relu, TypeError, "got builtin_function_or_method"),
    "Softplus(0)": (torch.nn.Softplus(0), ValueError, "beta must not be 0, got 0.0"),
    "RReLU()": (torch.nn.RReLU(), ValueError, "RReLU draws its slopes in training"),
    "PReLU(4)": (torch.nn.PReLU(4), ValueError, "PReLU must have one weight, got 4"),
    "PReLU()": (torch.nn.PReLU(), ValueError, "PReLU's weight gets no gradient here"),
}


@pytest.mark.parametrize(("after", "error", "words"), AFTER.values(), ids=AFTER)
def test_activations_that_are_none(after, error, words):
    for call in (lambda: F.conv2d(X, W, after=after), lambda: convolution.epilogue("conv2d", after)):
        with pytest.raises(error, match=rf"^conv2d: .*{re.escape(words)}"):
            call()


def test_a_derived_activation_is_not_taken_for_its_base():
    class Louder(torch.nn.ReLU):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(TypeError, match="got Louder"):
        F.conv2d(X, W, after=Louder())


AFFINE = {
    "one-tensor": (of(4), TypeError, "affine must be a tuple of two tensors, (scale, shift), got tensor("),
    "three": ((of(4), of(4), of(4)), TypeError, "affine must be a tuple of two tensors"),
    "a-number": ((2.0, of(4)), TypeError, "affine must be a tuple of two tensors"),
    "longer": ((of(5), of(4)), RuntimeError, "affine's tensors must be of shape (4,), got (5,)"),
    "2-d": ((of(4), of(4, 1, 1)), RuntimeError, "affine's tensors must be of shape (4,), got (4, 1, 1)"),
    "dtype": ((of(4).double(), of(4)), RuntimeError, "input is torch.float32, weight or bias torch.float64"),
}


@pytest.mark.parametrize(("affine", "error", "words"), AFFINE.values(), ids=AFFINE)
def test_affines_that_are_none(affine, error, words):
    with pytest.raises(error, match=rf"^conv2d: .*{re.escape(words)}"):
        F.conv2d(X, W, affine=affine)


def test_what_torch_lacks_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        F.conv2d(X, W, None, 1, 0, 1, 1, None)


# Transposed

TRANSPOSED = {
    "channels": ((X, of(5, 4, 3, 3)), {}, "(5, 4, 3, 3) with groups=1 takes 5 channels, the input (2, 6, 8, 9) has"),
    "groups": ((X, of(6, 2, 3, 3)), {"groups": 4}, "(6, 2, 3, 3) with groups=4"),
    "weight-3d": ((X, of(6, 4, 3)), {}, "a weight of 4 dimensions, got (2, 6, 8, 9), (6, 4, 3)"),
    "input-2d": ((of(8, 9), of(6, 4, 3, 3)), {}, "(C, H, W) or (N, C, H, W)"),
    "bias": ((X, of(6, 4, 3, 3), of(6)), {}, "expected a bias of shape (4,), got (6,)"),
    "output_padding": ((X, of(6, 4, 3, 3)), {"stride": 2, "output_padding": 2}, "output_padding (2, 2) must be smaller than stride (2, 2)"),
    "output_padding=-1": ((X, of(6, 4, 3, 3)), {"output_padding": -1}, "output_padding (-1, -1)"),
    "no-output": ((of(1, 6, 1, 1), of(6, 4, 3, 3)), {"padding": 2}, "the output of an input (1, 6, 1, 1) would be (-1, -1)"),
    "padding=-1": ((X, of(6, 4, 3, 3)), {"padding": -1}, "padding must be at least 0"),
    "padding='same'": ((X, of(6, 4, 3, 3)), {"padding": "same"}, "padding must be an int or a tuple of two ints, got 'same'"),
    "stride=0": ((X, of(6, 4, 3, 3)), {"stride": 0}, "stride must be at least 1, got (0, 0)"),
    "dtype": ((X, of(6, 4, 3, 3).double()), {}, "input is torch.float32, weight or bias torch.float64"),
    "weight-none": ((X, None), {}, "weight must be a Tensor, got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "more", "words"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_refuses_as_torch(tensors, more, words):
    check(F.conv_transpose2d, T.conv_transpose2d, words, *tensors, **more)


# What torch accepts

ACCEPTED = {
    "stride=(2,)": {"stride": (2,)},
    "stride=[2, 1]": {"stride": [2, 1]},
    "stride=int64": {"stride": np.int64(2)},
    "stride=torch.Size": {"stride": torch.Size([2, 1])},
    "padding=[1]": {"padding": [1]},
    "padding=(int64, 0)": {"padding": (np.int64(1), 0)},
    "padding='valid', stride": {"padding": "valid", "stride": 2},
    "padding='same', dilation": {"padding": "same", "dilation": (2, 1)},
    "dilation=0-d tensor": {"dilation": torch.tensor(2)},
    "groups=int64": {"groups": np.int64(1)},
    "groups=0-d tensor": {"groups": torch.tensor(1)},
    "bias=None": {"bias": None},
}


@pytest.mark.parametrize("more", ACCEPTED.values(), ids=ACCEPTED)
def test_forms_that_torch_accepts(more, small):
    small("model", 1 << 20)
    x, w = torch.randint(-4, 5, (1, 2, 7, 8)).float(), torch.randint(-4, 5, (3, 2, 3, 3)).float()
    assert torch.equal(F.conv2d(x, w, **more), T.conv2d(x, w, **more))
