"""CUDA kernels, by their PTX on a CPU (emulated.py): the tests of pooling's geometries, layouts and dtypes again, on that device."""

import emulated
import pytest
import test_pooling
from emulated import on_the_emulator  # noqa: F401
from test_dtypes import ONE, ROUNDED, SELECTIONS, test_average_of_integers_is_torchs  # noqa: F401
from test_dtypes import test_halves as halves
from test_dtypes import test_selections as selections
from test_faces import test_values_and_gradients  # noqa: F401
from test_fusion import test_before_and_after, test_max_of_every_activation, test_of_equals_the_largest_element_gets_the_gradient  # noqa: F401
from test_pooling import (  # noqa: F401
    GLOBAL,
    SELECTING,
    SUMMING,
    places,
    test_avg_counts,
    test_avg_is_torchs_at_any_geometry,
    test_first_inside_is_chosen_where_no_element_wins,
    test_global_pooling_of_one_column,
    test_global_selecting,
    test_lp_at_zero_and_infinity,
    test_lp_is_torchs_on_positive_input,
    test_max_is_torchs_at_any_geometry,
    test_unbatched_empty_and_memory_format,
)
from test_ranks import (  # noqa: F401
    test_adaptive,
    test_adaptive_by_the_rule,
    test_every_kind_over_bins,
)
from test_stochastic import (  # noqa: F401
    test_draws_are_philoxs_by_the_rule,
    test_gradient_goes_to_the_drawn_element,
    test_nothing_positive_and_not_finite,
    test_subnormal_windows_still_draw,
)
from test_unpool import test_dtypes, test_round_trip_is_torchs  # noqa: F401

pytestmark = emulated.needs_toolchain

# A kernel is of one kind and one size of window, and its indices are of no kind: one kind that selects and one that sums go through all
# geometries, the others through two, and float64, which is another type of the same lines, through one.  What of 16-bit floats and of
# integers depends on a geometry, test_cuda_geometry.py asks.
THROUGH_ALL, FEW = ("max", "avg"), ("3x3s2p1", "asymmetric-dilated")


def _goes(kind, geometry, dtype):
    return geometry == FEW[0] if dtype == "f64" else kind in THROUGH_ALL or geometry in FEW


@pytest.mark.parametrize(("kind", "geometry", "dtype"), [place for place in places(SUMMING) if _goes(*place)])
def test_summing(kind, geometry, dtype):
    test_pooling.test_summing(kind, geometry, dtype)


@pytest.mark.parametrize(("kind", "geometry", "dtype"), [place for place in places(SELECTING) if _goes(*place)])
def test_selecting(kind, geometry, dtype):
    test_pooling.test_selecting(kind, geometry, dtype)


# Other ranks, bins and whole maps have kernels of their own.
PLACES = ONE, "bins", "map", "1-d", "3-d"


@pytest.mark.parametrize(("kind", "dtype", "place"), [found for found in dict.fromkeys(ROUNDED) if found[2] in PLACES])
def test_halves(kind, dtype, place):
    halves(kind, dtype, place)


@pytest.mark.parametrize(("kind", "dtype", "place"), [found for found in SELECTIONS if found[2] in PLACES[1:]])
def test_selections(kind, dtype, place):
    selections(kind, dtype, place)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", SUMMING)
def test_global_summing(kind, dtype):
    for shape in (*GLOBAL, (2, 3, 120, 157)) if (kind, dtype) == ("avg", "f32") else GLOBAL[1::3]:
        test_pooling.test_global_summing(kind, shape, dtype)
