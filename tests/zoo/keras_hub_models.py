"""Models of KerasHub, tiny and with random weights."""

import keras
import pytest

from tests.zoo import samples
from tests.zoo.program import program

LENGTH, VOCABULARY = 6, 12
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 4,
    "intermediate_dim": 6,
}


def models():
    """KerasHub's models. Without KerasHub, the test of a program is skipped."""
    return pytest.importorskip("keras_hub").models


def sentences(rng, n, prefix=""):
    x = samples.tokens(rng, n, LENGTH, VOCABULARY)
    return {f"{prefix}token_ids": x, f"{prefix}padding_mask": (x > 0).astype("int32")}


def continuations(rng, n):
    """Inputs of a causal language model, the next tokens, and weights that exclude padding."""
    x = sentences(rng, n)
    y = samples.next_tokens(x["token_ids"])
    return x, y, (y > 0).astype("float64")


def translations(rng, n):
    x = sentences(rng, n, "encoder_") | sentences(rng, n, "decoder_")
    y = samples.next_tokens(x["decoder_token_ids"])
    return x, y, (y > 0).astype("float64")


def cross_entropy():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"loss": loss, "weighted_metrics": ["accuracy"]}


@program(
    "KerasHub: `BertTextClassifier`",
    "the task's own `compile`; token, position and segment tables",
    data=lambda rng, n: (
        (x := sentences(rng, n)) | {"segment_ids": (x["token_ids"] > 5).astype("int32")},
        samples.classes(rng, n),
    ),
    compile=lambda: {"loss": "auto", "metrics": "auto"},
    adaptive="adam",
    by="extend model",
    is_on_replicas=False,
)
def bert():
    backbone = models().BertBackbone(**SIZES, max_sequence_length=LENGTH, dropout=0.0)
    return models().BertTextClassifier(backbone, 3, preprocessor=None, dropout=0.0)


@program(
    "KerasHub: `GPT2CausalLM`",
    "the task's own `compile`; tied head, position table, token weights",
    data=continuations,
    compile=lambda: {"loss": "auto", "weighted_metrics": "auto"},
    adaptive="rmsprop",
    is_on_replicas=False,
    by="extend model",
)
def gpt2():
    backbone = models().GPT2Backbone(**SIZES, max_sequence_length=LENGTH, dropout=0.0)
    return models().GPT2CausalLM(backbone, preprocessor=None)


@program(
    "KerasHub: `GemmaCausalLM`",
    "tied head, rotary positions, one key head for two query heads",
    data=continuations,
    compile=cross_entropy,
    adaptive="adamw",
    tolerance=1e-6,
    note="KerasHub computes rotary positions and normalization in float32",
    by="extend model",
    is_on_replicas=False,
)
def gemma():
    sizes = {k: v for k, v in SIZES.items() if k != "num_heads"}
    backbone = models().GemmaBackbone(**sizes, num_query_heads=2, num_key_value_heads=1, head_dim=4)
    return models().GemmaCausalLM(backbone, preprocessor=None)


@program(
    "KerasHub: `LlamaCausalLM`",
    "separate head, rotary positions",
    data=continuations,
    compile=cross_entropy,
    adaptive="adagrad",
    tolerance=1e-6,
    note="KerasHub computes rotary positions and normalization in float32",
    by="extend model",
    is_on_replicas=False,
)
def llama():
    sizes = {k: v for k, v in SIZES.items() if k != "num_heads"}
    backbone = models().LlamaBackbone(**sizes, num_query_heads=2, num_key_value_heads=1)
    return models().LlamaCausalLM(backbone, preprocessor=None)


@program(
    "KerasHub: `BartSeq2SeqLM`",
    "the task's own `compile`; encoder and decoder positions, tied head",
    data=translations,
    compile=lambda: {"loss": "auto", "weighted_metrics": "auto"},
    adaptive="muon",
    by="extend model",
    is_on_replicas=False,
)
def bart():
    backbone = models().BartBackbone(**SIZES, max_sequence_length=LENGTH, dropout=0.0)
    return models().BartSeq2SeqLM(backbone, preprocessor=None)


@program(
    "KerasHub: `ViTImageClassifier`",
    "class token, position table",
    data=lambda rng, n: (samples.images(rng, n), samples.classes(rng, n)),
    compile=lambda: {"loss": "auto", "metrics": "auto"},
    adaptive="adam",
    by="extend model",
    is_on_replicas=False,
)
def vit():
    backbone = models().ViTBackbone(
        (8, 8, 3), patch_size=4, num_layers=1, num_heads=2, hidden_dim=4, mlp_dim=6
    )
    return models().ViTImageClassifier(backbone, 3, preprocessor=None)


@program(
    "KerasHub: `WhisperBackbone` with a head",
    "audio and text, convolutions, fixed and learned positions",
    data=lambda rng, n: (
        {"encoder_features": rng.normal(size=(n, 2 * LENGTH, 5))}
        | (x := sentences(rng, n, "decoder_")),
        samples.next_tokens(x["decoder_token_ids"]),
    ),
    compile=cross_entropy,
    adaptive="adam",
    is_on_replicas=False,
)
def whisper(base, **options):
    backbone = models().WhisperBackbone(
        **SIZES,
        num_mels=5,
        max_encoder_sequence_length=2 * LENGTH,
        max_decoder_sequence_length=LENGTH,
    )
    h = keras.layers.Dense(VOCABULARY)(backbone.output["decoder_sequence_output"])
    return base(backbone.input, h, **options)
