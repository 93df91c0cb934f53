"""A generator and a discriminator in one model, each with its own optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import layers

import tfbig


@keras.saving.register_keras_serializable("tfbig_scripts")
class Adversaries(tfbig.Model):
    """A generative adversarial network for images of 8x8 pixels.

    An update changes the discriminator and then the generator, each by the whole effective
    batch. The optimizer of `compile` is the discriminator's; the generator has another one with
    the same settings.

    Args:
        noise: Values from which an image is made.

    Reference: Goodfellow et al. 2014 (arXiv:1406.2661), with the non-saturating loss.
    """

    def __init__(self, noise: int, **options: Any) -> None:
        super().__init__(**options)
        self.noise = noise
        self.generator = _generator(noise)
        self.discriminator = _discriminator()
        self.seeds = keras.random.SeedGenerator()
        self.generator_optimizer = None

    def build(self, shape: Any) -> None:
        self.built = True

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.discriminator(images)

    def compile(
        self, optimizer: keras.optimizers.Optimizer, *arguments: Any, **options: Any
    ) -> None:
        super().compile(optimizer, *arguments, **options)
        self.optimizer.build(self.discriminator.trainable_variables)
        self.generator_optimizer = type(optimizer).from_config(optimizer.get_config())
        self.generator_optimizer.build(self.generator.trainable_variables)

    def get_compile_config(self) -> dict[str, Any]:
        return {"optimizer": keras.saving.serialize_keras_object(self.optimizer)}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))

    def train_step(self, data: tf.Tensor | tuple[tf.Tensor, ...]) -> dict[str, tf.Tensor]:
        images = data[0] if isinstance(data, tuple) else data
        # Drawn for the replica's whole share, so that the split does not change the noise.
        noise = keras.random.normal((tf.shape(images)[0], self.noise), seed=self.seeds)
        batch = (images, noise)
        logs = {}
        for name, loss, network, optimizer in (
            ("discriminator", self._discriminator_loss, self.discriminator, self.optimizer),
            ("generator", self._generator_loss, self.generator, self.generator_optimizer),
        ):
            share = tfbig.accumulate_gradients(
                loss,
                network.trainable_variables,
                batch,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
                micro_batch_size=self.micro_batch_size,
                loss_scale=self.loss_scale_state,
            )
            update = tfbig.apply_gradients(optimizer, share, loss_scale=self.loss_scale_state)
            logs[f"{name}_loss"] = update.loss
        return logs

    def _discriminator_loss(self, batch: Sequence[tf.Tensor]) -> tf.Tensor:
        images, noise = batch
        # Labels of 0.9 keep it from certainty, which would leave the generator no gradient.
        real = _cross_entropy(self.discriminator(images, training=True), 0.9)
        made = self.generator(noise, training=True)
        return real + _cross_entropy(self.discriminator(made, training=True), 0.0)

    def _generator_loss(self, batch: Sequence[tf.Tensor]) -> tf.Tensor:
        made = self.generator(batch[1], training=True)
        return _cross_entropy(self.discriminator(made, training=True), 1.0)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"noise": self.noise}


def _cross_entropy(logits: tf.Tensor, label: float) -> tf.Tensor:
    return keras.losses.BinaryCrossentropy(from_logits=True)(
        tf.fill(tf.shape(logits), tf.cast(label, logits.dtype)), logits
    )


def _generator(noise: int) -> keras.Sequential:
    # Not BatchNormalization, whose statistics are those of a micro-batch: the split would change
    # what is learned.
    hidden = [
        layer
        for _ in range(2)
        for layer in (layers.Dense(256), layers.LayerNormalization(), layers.Activation("silu"))
    ]
    pixels = layers.Dense(64, activation="sigmoid", dtype=keras.config.floatx())
    shaped = layers.Reshape((8, 8, 1), dtype=keras.config.floatx())
    return keras.Sequential([keras.Input((noise,)), *hidden, pixels, shaped], name="generator")


def _discriminator() -> keras.Sequential:
    hidden = [layer for _ in range(2) for layer in (layers.Dense(256), layers.LeakyReLU(0.2))]
    logit = layers.Dense(1, dtype=keras.config.floatx())
    return keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), *hidden, logit], name="discriminator"
    )
