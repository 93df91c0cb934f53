"""KerasTuner's augmentation of images, whose layers Keras 3.15 can compile."""

from collections.abc import Sequence

import keras
import keras_tuner
from keras_tuner.src.applications import augment

from tfbig import _types
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("HyperImageAugment", "RandAugment")


@keras.saving.register_keras_serializable(package="tfbig")
class RandAugment(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types.
    """Transforms each image in one of several ways, chosen at random, while training.

    Input and output are of the shape `(batch, height, width, channels)`.

    KerasTuner's layer makes the layers of its transforms, and so their variables, in each call.

    Args:
        transforms: Names of KerasTuner: "rotate", "translate_x", "translate_y", "contrast".
        factors: The strength of each, from 0 to 1. An image whose transform has 0 stays as
            it is.
        **kwargs: As for `keras.layers.Layer`.
    """

    def __init__(
        self, transforms: Sequence[str], factors: Sequence[float], **kwargs: object
    ) -> None:
        super().__init__(**kwargs)
        self.transforms = list(transforms)
        self.factors = list(factors)
        self._seeds = keras.random.SeedGenerator()
        self._by_index = {
            i: augment.TRANSFORMS[name](factor)
            for i, (name, factor) in enumerate(zip(self.transforms, self.factors, strict=True))
            if factor
        }

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in self._by_index.values():
            layer.build(input_shape)

    def call(self, inputs: _types.Tensor, training: bool = False) -> _types.Tensor:
        shape = (keras.ops.shape(inputs)[0], 1, 1, 1)
        chosen = keras.random.randint(shape, 0, len(self.transforms), seed=self._seeds)
        outputs = inputs
        for i, layer in self._by_index.items():
            outputs = keras.ops.where(chosen == i, layer(inputs, training=training), outputs)
        return outputs

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def get_config(self) -> _types.Config:
        config: _types.Config = super().get_config()
        return config | {"transforms": self.transforms, "factors": self.factors}


class HyperImageAugment(keras_tuner.applications.HyperImageAugment):  # type: ignore[misc]  # KerasTuner has no types.
    """Searches how images are augmented; the arguments are KerasTuner's."""

    # Of KerasTuner's class.
    def _build_randaug_layers(self, inputs: _types.Tensor, hp: HyperParameters) -> _types.Tensor:
        least, most = self.augment_layers_min, self.augment_layers_max
        names = [name for name, _ in self.transforms]
        outputs = inputs
        for _ in range(hp.Int("augment_layers", least, most, default=least)):
            factors = [
                hp.Float(f"factor_{name}", low, high, default=low)
                for name, (low, high) in self.transforms
            ]
            if any(factors):
                outputs = RandAugment(names, factors)(outputs)
        return outputs
