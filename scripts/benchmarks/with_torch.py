"""Measures a model of benchmark.py in PyTorch with Hugging Face Accelerate, in this process.

The models are those of `models.py`, layer by layer. Started as `python -m benchmarks.with_torch`,
with `scripts` on the path, in an environment without TensorFlow.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from benchmarks import models as sizes
from benchmarks import process


def mlp(units: int = sizes.NARROW, depth: int = 4) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(units, units), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(units, sizes.CLASSES))


def wide() -> nn.Module:
    return mlp(sizes.WIDE)


class Mean(nn.Module):
    """The mean over some axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(self.axes)


def cnn() -> nn.Module:
    layers, channels = [], sizes.COLOURS
    for filters in sizes.FILTERS:
        layers += [nn.Conv2d(channels, filters, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
        channels = filters
    layers.pop()  # The last convolution has no pooling.
    return nn.Sequential(*layers, Mean(2, 3), nn.Linear(channels, sizes.CLASSES))


class Block(nn.Module):
    """A pre-LN transformer block, without dropout."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        width = sizes.WIDTH
        self.causal = causal
        self.norm1 = nn.LayerNorm(width, sizes.EPSILON)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, sizes.EPSILON)
        self.dense = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        y = self.queries_keys_values(self.norm1(x))
        y = y.view(n, length, 3, sizes.HEADS, width // sizes.HEADS).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*y, is_causal=self.causal)
        x = x + self.projection(y.transpose(1, 2).reshape(n, length, width))
        return x + self.dense(self.norm2(x))


class PositionEmbedding(nn.Module):
    """Adds a learned vector for each position."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(0.05 * torch.randn(length, sizes.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.embeddings


def _blocks(causal: bool, count: int = sizes.BLOCKS) -> nn.Module:
    blocks = [Block(causal) for _ in range(count)]
    return nn.Sequential(*blocks, nn.LayerNorm(sizes.WIDTH, sizes.EPSILON))


def gpt(blocks: int = sizes.BLOCKS) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(sizes.TOKENS, sizes.WIDTH),
        PositionEmbedding(sizes.LENGTH),
        _blocks(causal=True, count=blocks),
        nn.Linear(sizes.WIDTH, sizes.TOKENS),
    )


def deep() -> nn.Module:
    return gpt(sizes.DEEP)


class Patches(nn.Module):
    """Embeds the patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(sizes.COLOURS, sizes.WIDTH, sizes.PATCH, sizes.PATCH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).flatten(2).transpose(1, 2)


def vit() -> nn.Module:
    return nn.Sequential(
        Patches(),
        PositionEmbedding((sizes.PIXELS // sizes.PATCH) ** 2),
        _blocks(causal=False),
        Mean(1),
        nn.Linear(sizes.WIDTH, sizes.CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "wide": wide,
    "cnn": cnn,
    "gpt": gpt,
    "vit": vit,
    "deep": deep,
}


def measure(task: process.Task) -> None:
    """Trains and prints the measurement."""
    torch.manual_seed(0)
    torch.set_num_threads(task.threads)
    x, y = map(torch.from_numpy, sizes.data(task.model, task.batch_size))
    if task.model in ("cnn", "vit"):
        x = x.permute(0, 3, 1, 2).contiguous()  # Channels first, as is usual in PyTorch.
    # Slices of tensors, since a DataLoader would add time for each sample.
    batches = list(zip(x.split(task.micro_batch_size), y.split(task.micro_batch_size), strict=True))
    measurement = process.Measurement(task)
    model = MODELS[task.model]()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(
        model.parameters(),
        process.LEARNING_RATE,
        eps=process.EPSILON,
        fused=True,  # Several times as fast on CPU as the default.
    )
    parameters = sum(p.numel() for p in model.parameters())
    measurement.begin()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=task.gradient_accumulation_steps
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(task.batches):
        for inputs, classes in batches:
            with accelerator.accumulate(model):
                outputs = model(inputs)
                # A decoder classifies each token.
                loss = loss_fn(outputs.flatten(0, -2), classes.flatten())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        measurement.end_batch()
    measurement.answer(parameters)


if __name__ == "__main__":
    measure(process.read_task())
