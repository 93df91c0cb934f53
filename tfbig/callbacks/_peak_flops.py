"""Floating-point operations per second that devices make at most, as their makers publish them.

Of dense matrix products; where a data sheet has figures "with sparsity", half of these. Sources:

- NVIDIA's data sheets "V100", "T4", "A10", "A100", "L4", "H100" and "H200 Tensor Core GPU"
- TPU v2: Wang et al. 2019, "Benchmarking TPU, GPU, and CPU Platforms for Deep Learning"; other
  TPUs: docs.cloud.google.com/tpu/docs, "Key specifications" of each version
"""

from __future__ import annotations

import os
import re

import keras
import tensorflow as tf

from tfbig import _keras

__all__ = ("of_gpu", "of_model", "of_tpu")

# In 10**12 per second, by patterns of TensorFlow's names of GPUs, of which the first that is found
# counts. "tensor_float_32" is what TensorFlow computes float32 in where it may.
_GPUS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"V100S", {"float16": 130.0, "float32": 16.4, "float64": 8.2}),
    (r"V100-SXM", {"float16": 125.0, "float32": 15.7, "float64": 7.8}),
    (r"V100-PCIE", {"float16": 112.0, "float32": 14.0, "float64": 7.0}),
    (r"\bT4\b", {"float16": 65.0, "float32": 8.1}),
    (r"\bA10\b", {"half": 125.0, "tensor_float_32": 62.5, "float32": 31.2}),
    (r"\bA100\b", {"half": 312.0, "tensor_float_32": 156.0, "float32": 19.5, "float64": 19.5}),
    (r"\bL4\b", {"half": 121.0, "tensor_float_32": 60.0, "float32": 30.3}),
    (r"H100 PCIe", {"half": 756.5, "tensor_float_32": 378.0, "float32": 51.0, "float64": 51.0}),
    (
        r"H100 80GB HBM3|NVIDIA H200$",
        {"half": 989.5, "tensor_float_32": 494.5, "float32": 67.0, "float64": 67.0},
    ),
)

# Of what TensorFlow takes for a device, by the beginning of TPU_ACCELERATOR_TYPE, which Google's
# machines set: half a chip up to v3. All products of float32 are of bfloat16 by default.
_TPUS = {
    "v2": 22.5,
    "v3": 61.5,
    "v4": 275.0,
    "v5litepod": 197.0,
    "v5p": 459.0,
    "v6e": 918.0,
}


def of_model(model: keras.Model) -> float | None:
    """Of a device that a model computes on, in the dtype in which it computes; None if unknown."""
    dtype = model.compute_dtype
    if _keras.devices.is_tpu(model.distribute_strategy):
        return of_tpu(os.environ.get("TPU_ACCELERATOR_TYPE", ""), dtype)
    if _keras.devices.is_on_cpu(model.distribute_strategy):
        return None
    gpu = tf.config.list_physical_devices("GPU")[0]
    name = tf.config.experimental.get_device_details(gpu).get("device_name", "")
    return of_gpu(name, dtype, tf.config.experimental.tensor_float_32_execution_enabled())


def of_gpu(name: str, dtype: str, uses_tensor_float_32: bool) -> float | None:
    """Operations per second of a GPU; None if that is not known.

    Args:
        name: TensorFlow's name of it, such as "NVIDIA A100-SXM4-40GB".
        dtype: the dtype of matrix products.
        uses_tensor_float_32: whether products of float32 are computed in TensorFloat-32.
    """
    # A part of a GPU.
    if "MIG" in name:
        return None
    for pattern, figures in _GPUS:
        if re.search(pattern, name):
            names = {
                "float16": ("float16", "half"),
                "bfloat16": ("half",),
                "float32": (("tensor_float_32",) if uses_tensor_float_32 else ()) + ("float32",),
            }.get(dtype, (dtype,))
            found = next((figures[n] for n in names if n in figures), None)
            return None if found is None else found * 1e12
    return None


def of_tpu(kind: str, dtype: str) -> float | None:
    """Operations per second of a core of a TPU, or of a chip from v4 on; None if not known.

    Args:
        kind: a type of Google's, such as "v5litepod-8".
        dtype: the dtype of matrix products.
    """
    found = _TPUS.get(kind.partition("-")[0])
    return None if found is None or dtype not in ("float32", "bfloat16") else found * 1e12
