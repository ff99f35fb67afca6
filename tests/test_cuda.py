"""CUDA kernels, by their PTX on a CPU (emulated.py): the tests of pooling's geometries, layouts and dtypes again, on that device.

What of kinds and dtypes depends on a geometry, test_cuda_geometry.py asks; here are the rules by which numbers are made, and windows of all
sizes.
"""

import emulated
import pytest
import test_dtypes
import test_faces
import test_fusion
import test_pooling
import test_ranks
import test_stochastic
import test_unpool
import torch
from cases import EVERY_NEST, GEOMETRIES
from emulated import on_the_emulator  # noqa: F401
from test_pooling import SELECTING, SUMMING

pytestmark = emulated.needs_toolchain

# As they are
test_values_and_gradients = test_faces.test_values_and_gradients
test_max_of_every_activation = test_fusion.test_max_of_every_activation
test_of_equals_the_largest_element_gets_the_gradient = test_fusion.test_of_equals_the_largest_element_gets_the_gradient
test_global_pooling_of_one_column = test_pooling.test_global_pooling_of_one_column
test_lp_at_zero_and_infinity = test_pooling.test_lp_at_zero_and_infinity
test_lp_is_torchs_on_positive_input = test_pooling.test_lp_is_torchs_on_positive_input
test_unbatched_empty_and_memory_format = test_pooling.test_unbatched_empty_and_memory_format
test_adaptive_by_the_rule = test_ranks.test_adaptive_by_the_rule
test_draws_are_philoxs_by_the_rule = test_stochastic.test_draws_are_philoxs_by_the_rule
test_gradient_goes_to_the_drawn_element = test_stochastic.test_gradient_goes_to_the_drawn_element
test_nothing_positive_and_not_finite = test_stochastic.test_nothing_positive_and_not_finite
test_subnormal_windows_still_draw = test_stochastic.test_subnormal_windows_still_draw
test_round_trip_is_torchs = test_unpool.test_round_trip_is_torchs

# Each window is another kernel, of each kind.  What a kernel does with positions is of no kind: one that selects goes through all windows,
# but for those that differ by the CPU's nests alone, one that sums through a few, and every kind through one that overlaps with gaps.
NESTS = "flat", "narrow", "few", "across", "filled"
ALL = [name for name in GEOMETRIES if not name.startswith(NESTS) and not name.endswith(("-parts", "1-wide", "0-wide", "1d-31s1p15"))]
OF_A_SUM = [name for name in EVERY_NEST if name in ALL] + ["stride-over-kernel-ceil"]
GAPS = "asymmetric-dilated"


def places(kinds, through):
    return [(kind, name) for kind in kinds for name in through.get(kind, [GAPS])]


@pytest.mark.parametrize(("kind", "geometry"), places(SUMMING, {"avg": OF_A_SUM}))
def test_summing(kind, geometry):
    test_pooling.test_summing(kind, geometry, "f32")


@pytest.mark.parametrize(("kind", "geometry"), places(SELECTING, {"max": ALL}))
def test_selecting(kind, geometry):
    test_pooling.test_selecting(kind, geometry, "f32")


@pytest.mark.parametrize(
    ("include_pad", "divisor", "layout"), [(True, 3, "contiguous"), (False, -2, "contiguous"), (False, None, "channels_last")]
)
def test_avg_counts(include_pad, divisor, layout):
    test_pooling.test_avg_counts(include_pad, divisor, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_average_of_integers_is_torchs(layout):
    test_dtypes.test_average_of_integers_is_torchs(layout, (2, 3, 9, 14))


@pytest.mark.parametrize("kind", ["avg", "soft"])
def test_long_sums(kind):
    test_pooling.test_global_summing(kind, (2, 3, 120, 157), "f32")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("rank", "out"), [(1, (4,)), (1, (50,)), (2, (9, 4)), (2, (12, 25)), (2, (None, 3)), (3, (2, 3, 4))], ids=str)
def test_adaptive(rank, out, layout):
    test_ranks.test_adaptive(rank, out, layout, 5)


@pytest.mark.parametrize("kind", [*SELECTING, *SUMMING])
def test_every_kind_over_bins(kind):
    test_ranks.test_every_kind_over_bins(kind, [2, 2, 2])


# What stands beside a pooling


@pytest.mark.parametrize("pool", test_fusion.POOLS)
@pytest.mark.parametrize(
    "module", [torch.nn.ReLU(), torch.nn.ELU(0.7), torch.nn.SiLU(), test_fusion.FALLS_FIRST], ids=lambda m: type(m).__name__
)
def test_before_and_after(module, pool):
    test_fusion.test_before_and_after(module, pool, False)


@pytest.mark.parametrize(("name", "pool"), [("silu", "max"), ("leaky_relu", "max"), ("tanh", "min"), ("relu", "avg"), ("gelu", "avg")])
def test_what_is_not_finite(name, pool):
    test_fusion.test_what_is_not_finite(name, pool)


@pytest.mark.parametrize("before", [None, "silu"])
@pytest.mark.parametrize(("pool", "signs"), [("max", (1, -1, 1)), ("min", (1, 0, -1)), ("avg", (1, -1, 1))])
def test_affine(pool, signs, before):
    test_fusion.test_affine(pool, signs, before)
