"""The speech task: voices, recordings and features."""

import numpy as np
import pytest
import tensorflow as tf
from tasks import espeak, log_mel, speech, spoken_words


def test_log_mel_hears_pitch_and_not_loudness():
    time = np.arange(spoken_words.SAMPLES) / spoken_words.SAMPLE_RATE
    layer = log_mel.LogMel(spoken_words.SAMPLE_RATE)
    # Half of the time a tone, so that it stands out from the rest.
    begins = time < 0.4
    bands = []
    for hertz in (300, 1000, 3000):
        noise = 1e-2 * np.random.default_rng(0).standard_normal(len(time))
        sound = np.float32(noise + 0.2 * begins * np.sin(2 * np.pi * hertz * time))
        features = layer(sound[None]).numpy()
        assert features.shape == (1, *layer.compute_output_shape((1, len(sound)))[1:])
        louder = layer(4 * sound[None]).numpy()
        # Up to what is added to powers before the logarithm.
        np.testing.assert_allclose(louder, features, atol=0.02)
        raw = tf.signal.linear_to_mel_weight_matrix(40, 129, spoken_words.SAMPLE_RATE, 80.0, 5512.5)
        bands.append((int(np.argmax(raw[round(hertz / spoken_words.SAMPLE_RATE * 256)])), features))
    for band, features in bands:
        early, late = features[0, :30].mean(0), features[0, 45:].mean(0)
        # The band of the tone is loud for as long as it sounds.
        assert abs(int(np.argmax(early - late)) - band) <= 1


def test_voices_are_known_and_differ():
    speaker = espeak.start()
    said = {}
    for voice in ("en-us", "en-us+f1", "en-us+m3", "en-gb-scotland"):
        speaker.set_voice(voice)
        said[voice] = speaker.say("seven", 175, 50)
        assert len(speaker.say("seven", 300, 50)) < len(said[voice])
    assert len({samples.tobytes() for samples in said.values()}) == 4
    for voice in ("klingon-x", "en-us+nobody", "", "en-us+../f1/x"):
        with pytest.raises(espeak.UnknownVoiceError, match="no voice"):
            speaker.set_voice(voice)


def test_long_words_of_all_voices_fit_into_a_recording():
    speaker = espeak.start()
    for voice in (*speech._VOICES.default, *speech._HELD_OUT_VOICES.default):
        speaker.set_voice(voice)
        for word in ("seven", "zero"):
            length = len(speaker.say(word, spoken_words.Settings.slowest, 50)) / 2
            assert 0.1 * spoken_words.SAMPLE_RATE < length <= spoken_words.SAMPLES, (voice, word)


def test_recordings_are_kept(tmp_path, monkeypatch):
    settings = spoken_words.Settings(["en-us+f1"], ["en+m1", "en+m2"], takes=2)
    kept = spoken_words.recordings(settings, tmp_path)
    for (x, y), voices in zip(kept, (1, 2), strict=True):
        assert x.shape == (2 * voices * len(spoken_words.WORDS), spoken_words.SAMPLES)
        assert x.dtype == "float32"
        assert 0.09 < np.abs(x).max(axis=1).min() <= np.abs(x).max() < 0.91
        np.testing.assert_array_equal(np.bincount(y), 2 * voices)
        # Takes of a word differ.
        assert np.abs(x[0] - x[1]).max() > 0.01

    def read():
        with monkeypatch.context() as context:
            context.setattr(spoken_words, "_synthesise", None)
            return spoken_words.recordings(settings, tmp_path)

    for one, other in zip(kept, read(), strict=True):
        np.testing.assert_array_equal(other[0], one[0])
        np.testing.assert_array_equal(other[1], one[1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TypeError):
        read()
    again = spoken_words.recordings(settings, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    for one, other in zip(again, read(), strict=True):
        np.testing.assert_array_equal(other[0], one[0])
    settings.seed += 1
    with pytest.raises(TypeError):  # Another seed is not there.
        read()
