"""What Keras and tf.distribute do otherwise than tfbig needs.

This is the only package that touches `keras.src` or a private Keras name. Every
workaround states the reason; `tests/canaries_test.py` demonstrates each defect
and fails on the day upstream mends it.
"""

import keras

from tfbig import _backend

_backend.check(keras.backend.backend())

from tfbig._keras.data import (
    NO_SAMPLES,
    batch_size,
    global_seed,
    is_sharded,
    known_batches,
    new_seed,
    reads_files,
    reseeded_shuffling,
    resume_data,
    samples_of,
    shuffles_without_seed,
    without_optionals,
)
from tfbig._keras.devices import (
    STRATEGIES,
    compiled_as_a_whole,
    devices_of,
    is_compiled_as_a_whole,
    is_tpu,
    make_logical_cpus,
)
from tfbig._keras.input_clock import InputClock
from tfbig._keras.layers import (
    all_layers,
    check_scope,
    computes_in_float16,
    draws_random_numbers,
    forward,
    has_synchronized_layers,
    owns,
    without_synchronization,
)
from tfbig._keras.losses import (
    check_is_scalar,
    check_losses,
    intercepted_losses,
    loss_names,
    match_ranks,
    merge_mask,
    metrics_results,
    output_losses,
    update_losses,
    update_metrics,
)
from tfbig._keras.optimizer import (
    LossScaleOptimizer,
    aggregated_gradients,
    needs_no_merge_call,
    optimizers_of,
)
from tfbig._keras.padding import PaddedBatch, data_of, without_padding
from tfbig._keras.recomputation import check_can_recompute, recomputed
from tfbig._keras.saving import (
    ConfigWith,
    Functional,
    SavedState,
    SeedStates,
    after_cloning,
    compile_settings,
    is_compile_of,
    is_functional,
    recompile,
    register_as,
    registered_class,
    registered_name,
    track_for_checkpoint,
    with_class,
)
from tfbig._keras.trainer import (
    OVERFLOW,
    TOO_MANY_SKIPS,
    TrainerOverrides,
    build_for,
    data_of_fit,
    globally_logged,
    is_placed,
    returns_global_logs,
    set_initial_epoch,
)
from tfbig._keras.variables import (
    VariableValues,
    assign_all,
    exchanged_already,
    is_summed,
    native,
    values_of,
)

__all__ = (
    "NO_SAMPLES",
    "OVERFLOW",
    "STRATEGIES",
    "TOO_MANY_SKIPS",
    "ConfigWith",
    "Functional",
    "InputClock",
    "LossScaleOptimizer",
    "PaddedBatch",
    "SavedState",
    "SeedStates",
    "TrainerOverrides",
    "VariableValues",
    "after_cloning",
    "aggregated_gradients",
    "all_layers",
    "assign_all",
    "batch_size",
    "build_for",
    "check_can_recompute",
    "check_is_scalar",
    "check_losses",
    "check_scope",
    "compile_settings",
    "compiled_as_a_whole",
    "computes_in_float16",
    "data_of",
    "data_of_fit",
    "devices_of",
    "draws_random_numbers",
    "exchanged_already",
    "forward",
    "global_seed",
    "globally_logged",
    "has_synchronized_layers",
    "intercepted_losses",
    "is_compile_of",
    "is_compiled_as_a_whole",
    "is_functional",
    "is_placed",
    "is_sharded",
    "is_summed",
    "is_tpu",
    "known_batches",
    "loss_names",
    "make_logical_cpus",
    "match_ranks",
    "merge_mask",
    "metrics_results",
    "native",
    "needs_no_merge_call",
    "new_seed",
    "optimizers_of",
    "output_losses",
    "owns",
    "reads_files",
    "recompile",
    "recomputed",
    "register_as",
    "registered_class",
    "registered_name",
    "reseeded_shuffling",
    "resume_data",
    "returns_global_logs",
    "samples_of",
    "set_initial_epoch",
    "shuffles_without_seed",
    "track_for_checkpoint",
    "update_losses",
    "update_metrics",
    "values_of",
    "with_class",
    "without_optionals",
    "without_padding",
    "without_synchronization",
)
