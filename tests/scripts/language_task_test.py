"""The language task: its text, tokens, 5-gram model and decoder."""

import itertools

import keras
import numpy as np
import pytest
from tasks import bits, five_gram, language, standard_library, tokens, transformer

import tfbig

TEXT = "def naïve(x):\n    return x + 1  # ∑\n".encode()


def test_five_gram_probabilities_add_up_to_one():
    documents, (text, *_) = standard_library.documents(20_000, 1_000)
    model = five_gram.FiveGram(documents)
    for length in (0, 1, 3, 40):
        # The cost of one more byte, over all 256 that it may be.
        context = text[:length]
        before = model.bits_per_byte([context]) * length if length else 0.0
        costs = [
            model.bits_per_byte([context + bytes([byte])]) * (length + 1) - before
            for byte in range(256)
        ]
        assert np.sum(2.0 ** -np.array(costs)) == pytest.approx(1, abs=1e-9)


def test_five_gram_learns_what_there_is_to_learn():
    random = np.random.default_rng(0)
    noise = [random.integers(256, size=20_000, dtype="uint8").tobytes() for _ in range(2)]
    # Nothing can be known of noise; a little is lost by believing in what was counted.
    assert 8 <= five_gram.FiveGram(noise[:1]).bits_per_byte(noise[1:]) < 9
    assert five_gram.FiveGram([b"abcd" * 5000]).bits_per_byte([b"abcd" * 100]) < 0.02
    # Four bytes decide the fifth of these, and fewer do not.
    cycle = b"aaaab" * 4000
    assert five_gram.FiveGram([cycle]).bits_per_byte([cycle]) < 0.02


def test_documents_are_split_by_file_and_always_the_same():
    train, held_out = standard_library.documents(100_000, 30_000)
    assert 90_000 < sum(map(len, train)) <= 100_000
    assert 25_000 < sum(map(len, held_out)) <= 30_000
    assert not set(train) & set(held_out)
    assert (train, held_out) == standard_library.documents(100_000, 30_000)
    for text in (*train, *held_out):
        text.decode()  # Cut between characters.


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokens_are_the_bytes_of_the_text(kind):
    documents, _ = standard_library.documents(50_000, 1_000)
    tokenizer = tokens.Bytes() if kind == "bytes" else tokens.BytePairs(documents, 400)
    assert tokenizer.vocabulary == len(tokenizer.byte_lengths) == {"bytes": 258, "bpe": 400}[kind]
    for text in (*documents[:3], TEXT):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded.tolist()) == text
        assert sum(tokenizer.byte_lengths[token] for token in encoded) == len(text)
        assert not {tokens.PADDING, tokens.START} & set(encoded.tolist())
    if kind == "bpe":
        assert len(tokenizer.encode(documents[0])) < 0.6 * len(documents[0])


def test_windows_hold_each_document_once():
    documents = [b"abcdefgh", b"xyz"]
    before, after = language.windows(documents, tokens.Bytes(), 5)
    assert before.shape == after.shape == (3, 5)
    # Cut, but in its order; the second begins a window of its own, and knows nothing of the
    # first.
    text = [tokens.Bytes().decode(row.tolist()) for row in after]
    assert text == [b"abcde", b"fgh", b"xyz"]
    assert before[0, 0] == before[2, 0] == tokens.START
    np.testing.assert_array_equal(before[1, :3], after.ravel()[4:7])
    assert (after == tokens.PADDING).sum() == 4
    np.testing.assert_array_equal(before == tokens.PADDING, after == tokens.PADDING)


@pytest.mark.parametrize("parameters", ["1M", "25M", "1B"])
def test_size_is_about_that_of_the_flag(parameters):
    wanted = language._number(parameters)
    width, depth = language.size(wanted)
    assert width % 32 == 0
    assert 12 * depth * width**2 == pytest.approx(wanted, rel=0.2)


def decoder(length=8, width=32, depth=2, **options):
    return tfbig.Model(*transformer.decoder(258, length, width, depth), **options)


def test_the_decoder_sees_only_what_was_before():
    window = np.arange(2, 10)[None]
    model = decoder()
    whole = model(window).numpy()
    for place in range(8):
        other = window.copy()
        other[0, place] = 77
        changed = np.any(model(other).numpy() != whole, axis=-1)[0]
        assert not changed[:place].any()
        assert changed[place:].all()


def test_the_decoder_knows_where_a_token_stands():
    # The last token sees the same ones, in another order. In a single block nothing but the
    # positions tells.
    model = decoder(depth=1)
    windows = ([2, 3, 4, 5, 6, 7, 8, 9], [4, 3, 2, 5, 6, 7, 8, 9])
    one, other = (model(np.array([window]))[0, 7] for window in windows)
    assert np.abs(one - other).max() > 1e-5


@pytest.mark.usefixtures("float64")
def test_loss_and_metrics_leave_padding_out():
    texts = [b"a few words of text", b"x", b"and so on"]
    before, after = language.windows(texts, tokens.Bytes(), 8)
    lengths = (0, 0, *itertools.repeat(2, 256))
    model = decoder()
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[bits.BitsPerByte(lengths), bits.Perplexity()],
    )
    logits = model.predict(before, verbose=0)
    costs = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, after[..., None], 2)[..., 0]
    mean = costs[after != tokens.PADDING].mean()
    whole = model.evaluate(before, after, batch_size=16, verbose=0, return_dict=True)
    assert whole["loss"] == pytest.approx(mean, rel=1e-10)
    # Batches with more padding count less.
    parts = model.evaluate(before, after, batch_size=2, verbose=0, return_dict=True)
    for logs in (whole, parts):
        assert logs["bits_per_byte"] == pytest.approx(mean / np.log(2) / 2, rel=1e-10)
        assert logs["perplexity"] == pytest.approx(np.exp(mean), rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_a_split_batch_of_padded_text_is_the_whole_batch():
    texts = [b"a few words of text", b"x", b"and so on", b"the end"]
    before, after = language.windows(texts, tokens.Bytes(), 8)
    weights = []
    for size in (None, 1, 2):
        keras.utils.set_random_seed(0)
        model = decoder(micro_batch_size=size)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.5), loss)
        model.fit(before, after, batch_size=len(before), epochs=2, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for others in weights[1:]:
        for one, other in zip(weights[0], others, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-10)


def test_generated_text_follows_what_was_learned():
    before, after = language.windows([b"abcdefgh" * 40], tokens.Bytes(), 16)
    model = decoder(length=16)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(before, after, batch_size=20, epochs=120, verbose=0)
    # More than a window in all.
    (text,) = language.generate(model, [tokens.Bytes().encode(b"abcd")], 20)
    assert tokens.Bytes().decode(text) == b"abcdefgh" * 3
