"""The GAN task: two networks with two optimizers, and what judges them."""

import digits_data
import keras
import numpy as np
import pytest
from tasks import adversaries, digit_score

import tfbig


def test_digit_score_wants_certainty_and_variety():
    (images, labels), (held_out, _) = digits_data.load()
    score = digit_score.DigitScore(images, labels)
    random = np.random.default_rng(0)
    assert 8 < score.of(held_out) <= 10
    assert score.of(random.random(held_out.shape)) < 4
    assert score.of(np.repeat(held_out[:1], 100, axis=0)) == pytest.approx(1, abs=1e-6)
    # Of two digits only, no more than 2.
    assert score.of(images[labels < 2]) < 2.2


def adversaries_of(split):
    keras.utils.set_random_seed(0)
    model = adversaries.Adversaries(noise=4, **split)
    model.compile(keras.optimizers.Adam(1e-3))
    return model


@pytest.mark.usefixtures("float64")
def test_adversaries_learn_the_same_however_the_batch_is_split():
    (images, _), _ = digits_data.load()
    results = []
    for split in ({}, {"micro_batch_size": 5}, {"gradient_accumulation_steps": 4}):
        model = adversaries_of(split)
        begun = model.get_weights()
        model.fit(images[:24], batch_size=12, epochs=2, shuffle=False, verbose=0)
        for optimizer in (model.optimizer, model.generator_optimizer):
            assert int(optimizer.iterations.numpy()) == 4
        results.append(model.get_weights())
    assert all(
        not np.array_equal(a, b) for a, b in zip(begun, results[0], strict=True) if a.size > 1
    )
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-10)


def test_a_backup_of_adversaries_holds_both_optimizers(tmp_path):
    (images, _), _ = digits_data.load()

    def fit(model, epochs, *callbacks):
        model.fit(images[:24], batch_size=12, epochs=epochs, verbose=0, callbacks=list(callbacks))
        return model

    whole = fit(adversaries_of({}), 2, tfbig.callbacks.BackupAndRestore(tmp_path / "whole"))
    backup = {"backup_dir": tmp_path / "parts", "delete_checkpoint": False}
    keras.utils.set_random_seed(0)
    fit(adversaries_of({}), 1, tfbig.callbacks.BackupAndRestore(**backup))
    resumed = fit(adversaries_of({}), 2, tfbig.callbacks.BackupAndRestore(**backup))
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6)

    resumed.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(resumed.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(other, one)
