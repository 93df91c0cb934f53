"""`compile`, at the bottom, where that of every class ends.

A class may have a `compile` of its own: with defaults ("auto" of KerasHub), or with other arguments
(two optimizers). What the mixins override stands before it, and would hide its signature and hand
it what it does not know. So what a model of tfbig does when it is compiled is done where
`super().compile(...)` of all of them arrives.
"""

import functools
import inspect
import typing

import keras
from keras.src.trainers.trainer import Trainer

# To mypy the mixins are Keras models; in truth they stand before one.
_KerasModel: typing.Any = keras.Model if typing.TYPE_CHECKING else object


class CompileHooks(_KerasModel):
    """What `compile` does with a model of tfbig, whatever `compile` its class has."""

    def _prepare_compile(self, settings):
        """Hook: checks and changes what Keras is given, a dictionary, in the strategy's scope."""

    def _finish_compile(self):
        """Hook: called after Keras has compiled the model."""

    def compile_from_config(self, config):
        with self.distribute_strategy.scope():
            if _takes_what_keras_records(type(self).compile):
                compile_ = self.compile
            elif self.compiled:
                # By its constructor, as tasks of KerasHub are: attributes hold what else there is.
                compile_ = functools.partial(Trainer.compile, self)
            else:
                # Keras does not call it, and says so.
                super().compile_from_config(config)
                return
            compile_(**keras.saving.deserialize_keras_object(config))
            # Keras would make its variables outside of the scope.
            if self.optimizer is not None and self.built:
                self.optimizer.build(self.trainable_variables)


_compile = Trainer.compile


def _takes_what_keras_records(compile_):
    """Whether a `compile` has no arguments but those of Keras's, which are saved with a model."""
    own = inspect.signature(compile_).parameters.values()
    known = inspect.signature(_compile).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in own) or {p.name for p in own} == set(known)
    return takes_all and all(p.name in known or p.kind is p.VAR_KEYWORD for p in own)


def _settings(*args, **kwargs):
    """The arguments of Keras's `compile` by name, defaults included, without the model."""
    bound = inspect.signature(_compile).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


@functools.wraps(_compile)
def _hooked(self, *args, **kwargs):
    if isinstance(self, CompileHooks):
        settings = _settings(self, *args, **kwargs)
        with self.distribute_strategy.scope():
            self._prepare_compile(settings)
            _compile(self, **settings)
        self._finish_compile()
    else:
        _compile(self, *args, **kwargs)


Trainer.compile = _hooked


def recompile(model, optimizer=None):
    """Compiles a model anew with the settings that Keras has recorded.

    Not by the `compile` of its class, which may take others: what that did beside, attributes hold.

    Args:
        model: `keras.Model`.
        optimizer: optimizer in place of the recorded one, or None.
    """
    if model.compiled:
        settings = dict(model._compile_config.config)
        Trainer.compile(model, **settings | ({} if optimizer is None else {"optimizer": optimizer}))
