"""Features of sound as a Keras layer."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("tfbig_scripts")
class LogMel(keras.layers.Layer):
    """The log-mel spectrogram of waveforms.

    Each band is normalized to mean 0 and variance 1 over the recording, so that loudness and the
    colour of the noise matter less. The layer computes in at least float32, since in float16 the
    power of a faint sound is 0.

    Args:
        sample_rate: In Hz.
        frame: Samples of a frame.
        hop: Samples from one frame to the next.
        bands: Mel bands.
    """

    def __init__(
        self,
        sample_rate: int,
        frame: int = 256,
        hop: int = 110,
        bands: int = 40,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        # Also if a saved model is loaded under another policy.
        super().__init__(dtype=dtype or keras.config.floatx(), **options)
        self.sample_rate, self.frame, self.hop, self.bands = sample_rate, frame, hop, bands

    def call(self, waveforms: tf.Tensor) -> tf.Tensor:
        spectrum = tf.signal.stft(waveforms, self.frame, self.hop, fft_length=self.frame)
        power = tf.math.real(spectrum) ** 2 + tf.math.imag(spectrum) ** 2
        mel = tf.signal.linear_to_mel_weight_matrix(
            self.bands,
            self.frame // 2 + 1,
            self.sample_rate,
            lower_edge_hertz=80.0,
            upper_edge_hertz=self.sample_rate / 2,
            dtype=power.dtype,
        )
        features = tf.math.log(tf.tensordot(power, mel, 1) + 1e-6)
        mean, variance = tf.nn.moments(features, axes=1, keepdims=True)
        return (features - mean) * tf.math.rsqrt(variance + 1e-6)

    def compute_output_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return shape[0], (shape[1] - self.frame) // self.hop + 1, self.bands

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("sample_rate", "frame", "hop", "bands")}
        return super().get_config() | own
