"""CUDA kernels, by their PTX on a CPU (emulated.py): the tests of pooling's geometries, layouts and dtypes again, on that device."""

import emulated
from emulated import on_the_emulator  # noqa: F401
from test_dtypes import test_average_of_integers_is_torchs, test_halves, test_selections  # noqa: F401
from test_faces import test_values_and_gradients  # noqa: F401
from test_fusion import test_before_and_after, test_max_of_every_activation, test_of_equals_the_largest_element_gets_the_gradient  # noqa: F401
from test_pooling import (  # noqa: F401
    test_avg_counts,
    test_avg_is_torchs_at_any_geometry,
    test_first_inside_is_chosen_where_no_element_wins,
    test_global_pooling_of_one_column,
    test_global_selecting,
    test_global_summing,
    test_lp_at_zero_and_infinity,
    test_lp_is_torchs_on_positive_input,
    test_max_is_torchs_at_any_geometry,
    test_selecting,
    test_summing,
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
