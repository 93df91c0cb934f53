"""A generator and a discriminator in one model, each with an optimizer of its own."""

import keras
import tensorflow as tf
from keras import layers

import tfbig


@keras.saving.register_keras_serializable("tfbig_scripts")
class Adversaries(tfbig.Model):
    """A generative adversarial network for images of 8x8 pixels.

    An update is one of the discriminator and then one of the generator, each of the whole
    effective batch. The optimizer of `compile` is the discriminator's; the generator has
    another with the same settings.

    Args:
        noise: int, values from which an image is made.

    Reference: Goodfellow et al. 2014 (arXiv:1406.2661), with the loss that does not saturate.
    """

    def __init__(self, noise, **options):
        super().__init__(**options)
        self.noise = noise
        self.generator = _generator(noise)
        self.discriminator = _discriminator()
        self.seeds = keras.random.SeedGenerator()
        self.generator_optimizer = None

    def build(self, shape):
        self.built = True

    def call(self, images):
        return self.discriminator(images)

    def compile(self, optimizer, *arguments, **options):
        super().compile(optimizer, *arguments, **options)
        self.optimizer.build(self.discriminator.trainable_variables)
        self.generator_optimizer = type(optimizer).from_config(optimizer.get_config())
        self.generator_optimizer.build(self.generator.trainable_variables)

    def get_compile_config(self):
        return {"optimizer": keras.saving.serialize_keras_object(self.optimizer)}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def train_step(self, data):
        images = data[0] if isinstance(data, tuple) else data
        # Drawn for the whole share, so that the cut does not change which noise it is.
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

    def _discriminator_loss(self, batch):
        images, noise = batch
        # Labels of 0.9 keep it from being certain, which would leave no gradient to learn from.
        real = _cross_entropy(self.discriminator(images, training=True), 0.9)
        made = self.generator(noise, training=True)
        return real + _cross_entropy(self.discriminator(made, training=True), 0.0)

    def _generator_loss(self, batch):
        made = self.generator(batch[1], training=True)
        return _cross_entropy(self.discriminator(made, training=True), 1.0)

    def get_config(self):
        return super().get_config() | {"noise": self.noise}


def _cross_entropy(logits, label):
    return keras.losses.BinaryCrossentropy(from_logits=True)(
        tf.fill(tf.shape(logits), tf.cast(label, logits.dtype)), logits
    )


def _generator(noise):
    # LayerNormalization rather than BatchNormalization, whose statistics are those of a
    # micro-batch: the cut would change what is learned.
    hidden = [
        layer
        for _ in range(2)
        for layer in (layers.Dense(256), layers.LayerNormalization(), layers.Activation("silu"))
    ]
    pixels = layers.Dense(64, activation="sigmoid", dtype=keras.config.floatx())
    shaped = layers.Reshape((8, 8, 1), dtype=keras.config.floatx())
    return keras.Sequential([keras.Input((noise,)), *hidden, pixels, shaped], name="generator")


def _discriminator():
    hidden = [layer for _ in range(2) for layer in (layers.Dense(256), layers.LeakyReLU(0.2))]
    logit = layers.Dense(1, dtype=keras.config.floatx())
    return keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), *hidden, logit], name="discriminator"
    )
