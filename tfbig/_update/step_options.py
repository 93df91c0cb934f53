"""Options of the step: how the gradient is computed, exchanged and looked at."""

import functools
import inspect
from typing import Any

import keras

from tfbig import _keras
from tfbig._update import half_precision_exchange, noise_scale, recomputation

__all__ = ("StepOptions", "option_names", "set_options")


def option_names(cls):
    """Names of the options that tfbig's mixins add to a class."""
    return {
        name
        for c in cls.__mro__
        if c.__module__.startswith("tfbig.")
        and issubclass(c, StepOptions)
        and "__init__" in vars(c)
        for name in inspect.getfullargspec(c.__init__).kwonlyargs
    }


@functools.cache
def _settable(cls):
    """Names of the options of a class that are properties of tfbig."""
    found = {name: getattr(cls, name, None) for name in option_names(cls)}
    return {k for k, v in found.items() if isinstance(v, property) and v.fset is not None}


def set_options(model, options):
    """Sets constructor options as properties."""
    for name, value in options.items():
        if value is not None or name == "loss_scale":
            setattr(model, name, value)


class StepOptions(_keras.trainer.TrainerOverrides):
    """The options of both mixins, and how they are kept.

    Not part of the public interface; `GradientAccumulationMixin` documents them.
    """

    _log_grad_norm = False
    _log_gradient_noise_scale = False
    _recompute: Any = None
    _exchange_dtype: str | None = None
    # `NoiseScale`; None where it is not logged.
    noise_scale_state: Any = None

    def __init__(
        self,
        *args,
        log_grad_norm=False,
        log_gradient_noise_scale=False,
        recompute=None,
        exchange_dtype=None,
        **kwargs,
    ):
        recompute = recomputation.check(recompute)
        exchange_dtype = half_precision_exchange.checked_dtype(exchange_dtype)
        self._log_grad_norm = bool(log_grad_norm)
        # Before: a constructor may compile, as those of KerasHub do.
        self._log_gradient_noise_scale = bool(log_gradient_noise_scale)
        self._exchange_dtype = exchange_dtype
        super().__init__(*args, **kwargs)
        self._set_recompute(recompute)

    @property
    def log_grad_norm(self):
        """Whether logs hold the global norm of the gradient, before clipping."""
        return self._log_grad_norm

    @log_grad_norm.setter
    def log_grad_norm(self, value):
        self._log_grad_norm = bool(value)
        self._rebuild_step()

    @property
    def log_gradient_noise_scale(self):
        """Whether logs hold the gradient noise scale, in samples."""
        return self._log_gradient_noise_scale

    @log_gradient_noise_scale.setter
    def log_gradient_noise_scale(self, value):
        self._log_gradient_noise_scale = bool(value)
        if self.compiled:
            self._reset_noise_scale()
        self._rebuild_step()

    def _reset_noise_scale(self):
        with self.distribute_strategy.scope():
            self.noise_scale_state = (
                noise_scale.NoiseScale() if self._log_gradient_noise_scale else None
            )

    @property
    def exchange_dtype(self):
        """What gradients are cast to while replicas exchange them; None for nothing."""
        return self._exchange_dtype

    @exchange_dtype.setter
    def exchange_dtype(self, value):
        self._exchange_dtype = half_precision_exchange.checked_dtype(value)
        self._rebuild_step()

    @property
    def recompute(self):
        """True, the layers, or the predicate, of what is computed again; None for nothing."""
        return self._recompute

    @recompute.setter
    def recompute(self, value):
        self._set_recompute(recomputation.check(value))
        self._rebuild_step()

    def _set_recompute(self, value):
        if self.built:
            recomputation.layers_of(self, value)
        # Keras would take the layers of a list for further layers of the model.
        object.__setattr__(self, "_recompute", value)

    @property
    def _is_default(self):
        """Whether no option asks for more than Keras's own step does."""
        return not (self._log_grad_norm or self._log_gradient_noise_scale or self._recompute)

    def _options(self):
        return {
            "log_grad_norm": self._log_grad_norm,
            "log_gradient_noise_scale": self._log_gradient_noise_scale,
            "recompute": recomputation.serialized(self, self._recompute),
            "exchange_dtype": self._exchange_dtype,
        }

    def __setattr__(self, name, value):
        # Keras passes over a value that is there already; here a property may show a number that
        # was found, and be set to it.
        if name in _settable(type(self)):  # type: ignore[arg-type]
            getattr(type(self), name).fset(self, value)
        else:
            super().__setattr__(name, value)

    get_config = _keras.saving.ConfigWith(lambda: StepOptions, "_option_config")

    def _option_config(self):
        return {k: keras.saving.serialize_keras_object(v) for k, v in self._options().items()}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        options = {name: config.pop(name) for name in option_names(cls) & set(config)}
        extra = {} if custom_objects is None else {"custom_objects": custom_objects}
        model = super().from_config(config, **extra)
        set_options(model, options)
        return model
