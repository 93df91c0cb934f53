"""An option is declared once; what a declaration does not give must not be forgotten."""

import typing

import keras
import pytest

import tfbig
from tfbig._update import option, step_options

MIXINS = (tfbig.GradientAccumulationMixin, tfbig.DynamicLossScalingMixin)


def test_editors_know_every_option():
    assert typing.get_type_hints(step_options.Options).keys() == option.declared(tfbig.Model).keys()


@pytest.mark.parametrize("mixin", MIXINS, ids=lambda cls: cls.__name__)
def test_every_option_is_documented(mixin):
    arguments = mixin.__doc__.split("Args:")[1].split("Example:")[0]
    own = option.declared(mixin).keys()
    # Those of both mixins are documented by the first.
    is_first = mixin is tfbig.GradientAccumulationMixin
    of_both = option.declared(step_options.StepOptions).keys()
    for name in own if is_first else own - of_both:
        assert f"\n        {name}: " in arguments, name
    docs = {v.__doc__ for v in option.declared(mixin).values()}
    assert len(docs) == len(own)
    assert option.Option.__doc__ not in docs


def test_a_new_option_needs_no_more_than_its_declaration():
    def checked(value):
        if value not in (None, "yes"):
            raise tfbig.errors.InvalidOptionError(f"Received: greeting={value!r}.")
        return value

    # As a class of tfbig is: declarations of others are attributes like any.
    mixin = type(
        "Greeting",
        (tfbig.GradientAccumulationMixin,),
        {
            "__module__": "tfbig.greeting",
            "greeting": option.Option(
                default=None, check=checked, doc="Whether.", passed_on="greeting=True to greet"
            ),
        },
    )

    @keras.saving.register_keras_serializable("option_test")
    class Net(mixin, keras.Sequential):
        pass

    class OwnStep(Net):
        def train_step(self, data):
            return {"loss": 0.0}

    layers = [keras.Input((4,)), keras.layers.Dense(1)]
    model = Net(layers, greeting="yes", micro_batch_size=2)
    assert model.greeting == "yes"
    assert Net(layers).greeting is None
    assert Net.from_config(model.get_config()).greeting == "yes"
    assert keras.models.clone_model(model).greeting == "yes"
    model.greeting = None
    assert model.get_config()["greeting"] is None
    with pytest.raises(tfbig.errors.InvalidOptionError, match="greeting=3"):
        Net(layers, greeting=3)
    with pytest.raises(tfbig.errors.InvalidOptionError, match="greeting=3"):
        model.greeting = 3
    own = OwnStep(layers, greeting="yes")
    own.compile("sgd", "mse")
    with pytest.raises(tfbig.errors.UnsupportedModelError, match=r"greeting='yes'.*greeting=True"):
        own.train_on_batch(keras.ops.ones((2, 4)), keras.ops.ones((2, 1)))


def net(cls, **options):
    return cls([keras.Input((4,)), keras.layers.Dense(1)], **options)


def test_a_class_may_extend_the_property_of_an_option():
    seen = []

    class Net(tfbig.Sequential):
        @tfbig.Sequential.micro_batch_size.setter
        def micro_batch_size(self, value):
            seen.append(value)
            tfbig.Sequential.micro_batch_size.fset(self, value)

    model = net(Net, micro_batch_size=2)
    model.micro_batch_size = 2
    model.micro_batch_size = 3
    # Keras passes over a value that is there already.
    assert seen == [2, 3]
    assert model.micro_batch_size == 3
    assert net(tfbig.Sequential, micro_batch_size=5).micro_batch_size == 5


def test_a_second_name_of_an_option_changes_no_other_model():
    class Net(tfbig.Sequential):
        steps = tfbig.Sequential.gradient_accumulation_steps

    assert net(Net, gradient_accumulation_steps=3).steps == 3
    model = net(tfbig.Sequential)
    model.gradient_accumulation_steps = 4
    assert model.gradient_accumulation_steps == 4


def test_an_argument_holds_whatever_the_constructor_of_a_class_sets():
    class Net(keras.Sequential):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gradient_accumulation_steps = 8
            self.log_grad_norm = True

    cls = tfbig.extend(Net)
    assert net(cls).gradient_accumulation_steps == 8
    model = net(cls, gradient_accumulation_steps=2, log_grad_norm=False)
    assert (model.gradient_accumulation_steps, model.log_grad_norm) == (2, False)


def test_none_is_not_given_except_for_the_loss_scale():
    model = net(tfbig.Sequential, log_grad_norm=True, loss_scale=4.0)
    model.compile("sgd", "mse")
    again = tfbig.extend(model, log_grad_norm=None, loss_scale=None)
    assert again.log_grad_norm
    assert again.loss_scale is None


def test_a_plain_model_keeps_properties_that_cannot_be_set():
    class Net(tfbig.Sequential):
        micro_batch_size = property(lambda self: 3)

    model = net(Net, log_grad_norm=True)
    step_options.make_plain(model)
    assert not model.log_grad_norm
    assert model.micro_batch_size == 3
