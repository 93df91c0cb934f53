"""Models of KerasHub, with random weights: split into micro-batches, their update is the same."""

import inspect

import keras
import numpy as np
import pytest

import tfbig
from tests.combinations import in_turn
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


def roberta():
    backbone = keras_hub.models.RobertaBackbone(**SIZES)
    model = keras_hub.models.RobertaMaskedLM(backbone, preprocessor=None)
    positions = np.tile(np.arange(3), (SAMPLES, 1))
    x = {"token_ids": TOKENS, "padding_mask": MASK, "mask_positions": positions}
    return model, (x, TOKENS[:, :3], MASK[:, 3:6].astype("float64"))


def bart():
    backbone = keras_hub.models.BartBackbone(**SIZES)
    model = keras_hub.models.BartSeq2SeqLM(backbone, preprocessor=None)
    x = {f"{part}_token_ids": TOKENS for part in ("encoder", "decoder")}
    x |= {f"{part}_padding_mask": MASK for part in ("encoder", "decoder")}
    return model, (x, np.roll(TOKENS, -1, axis=1), MASK.astype("float64"))


def vit():
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=8,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    model = keras_hub.models.ViTImageClassifier(backbone, num_classes=CLASSES, preprocessor=None)
    return model, (RNG.normal(size=(SAMPLES, 16, 16, 3)), RNG.integers(0, CLASSES, size=SAMPLES))


def segformer():
    encoder = keras_hub.models.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[1, 1],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=(32, 32, 3),
        hidden_dims=[4, 8],
    )
    backbone = keras_hub.models.SegFormerBackbone(image_encoder=encoder, projection_filters=8)
    model = keras_hub.models.SegFormerImageSegmenter(backbone, num_classes=2, preprocessor=None)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            # In training it sees micro-batches.
            layer.trainable = False
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    y = keras.utils.to_categorical(RNG.integers(0, 2, size=(SAMPLES, 32, 32)), 2)
    return model, (RNG.normal(size=(SAMPLES, 32, 32, 3)), y)


TASKS = (bert, gpt2, roberta, bart, vit, segformer)


def retina_net():
    encoder = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64, 64],
        stackwise_num_blocks=[1, 1, 1],
        stackwise_num_strides=[1, 2, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    backbone = keras_hub.models.RetinaNetBackbone(encoder, min_level=3, max_level=4, use_p5=False)
    return keras_hub.models.RetinaNetObjectDetector(
        backbone, num_classes=CLASSES, preprocessor=None, bounding_box_format="xyxy"
    )


def trained(model, data):
    x, *targets = data
    names = dict(zip(("y", "sample_weight"), targets, strict=False))
    return model.fit(x, **names, batch_size=11, epochs=2, shuffle=False, verbose=0).history


# SegFormer resizes images, which TensorFlow does in float32, whatever the dtype. Adam divides some
# of its gradients, which are as small as that rounding, by themselves.
ONLY_WITH_SGD = (segformer,)
TOLERANCES = {segformer: 1e-7}


def settings(optimizer):
    return {k: v for k, v in optimizer.get_config().items() if k != "name"}


WAYS_TO_COMPILE = {
    "auto": lambda model: model.compile("auto"),
    "as it is": lambda model: None,
    "defaults": lambda model: model.compile(),
    "sgd": lambda model: model.compile(keras.optimizers.SGD(0.1, momentum=0.9)),
}


@in_turn(
    {"make": {make.__name__: make for make in TASKS}, "trains": ["defaults", "sgd"]},
    slow=("segformer", "bart"),
)
# The pooler of BERT and RoBERTa takes no part in a masked language model.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_tasks_keep_their_compile(make, trains):
    keras.utils.set_random_seed(1)
    plain, data = make()
    extended = make()[0]
    for way, compiled in WAYS_TO_COMPILE.items():
        model = tfbig.extend(extended, gradient_accumulation_steps=3)
        assert inspect.signature(model.compile) == inspect.signature(plain.compile)
        for m in (plain, model):
            compiled(m)
        assert type(model.optimizer) is type(plain.optimizer)
        assert settings(model.optimizer) == settings(plain.optimizer)
        if way == trains and (way == "sgd" or make not in ONLY_WITH_SGD):
            check_same_training(model, plain, data, TOLERANCES.get(make, 1e-10))


def check_same_training(model, plain, data, tolerance):
    model.set_weights(plain.get_weights())
    before = plain.get_weights()
    history, plain_history = trained(model, data), trained(plain, data)
    np.testing.assert_allclose(history["loss"], plain_history["loss"], rtol=tolerance)
    assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(plain.get_weights(), before, strict=True))
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 3}, {}], ids=["split", "whole"]
)
def test_the_last_layer_in_chunks(options):
    """The table is that of the first layer, and the default metric is computed in chunks, too."""
    keras.utils.set_random_seed(1)
    plain, data = gpt2()
    model = tfbig.extend(gpt2()[0], head_chunk_size=5, **options)
    for m in (plain, model):
        m.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    check_same_training(model, plain, data, 1e-10)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_attention_in_chunks(make):
    keras.utils.set_random_seed(1)
    plain, data = make()
    options = {"gradient_accumulation_steps": 3, "attention_chunk_size": 5}
    model = tfbig.extend(make()[0], **options)
    for m in (plain, model):
        m.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    check_same_training(model, plain, data, 1e-10)


def llama():
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=4,
        num_query_heads=2,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    return model, gpt2()[1]


def gpt2_of_four_blocks():
    backbone = keras_hub.models.GPT2Backbone(**SIZES | {"num_layers": 4})
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None), gpt2()[1]


def test_layers_that_compute_attention_themselves_have_no_chunks():
    model, data = llama()
    model = tfbig.extend(model, attention_chunk_size=5)
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="has no effect"):
        trained(model, data)


# Llama turns positions in float32, whatever the dtype.
@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(gpt2_of_four_blocks, 1e-10), pytest.param(llama, 1e-6, marks=pytest.mark.slow)],
    ids=["gpt2", "llama"],
)
def test_a_language_model_finds_its_stages(make, tolerance, tmp_path):
    keras.utils.set_random_seed(1)
    plain, data = make()
    pipeline = tfbig.distribute.Pipeline([f"CPU:{i}" for i in range(4)])
    model = tfbig.extend(make()[0], pipeline=pipeline, gradient_accumulation_steps=4)
    for m in (plain, model):
        m.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), plain.loss)
    check_same_training(model, plain, data, tolerance)
    devices = {v.value.device[-1] for v in model.trainable_variables}
    assert devices == set("0123")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert {v.value.device[-1] for v in loaded.variables} == {"0"}
    np.testing.assert_allclose(
        loaded.predict(data[0], verbose=0), model.predict(data[0], verbose=0), atol=1e-10
    )


def test_a_task_whose_class_is_extended_compiles_in_its_constructor():
    plain, data = gpt2()
    cls = tfbig.extend(type(plain))
    model = cls(plain.backbone, preprocessor=None, micro_batch_size=4, loss_scale=8.0)
    assert settings(model.optimizer) == settings(plain.optimizer)
    assert trained(model, data)["loss_scale"] == [8.0, 8.0]


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_a_detector_is_extended_and_not_split():
    keras.config.set_floatx("float32")  # In float64 its own `compute_loss` fails.
    x = RNG.normal(size=(2, 32, 32, 3)).astype("float32")
    boxes = [[2.0, 2.0, 15.0, 15.0], [10.0, 10.0, 30.0, 25.0]]
    y = {"boxes": np.array([boxes] * 2, "float32"), "labels": np.array([[0.0, 1.0], [2.0, 1.0]])}
    histories, weights = [], []
    for wrap in (lambda m: m, tfbig.extend):
        keras.utils.set_random_seed(1)
        model = wrap(retina_net())
        histories.append(model.fit(x, y, batch_size=2, verbose=0, shuffle=False).history)
        weights.append(model.get_weights())
    assert histories[0] == histories[1]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
    split = tfbig.extend(model, micro_batch_size=1)
    with pytest.raises(tfbig.errors.UnsupportedModelError, match="divides by the anchors of all"):
        split.fit(x, y, batch_size=2, verbose=0, shuffle=False)
    for a, b in zip(split.get_weights(), weights[1], strict=True):
        np.testing.assert_array_equal(a, b)


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
