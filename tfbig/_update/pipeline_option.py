"""The option `pipeline`: which stage a model's layers and variables lie on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from tfbig import _keras, _log, _types, errors
from tfbig._keras.stages import Stage
from tfbig._update import gathered_weights, option, replicas, stage_cut
from tfbig.distribute._pipeline import Pipeline

if TYPE_CHECKING:
    from tfbig._update.step_options import StepOptions

__all__ = ("apply", "check_before_run", "checked", "measure", "say_bubble", "update")


def checked(value: object) -> Pipeline | None:
    """Returns the option `pipeline`, checked."""
    if value is not None and not isinstance(value, Pipeline):
        raise errors.InvalidOptionError(
            f"`pipeline` must be a tfbig.distribute.Pipeline or None. Received: pipeline={value!r}."
        )
    return value


def apply(model: StepOptions) -> None:
    """Puts what a built model has on its stages: layers, variables, and the state of optimizers.

    Raises:
        InvalidOptionError: If the layers do not make the stages, or another option does not go
            with them.
        UnsupportedModelError: If the model has no stages, and cannot be cut.
        UnsupportedStrategyError: If the strategy does not support them.
    """
    pipeline = model.pipeline
    if pipeline is None or not model.built:
        return
    pipeline.check_strategy(model.distribute_strategy)
    _refuse_others(model)
    found = {_keras.stages.stage_of(layer) for layer in model._flatten_layers()}
    if found.isdisjoint(pipeline.stages):
        # No stages, or those of a pipeline before this one.
        for operation in _operations(model):
            _keras.stages.forget(operation)
        chosen = _chosen(model, pipeline.stages)
        if chosen:
            for operation, stage in chosen:
                _keras.stages.put(operation, stage)
        else:
            _cut(model, pipeline)
    if _place(model, pipeline.stages):
        model._rebuild_step()
    model.__dict__["_pipeline_in_effect"] = pipeline


def update(model: StepOptions) -> None:
    """Has a change of `pipeline` take effect on a model that is there already.

    If it cannot, the pipeline is the one before again.
    """
    operations = _operations(model) if model.built else []
    before = [(operation, _keras.stages.stage_of(operation)) for operation in operations]
    try:
        if model.built and model.pipeline is None:
            _unplace(model)
            model.__dict__["_pipeline_in_effect"] = None
        apply(model)
    except errors.TfbigError:
        for operation, stage in before:
            _keras.stages.forget(operation)
            if stage is not None:
                _keras.stages.put(operation, stage)
        model._keep_options({"pipeline": model.__dict__.get("_pipeline_in_effect")})
        raise
    model._rebuild_step()


def _check_is_given(model: StepOptions) -> None:
    """Raises if layers were made on stages, but the model was not told of them."""
    if model.pipeline is not None:
        return
    for layer in model._flatten_layers():
        stage = _keras.stages.stage_of(layer)
        if stage is not None:
            raise errors.InvalidOptionError(
                "A model with layers on stages needs the pipeline that they were made with. "
                f"Received: {layer.path or layer.name!r} on stage {stage.index}, and "
                "pipeline=None. Pass `pipeline=` to the model."
            )


def _refuse_others(model: StepOptions) -> None:
    """Raises for options that do not go with stages."""
    option.refuse_compile_settings(
        model,
        "pipeline",
        jit_compile="XLA compiles for one device",
        run_eagerly="without a graph, stages would run one after another",
    )
    is_automatic = getattr(model, "_automatic_size", None) is not None
    if model.exchange_dtype is not None and replicas.count_of(model) > 1:
        raise errors.InvalidOptionError(
            "`exchange_dtype` does not go with `pipeline`: each stage exchanges the gradients of "
            f"its variables as they are. Received: exchange_dtype={model.exchange_dtype!r}."
        )
    is_divided = any(gathered_weights.is_divided(v) for v in model.variables)
    given = {
        "shard": (
            "weights" if is_divided else model.shard,
            "a stage has the weights and the optimizer state of its layers whole, on each "
            "replica. Use more stages or `recompute` if they do not fit, or leave one of the two "
            "out",
        ),
        "micro_batch_size": (
            "auto" if is_automatic else None,
            "it watches the memory of one device; pass a number",
        ),
    }
    for name, (value, reason) in given.items():
        if value is not None:
            raise errors.InvalidOptionError(
                f"`{name}={value!r}` does not go with `pipeline`: {reason}."
            )


# --- Stages that are found ----------------------------------------------------------------


def _chosen(
    model: StepOptions, stages: Sequence[Stage]
) -> list[tuple[Any, Stage]]:  # Any: layers and operations.
    """The layers that were made within stages, with these."""
    found = [(x, _keras.stages.chosen_index(x)) for x in _operations(model)]
    most = max((index for _, index in found if index is not None), default=0)
    if most >= len(stages):
        raise errors.InvalidOptionError(
            f"The layers were made on {most + 1} stages. Received: a pipeline of {len(stages)}. "
            "Use one with as many stages."
        )
    return [(x, stages[index]) for x, index in found if index is not None]


def _cut(model: StepOptions, pipeline: Pipeline) -> None:
    """Finds the stages of a model, and puts its layers on them."""
    parts = stage_cut.parts_of(model)
    found = stage_cut.cut(parts, len(pipeline.stages), pipeline.max_parameters)
    for stage, part in zip(pipeline.stages, found, strict=True):
        for call in part.calls:
            _keras.stages.put(call, stage)
    _log.logger().info("tfbig: stages of %s\n%s", model.name, _table(found))


def _table(parts: list[stage_cut.Part]) -> str:
    """Layers, parameters and share of the work of each stage."""
    total = sum(part.work for part in parts) or 1.0
    rows = [("stage", "layers", "parameters", "work")]
    for i, part in enumerate(parts):
        layers = [c.name for c in part.calls if getattr(c, "variables", None)]
        names = layers[0] if len(layers) == 1 else f"{layers[0]} ... {layers[-1]} ({len(layers)})"
        rows.append((str(i), names, f"{part.parameters:,}", f"{part.work / total:.0%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# --- Where variables lie --------------------------------------------------------------------


def _place(model: StepOptions, stages: Sequence[Stage]) -> bool:
    """Moves all variables of a model to their stages, one at a time; returns whether any moved.

    Raises:
        InvalidOptionError: If a layer with variables is on no stage, on one of another pipeline, or
            uses variables of another stage, or if a stage has no layers.
    """
    wanted = _stages_of_variables(model, stages)
    strategy = model.distribute_strategy
    used = {stage.index for _, stage in wanted.values()}
    for stage in stages:
        if stage.index not in used:
            raise errors.InvalidOptionError(
                f"Each stage needs a layer with variables. Received: a pipeline of {len(stages)} "
                f"stages, of which stage {stage.index} has none. Make a layer within `with "
                f"pipeline.stage({stage.index}):`, or use fewer devices."
            )
    has_moved = [_move(variable, stage, strategy) for variable, stage in wanted.values()]
    if replicas.count_of(model) > 1:
        for stage in stages:
            _keras.collectives.exchange_on(stage.devices, strategy)
    has_moved += [_move(v, stage, strategy) for v, stage in _states_on_stages(model)]
    return any(has_moved)


def _states_on_stages(model: StepOptions) -> list[tuple[_types.KerasVariable, Stage]]:
    """The parts of optimizers' state that belong to a weight on a stage, and that stage."""
    found = []
    for _, outer in _keras.optimizer.optimizers_of(model):
        for optimizer in _keras.optimizer.parts_of(outer):
            weights = _keras.sharded_optimizer.weights_of(optimizer)
            for index, variable in _keras.sharded_optimizer.state_of(optimizer):
                stage = _keras.stages.stage_of(weights[index])
                if stage is not None:
                    found.append((variable, stage))
    return found


def _move(variable: _types.KerasVariable, stage: Stage, strategy: _types.Strategy) -> bool:
    """Whether a variable had to be moved to get where it lies now."""
    if _keras.variables.devices_of(variable) == stage.devices:
        _keras.stages.put(variable, stage)
        return False
    _keras.stages.move(variable, stage, strategy)
    return True


def _unplace(model: StepOptions) -> None:
    """Takes layers off their stages, and brings variables back to the replicas' devices."""
    strategy = model.distribute_strategy
    for operation in _operations(model):
        _keras.stages.forget(operation)
    weights = [v for v in model.variables if _keras.stages.stage_of(v) is not None]
    for variable in (*(v for v, _ in _states_on_stages(model)), *weights):
        _keras.stages.move(variable, None, strategy)


def _operations(model: keras.Model) -> list[Any]:  # Any: layers and operations of Keras.
    try:
        return [*model._flatten_layers(), *_keras.work.calls_of(model)]
    except TypeError:
        return list(model._flatten_layers())


def _stages_of_variables(
    model: StepOptions, known: Sequence[Stage]
) -> dict[int, tuple[_types.KerasVariable, Stage]]:
    """The variables of a model's layers, by identity, with the stage of each."""
    found: dict[int, tuple[_types.KerasVariable, Stage]] = {}

    def visit(layer: _types.Layer, outer: Stage | None) -> None:
        stage = _keras.stages.stage_of(layer) or outer
        if stage is not None and stage not in known:
            raise errors.InvalidOptionError(
                "All layers must be made with the pipeline of their model. Received: "
                f"{layer.path or layer.name!r}, which lies on stages of another."
            )
        for variable in _keras.layers.own_variables(layer):
            if stage is None and layer is model:
                raise errors.InvalidOptionError(
                    "Weights of the model itself lie on the stage within which the model is made. "
                    f"Received: {variable.path} on no stage. Make the model within `with "
                    "pipeline.stage(i):`."
                )
            if stage is None:
                raise errors.InvalidOptionError(
                    "Either all layers with variables are made on stages, or none, and stages are "
                    f"found. Received: {layer.path or layer.name!r} on no stage, beside layers "
                    "that were made on stages, or put there for another model. Make it within "
                    "`with pipeline.stage(i):`."
                )
            _, other = found.setdefault(id(variable), (variable, stage))
            if other is not stage:
                is_seed = any(variable is g.state for g in layer._seed_generators)
                remedy = (
                    "Give each layer a seed generator, or an integer as `seed`, of its own"
                    if is_seed
                    else "Make them on the same stage"
                )
                raise errors.InvalidOptionError(
                    "Layers that share a variable must be on one stage, or its value would go "
                    f"from one to the other in each micro-batch. Received: {variable.path} on "
                    f"stages {other.index} and {stage.index}. {remedy}."
                )
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            visit(inner, stage)

    visit(model, None)
    return found


# --- What is said before training --------------------------------------------------------------


def check_before_run(model: StepOptions) -> None:
    """Checks what is known when `fit` or `evaluate` begins, and puts on stages what was built."""
    _check_is_given(model)
    apply(model)
    if model.pipeline is None:
        return
    if _keras.layers.has_synchronized_layers(model) and replicas.count_of(model) > 1:
        raise errors.UnsupportedModelError(
            "Layers that exchange with other replicas do not go with `pipeline`: micro-batches "
            "would meet in them. Received: a layer with synchronized=True. Use synchronized=False."
        )


def measure(model: StepOptions, is_wanted: bool) -> None:
    """Has the stages timed from now on, or no longer; the step is traced anew if that changes.

    They are not timed where TensorFlow has no clock, or several machines may have clocks of their
    own: with deterministic operations, and with stages in other processes.
    """
    if model.pipeline is None:
        is_wanted = False
    elif is_wanted:
        is_wanted = _keras.stage_clock.can_time(model.pipeline.stages)
    if is_wanted != (model.stage_clock is not None):
        model.stage_clock = _keras.stage_clock.StageClock() if is_wanted else None
        model._rebuild_step()


def say_bubble(model: StepOptions, micro_batches: int | None) -> None:
    """Says how long stages wait, where few micro-batches keep them waiting.

    Args:
        model: the model.
        micro_batches: those of an update on a replica; None if they are not known.
    """
    if model.pipeline is None or micro_batches is None:
        return
    stages = len(model.pipeline.devices)
    if micro_batches < 2 * stages:
        bubble = (stages - 1) / (micro_batches + stages - 1)
        _log.logger().warning(
            "tfbig: %d stages wait for at least %.0f %% of the time, since an update has few "
            "micro-batches: %d. Use gradient_accumulation_steps=%d or more.",
            stages,
            100 * bubble,
            micro_batches,
            4 * stages,
        )
