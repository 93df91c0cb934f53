"""Models of KerasHub, with random weights: cut into micro-batches, their update is the same."""

import keras
import numpy as np
import pytest

import tfbig
from tests.conftest import make_strategy

keras_hub = pytest.importorskip("keras_hub")

pytestmark = pytest.mark.usefixtures("float64")

VOCABULARY, LENGTH, SAMPLES, CLASSES = 50, 12, 16, 3
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, VOCABULARY, size=(SAMPLES, LENGTH))
# Samples of different length: what follows is padding.
MASK = (np.arange(LENGTH) < RNG.integers(4, LENGTH + 1, size=(SAMPLES, 1))).astype("int64")

SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "max_sequence_length": LENGTH,
    "dropout": 0.0,
}


def bert():
    backbone = keras_hub.models.BertBackbone(**SIZES)
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=CLASSES, preprocessor=None, dropout=0.0
    )
    x = {"token_ids": TOKENS, "segment_ids": np.zeros_like(TOKENS), "padding_mask": MASK}
    return model, (x, RNG.integers(0, CLASSES, size=SAMPLES))


def gpt2():
    backbone = keras_hub.models.GPT2Backbone(**SIZES)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    x = {"token_ids": TOKENS, "padding_mask": MASK}
    # The next token; the weights leave padding out.
    return model, (x, np.roll(TOKENS, -1, axis=1), np.roll(MASK, -1, axis=1) * MASK)


@pytest.mark.parametrize(
    ("make", "strategy"), [(bert, "default"), (gpt2, "default"), (gpt2, "mirrored_2")]
)
def test_update_is_that_of_the_whole_batch(make, strategy):
    def compiled(model):
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=["accuracy"],
        )
        return model

    keras.utils.set_random_seed(1)
    want, data = make()
    with make_strategy(strategy).scope():
        got = compiled(tfbig.extend(make()[0], gradient_accumulation_steps=4))
    got.set_weights(want.get_weights())
    before = want.get_weights()
    compiled(want)
    x, *targets = data
    names = dict(zip(("y", "sample_weight"), targets, strict=False))
    for model in (want, got):
        model.fit(x, **names, batch_size=SAMPLES, epochs=2, shuffle=False, verbose=0)
    assert not np.allclose(want.get_weights()[0], before[0])
    for a, b in zip(got.get_weights(), want.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
