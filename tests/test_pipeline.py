"""Functions of kernels that are the same are compiled once; others never are taken for them."""

import pytest
from fastpool.kernels.cpu.number import jitable
from fastpool.kernels.pipeline import interned


class Jit:
    def __init__(self, function):
        self.py_func = function


@pytest.fixture
def jit():
    return interned(Jit)


def scaled(by, jit):
    return jit(lambda x: x * by)


def test_the_same_code_over_the_same_constants_is_one(jit):
    assert scaled(2, jit) is scaled(2, jit)
    assert scaled((1, ("a", None)), jit) is scaled((1, ("a", None)), jit)
    inner = scaled(2, jit)
    assert scaled(inner, jit) is scaled(scaled(2, jit), jit)


@pytest.mark.parametrize(("a", "b"), [(1, 2), (1, True), (1, 1.0), (0.0, -0.0), ((1,), (True,)), ("1", 1)])
def test_other_constants_are_another(a, b, jit):
    assert scaled(a, jit) is not scaled(b, jit)


def test_other_code_and_defaults_are_another(jit):
    def with_default(value):
        return jit(lambda x, by=value: x * by)

    assert jit(lambda x: x + 1) is not jit(lambda x: x - 1)
    assert with_default(1) is with_default(1)
    assert with_default(1) is not with_default(2)


def test_what_a_factory_renames_later_is_not_meant(jit):
    def factory():
        by = 2
        scaled = jit(lambda x: x * by)
        by = 3
        return scaled, by

    (first, _), (second, _) = factory(), factory()
    assert first is second
    assert first.py_func(5) == 10


def test_what_cannot_be_compared_is_compiled_as_it_is(jit):
    table = [1, 2]
    assert scaled(table, jit) is not scaled(table, jit)

    def factory():
        @jit
        def of_itself(n):
            return of_itself if n else table

        return of_itself

    assert factory() is not factory()


def test_kernels_share_their_functions():
    assert scaled(2, jitable) is scaled(2, jitable)
