"""`Option`: what an option of a model is, declared once."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import keras

from tfbig import _keras, errors

__all__ = ("Option", "declared", "refuse_compile_settings", "signature")

# What the property returns.
T = TypeVar("T")


def _is_given(_model: keras.Model, value: Any) -> bool:
    return value not in (None, False)


def _rebuild(model: _keras.trainer.TrainerOverrides) -> None:
    model._rebuild_step()


def _as_it_is(_model: keras.Model, value: Any) -> Any:
    return value


def _fits_any(_model: keras.Model, _value: Any) -> None:
    pass


class Option(property, Generic[T]):
    """An option of a model: an argument of its constructor, a property, and part of its config.

    Declared as an attribute of the mixin that takes it. Everything else follows from the
    declaration: the constructor takes the option, `get_config` saves it, `clone_model`, `extend`
    and tuners hand it on, `tpu_check` turns it off for the model that it compares with, and a
    `train_step` of the user's own in which it would have no effect is refused.

    Args:
        default: The value of a model that was given none.
        check: Function of a value that returns it as it is kept, or raises `InvalidOptionError`.
            What it is given may come from a saved config.
        doc: Docstring of the property.
        is_none_given: Whether None, where options are handed on, is a value like any other, and
            does not mean that the option was not given.
        fits: Function of a built model and a checked value that raises if they do not go together.
        value: Function of the model: the value that it was given. Defaults to what was kept.
        shown: Function of the model: what the property returns. Defaults to the value.
        saved: Function of model and value: what `get_config` serializes. Defaults to the value.
        changed: Function of the model, called after the property was set. Defaults to making the
            train function anew.
        asks: Function of model and value: whether the value asks for anything at all. Defaults to
            whether it is neither None nor False.
        plain: The value with which a model trains as plain Keras does.
        needs_tfbig_in: Which of Keras's own steps, `train_step` and `test_step`, cannot do what the
            option asks for.
        passed_on: How a `train_step` of the user's own hands the option to the two halves of an
            update; None if it cannot.
        logs: Names that the option adds to the logs of `fit`.
    """

    def __init__(
        self,
        *,
        default: Any,
        check: Callable[[Any], Any],
        doc: str,
        is_none_given: bool = False,
        fits: Callable[[Any, Any], None] = _fits_any,
        value: Callable[[Any], Any] | None = None,
        shown: Callable[[Any], Any] | None = None,
        saved: Callable[[Any, Any], Any] = _as_it_is,
        changed: Callable[[Any], None] = _rebuild,
        asks: Callable[[Any, Any], bool] = _is_given,
        plain: Any = None,
        needs_tfbig_in: tuple[str, ...] = (),
        passed_on: str | None = None,
        logs: tuple[str, ...] = (),
    ):
        self.value = value or self._kept
        shown = shown or self.value

        @functools.wraps(shown)
        def read(model: keras.Model) -> Any:
            return shown(model)

        # The class's own docstring would hide one that is only an argument.
        self.__doc__ = read.__doc__ = doc
        super().__init__(read, self._set, doc=doc)
        self.default = default
        self.check = check
        self.fits = fits
        self.is_none_given = is_none_given
        self.asks = asks
        self.plain = plain
        self.needs_tfbig_in = needs_tfbig_in
        self.passed_on = passed_on
        self.logs = logs
        self._saved = saved
        self._changed = changed

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type | None = None) -> Self: ...

        @overload
        def __get__(self, instance: object, owner: type | None = None) -> T: ...

        def __get__(self, instance: object, owner: type | None = None) -> Any: ...

        def __set__(self, instance: object, value: Any) -> None: ...

    def __set_name__(self, owner: type, name: str) -> None:
        # A class may give the property a second name.
        if not hasattr(self, "name"):
            self.name = name

    # What a class makes of the property is a property of its own, and declares no option.

    def getter(self, fget: Callable[[Any], Any], /) -> property:
        return property(fget, self.fset, self.fdel)

    def setter(self, fset: Callable[[Any, Any], None], /) -> property:
        return property(self.fget, fset, self.fdel)

    def deleter(self, fdel: Callable[[Any], None], /) -> property:
        return property(self.fget, self.fset, fdel)

    def _kept(self, model: keras.Model) -> Any:
        return vars(model).get(f"_{self.name}", self.default)

    def keep(self, model: keras.Model, value: Any) -> None:
        """Keeps a checked value, without effect on functions that were made already."""
        # Past Keras, which takes the layers of a list for further layers of the model, and
        # attributes before its own constructor for a mistake.
        object.__setattr__(model, f"_{self.name}", value)

    def saved(self, model: keras.Model) -> Any:
        """The value as it is saved and handed on."""
        return self._saved(model, self.value(model))

    def is_asked(self, model: keras.Model) -> bool:
        """Whether a model asks for anything with this option."""
        return self.asks(model, self.value(model))

    # Any: a `StepOptions`, which is not known here; hints of properties are read at run time.
    def _set(self, model: Any, value: Any) -> None:
        value = self.check(value)
        if model.built:
            self.fits(model, value)
        model._keep_options({self.name: value})
        self._changed(model)


def refuse_compile_settings(model: keras.Model, option: str, **reasons: str) -> None:
    """Raises for settings of `compile` that do not go with an option.

    Args:
        model: a tfbig model.
        option: the option, with its value if only that is meant.
        **reasons: why, by the name of a setting that must not be True.
    """
    for name, reason in reasons.items():
        if model.compiled and getattr(model, name) is True:
            raise errors.InvalidOptionError(
                f"`{name}=True` does not go with `{option}`: {reason}. Received: {name}=True. Pass "
                f"{name}=False to `compile`."
            )


def declared(cls: type) -> dict[str, Option[Any]]:
    """The options that tfbig's mixins declare for a class, by name.

    Those too whose property the class has replaced with something of its own.
    """
    options: dict[str, Option[Any]] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("tfbig."):
            options |= {k: v for k, v in vars(base).items() if isinstance(v, Option)}
    return options


def signature(options: Mapping[str, Option[Any]]) -> inspect.Signature:
    """The signature of a constructor that takes options beside the arguments of Keras."""
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds("self", kinds.POSITIONAL_OR_KEYWORD),
            kinds("args", kinds.VAR_POSITIONAL),
            *(kinds(k, kinds.KEYWORD_ONLY, default=v.default) for k, v in options.items()),
            kinds("kwargs", kinds.VAR_KEYWORD),
        ]
    )
