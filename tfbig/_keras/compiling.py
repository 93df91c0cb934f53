"""Keras calls a class's own `compile` with arguments it may not take; hooks go beneath all of them.

A class may have a `compile` of its own, with other defaults ("auto" of KerasHub) or other arguments
(two optimizers). An override by tfbig's mixins would come before it, hide its signature, and pass
it arguments that it does not know. So a tfbig model prepares and finishes compiling in Keras's own
`compile`, in which every `super().compile(...)` ends.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
from keras.src.trainers.trainer import Trainer

from tfbig import _types

# Any: Keras has no types. The mixins stand before a Keras model, and mypy takes them for one.
_KerasModel: Any = keras.Model if TYPE_CHECKING else object

# The arguments of Keras's `compile` by name. Any: they are of all types.
Settings: TypeAlias = dict[str, Any]


class CompileHooks(_KerasModel):  # type: ignore[misc]  # Keras has no types.
    """What `compile` does to a tfbig model, whichever `compile` its class has."""

    train_function: _types.AnyFunction | None
    test_function: _types.AnyFunction | None
    predict_function: _types.AnyFunction | None

    def _prepare_compile(self, settings: Settings) -> None:
        """Hook: checks and changes what Keras is given, in the strategy's scope."""

    def _finish_compile(self) -> None:
        """Hook: called after Keras has compiled the model."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_automatic = name == "jit_compile" and value == "auto"
        # Keras takes "auto" for True here.
        super().__setattr__(name, self._resolve_auto_jit_compile() if is_automatic else value)
        config = getattr(self, "_compile_config", None) if name == "jit_compile" else None
        if config is not None:
            # Keras would go on with what is compiled, and save what `compile` was given.
            config.config[name] = value
            self.train_function = self.test_function = self.predict_function = None

    def compile_from_config(self, config: _types.Config) -> None:
        with self.distribute_strategy.scope():
            compile_: _types.AnyFunction
            if _takes_only_keras_arguments(type(self).compile):
                compile_ = self.compile
            elif self.compiled:
                # By its constructor, like the tasks of KerasHub: other settings are attributes.
                compile_ = functools.partial(Trainer.compile, self)
            else:
                # Keras does not compile it, and warns of that.
                super().compile_from_config(config)
                return
            compile_(**keras.saving.deserialize_keras_object(config))
            # Keras would make the optimizer's variables outside of the scope.
            if self.optimizer is not None and self.built:
                self.optimizer.build(self.trainable_variables)


_compile = Trainer.compile


def _takes_only_keras_arguments(compile_: Callable[..., object]) -> bool:
    """Whether a `compile` has no arguments but Keras's own, which are saved with a model."""
    own = inspect.signature(compile_).parameters.values()
    known = inspect.signature(_compile).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in own) or {p.name for p in own} == set(known)
    return takes_all and all(p.name in known or p.kind is p.VAR_KEYWORD for p in own)


def _settings(*args: object, **kwargs: object) -> Settings:
    """The arguments of Keras's `compile` by name, including defaults, excluding the model."""
    bound = inspect.signature(_compile).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


@functools.wraps(_compile)
def _hooked(self: Trainer, *args: object, **kwargs: object) -> None:
    if isinstance(self, CompileHooks):
        settings = _settings(self, *args, **kwargs)
        with self.distribute_strategy.scope():
            self._prepare_compile(settings)
            _compile(self, **settings)
        if settings["jit_compile"] == "auto":
            # Keras records what that means on this device, for the model that it saves, too.
            self._compile_config.config["jit_compile"] = "auto"
        self._finish_compile()
    else:
        _compile(self, *args, **kwargs)


Trainer.compile = _hooked


def recompile(model: keras.Model, optimizer: _types.Optimizer | None = None) -> None:
    """Compiles a model again with the settings that Keras has recorded.

    Keras's `compile` does it, not that of the model's class, which may take other arguments and
    has kept their effects in attributes.

    Args:
        model: the model.
        optimizer: replaces the recorded optimizer. Defaults to None: it is kept.
    """
    if model.compiled:
        settings = dict(model._compile_config.config)
        Trainer.compile(model, **settings | ({} if optimizer is None else {"optimizer": optimizer}))
