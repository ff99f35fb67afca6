"""Under torch.compile and torch.export: one graph, eager's results."""

import pytest
import reference
import torch
from fastpool.kernels.pool import KINDS
from torch import nn

import fastpool
import fastpool.functional as F
from fastpool import library
from fastpool.backend import Pooling
from fastpool.window import window

POOLS = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max-indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "min": lambda x: F.min_pool2d(x, 2),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "l2": lambda x: F.l2_pool2d(x, 2),
    "lp": lambda x: F.lp_pool2d(x, 3, 2),
    "stochastic-eval": lambda x: F.stochastic_pool2d(x, 2, training=False),
    "global-max": F.global_max_pool2d,
    "global-l2": lambda x: F.global_l2_pool2d(x, keepdim=False),
}


@pytest.fixture
def compiled():
    """torch.compile by the backend that traces forward and backward but needs no C++ compiler."""
    torch.compiler.reset()
    yield lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", POOLS)
def test_one_graph_with_eagers_results(name, layout, compiled):
    pool = POOLS[name]
    x = torch.randn(2, 3, 12, 13).contiguous(memory_format=layout)
    a, b = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    found, expected = compiled(pool)(a), pool(b)
    if isinstance(expected, tuple):
        assert torch.equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(compiled(pool)(x)[0], pool(x)[0])


def test_a_converted_model(compiled):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    x = torch.randn(2, 3, 20, 20)
    expected = model(x)
    fastpool.convert(model)
    torch.testing.assert_close(compiled(model)(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.draws])
def test_operators_keep_torchs_rules(kind):
    op = Pooling("test", KINDS[kind], 2, window("test", 2, 2, None, 0, 1, False), reference.PARAMETERS.get(kind, ()))
    x = torch.randn(2, 3, 6, 8, requires_grad=True)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastpool.pool, (x, None, *library._described(op), 0, True), test_utils=utilities)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_functional_transforms_are_refused(transform):
    with pytest.raises(NotImplementedError, match=r"max_pool2d: torch\.func"):
        transform(lambda t: F.max_pool2d(t, 2).sum())(torch.randn(1, 1, 4, 4))


def test_tensors_without_numbers_in_memory():
    """Fake tensors have a shape only, zero and negated views a mark: none may be read as it lies."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert F.max_pool2d(torch.rand(1, 2, 8, 8), 2).shape == (1, 2, 4, 4)
    assert torch.equal(F.max_pool2d(torch._efficientzerotensor(1, 1, 4, 4), 2), torch.zeros(1, 1, 2, 2))
    negated = torch.randn(1, 3, 6, 7, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert torch.equal(F.max_pool2d(negated, 2), nn.functional.max_pool2d(negated.clone(), 2))


def test_forward_mode_is_refused():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        F.avg_pool2d(forward_ad.make_dual(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)), 2)
