"""Generative models. Their random numbers come with the data, since random streams differ."""

import keras
import tensorflow as tf
from keras import layers, ops

import tfbig
from tests.zoo import samples
from tests.zoo.program import over_base, program, registered

LATENT = 2


def images_and_noise(rng, n):
    return ({"image": samples.images(rng, n, channels=1), "noise": rng.normal(size=(n, LATENT))},)


@registered
class Sampling(layers.Layer):
    """Adds noise times the standard deviation to a mean, and the divergence to the loss."""

    def call(self, mean, log_variance, noise):
        divergence = 1 + log_variance - ops.square(mean) - ops.exp(log_variance)
        self.add_loss(-0.5 * ops.mean(ops.sum(divergence, axis=1)))
        return mean + ops.exp(0.5 * log_variance) * noise


@program(
    "Keras guide: a variational autoencoder with `add_loss`",
    "a layer adds a scalar mean to the compiled loss",
    data=lambda rng, n: (
        x := {"image": rng.uniform(size=(n, 6)), "noise": rng.normal(size=(n, LATENT))},
        x["image"],
    ),
    compile=lambda: {"loss": "mse"},
    adaptive="adam",
    is_on_replicas=False,
)
def autoencoder_with_added_loss(base, **options):
    x = {"image": keras.Input((6,), name="image"), "noise": keras.Input((LATENT,), name="noise")}
    h = layers.Dense(5, activation="relu")(x["image"])
    z = Sampling()(layers.Dense(LATENT)(h), layers.Dense(LATENT)(h), x["noise"])
    h = layers.Dense(5, activation="relu")(z)
    return base(x, layers.Dense(6, activation="sigmoid")(h), **options)


def encoder():
    x = keras.Input((8, 8, 1))
    h = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(x)
    h = layers.Dense(5, activation="relu")(layers.Flatten()(h))
    return keras.Model(x, [layers.Dense(LATENT)(h), layers.Dense(LATENT)(h)], name="encoder")


def decoder():
    x = keras.Input((LATENT,))
    h = layers.Reshape((4, 4, 2))(layers.Dense(32, activation="relu")(x))
    h = layers.Conv2DTranspose(1, 3, activation="sigmoid", strides=2, padding="same")(h)
    return keras.Model(x, h, name="decoder")


@over_base
def variational_autoencoder(base):
    class VAE(base):
        """A variational autoencoder with its own step, written with tfbig or in plain Keras."""

        def __init__(self, encoder, decoder, **kwargs):
            super().__init__(**kwargs)
            self.encoder, self.decoder = encoder, decoder
            self.total = keras.metrics.Mean(name="total_loss")

        @property
        def metrics(self):
            return [self.total]

        def build(self, shape):
            self.built = True

        def call(self, x):
            mean, log_variance = self.encoder(x["image"])
            return self.decoder(mean + ops.exp(0.5 * log_variance) * x["noise"])

        def loss_of(self, x):
            mean, log_variance = self.encoder(x["image"])
            made = self.decoder(mean + ops.exp(0.5 * log_variance) * x["noise"])
            errors = keras.losses.binary_crossentropy(x["image"], made)
            divergence = 1 + log_variance - ops.square(mean) - ops.exp(log_variance)
            return ops.mean(ops.sum(errors, axis=(1, 2))) - 0.5 * ops.mean(
                ops.sum(divergence, axis=1)
            )

        def train_step(self, data):
            (x,) = data if isinstance(data, tuple) else (data,)
            if issubclass(base, tfbig.Model):
                share = tfbig.accumulate_gradients(
                    self.loss_of,
                    self.trainable_variables,
                    x,
                    gradient_accumulation_steps=self.gradient_accumulation_steps,
                )
                loss = tfbig.apply_gradients(self.optimizer, share).loss
                self.total.update_state(loss)
                return {"total_loss": loss}
            with tf.GradientTape() as tape:
                loss = self.loss_of(x)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            self.total.update_state(loss)
            return {"total_loss": loss}

        def get_config(self):
            networks = {"encoder": self.encoder, "decoder": self.decoder}
            return super().get_config() | keras.saving.serialize_keras_object(networks)

        @classmethod
        def from_config(cls, config):
            for name in ("encoder", "decoder"):
                config[name] = keras.saving.deserialize_keras_object(config[name])
            return cls(**config)

    return VAE


@program(
    "keras.io: a variational autoencoder with its own `train_step`",
    "two networks as constructor arguments, own `train_step` with `accumulate_gradients`",
    data=images_and_noise,
    adaptive="adagrad",
)
def autoencoder_with_step(base, **options):
    return variational_autoencoder(base)(encoder(), decoder(), **options)


@over_base
def adversaries(base):
    class ConditionalGAN(base):
        """A class-conditional generator and discriminator, each with its own optimizer."""

        def __init__(self, discriminator, generator, latent, **kwargs):
            super().__init__(**kwargs)
            self.discriminator, self.generator, self.latent = discriminator, generator, latent
            self.d_optimizer = self.g_optimizer = self.loss_fn = None

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.generator(ops.concatenate([x["noise"], x["class"]], axis=1))

        def compile(self, d_optimizer, g_optimizer, loss_fn):
            super().compile()
            self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn
            self.d_optimizer.build(self.discriminator.trainable_variables)
            self.g_optimizer.build(self.generator.trainable_variables)

        def get_compile_config(self):
            names = ("d_optimizer", "g_optimizer", "loss_fn")
            return {n: keras.saving.serialize_keras_object(getattr(self, n)) for n in names}

        def compile_from_config(self, config):
            self.compile(**keras.saving.deserialize_keras_object(config))

        def judged(self, images, x):
            shape = (1, 8, 8, 1)
            channels = [ops.tile(x["class"][:, i, None, None, None], shape) for i in range(2)]
            return self.discriminator(ops.concatenate([images, *channels], axis=-1))

        def d_loss(self, x):
            real, made = self.judged(x["image"], x), self.judged(self(x), x)
            real = self.loss_fn(ops.ones_like(real), real)
            return real + self.loss_fn(ops.zeros_like(made), made)

        def g_loss(self, x):
            made = self.judged(self(x), x)
            return self.loss_fn(ops.ones_like(made), made)

        def train_step(self, data):
            (x,) = data if isinstance(data, tuple) else (data,)
            return {
                "d_loss": self.update(self.d_loss, self.discriminator, self.d_optimizer, x),
                "g_loss": self.update(self.g_loss, self.generator, self.g_optimizer, x),
            }

        def update(self, loss_of, network, optimizer, x):
            variables = network.trainable_variables
            if issubclass(base, tfbig.Model):
                steps = self.gradient_accumulation_steps
                share = tfbig.accumulate_gradients(
                    loss_of, variables, x, gradient_accumulation_steps=steps
                )
                return tfbig.apply_gradients(optimizer, share).loss
            with tf.GradientTape() as tape:
                loss = loss_of(x)
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return loss

        def get_config(self):
            networks = {"discriminator": self.discriminator, "generator": self.generator}
            networks = keras.saving.serialize_keras_object(networks)
            return super().get_config() | networks | {"latent": self.latent}

        @classmethod
        def from_config(cls, config):
            for name in ("discriminator", "generator"):
                config[name] = keras.saving.deserialize_keras_object(config[name])
            return cls(**config)

    return ConditionalGAN


def images_of_classes(rng, n):
    (x,) = images_and_noise(rng, n)
    return (x | {"class": keras.utils.to_categorical(samples.classes(rng, n, 2), 2)},)


@program(
    "keras.io: a conditional GAN",
    "own `compile` with two optimizers and a loss, two updates in one step",
    data=images_of_classes,
    compile=lambda: {"loss_fn": keras.losses.BinaryCrossentropy(from_logits=True)},
    optimizers=("d_optimizer", "g_optimizer"),
    adaptive="adam",
)
def conditional_gan(base, **options):
    judge = [
        keras.Input((8, 8, 3)),
        layers.Conv2D(4, 3, strides=2, padding="same"),
        layers.LeakyReLU(negative_slope=0.2),
        layers.GlobalMaxPooling2D(),
        layers.Dense(1),
    ]
    maker = [
        keras.Input((LATENT + 2,)),
        layers.Dense(32),
        layers.LeakyReLU(negative_slope=0.2),
        layers.Reshape((4, 4, 2)),
        layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid"),
    ]
    networks = [keras.Sequential(stack) for stack in (judge, maker)]
    return adversaries(base)(*networks, LATENT, **options)
