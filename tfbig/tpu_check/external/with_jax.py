"""Compiles a lowered program for absent TPUs, or runs it on the CPU.

    with_jax.py compile DIRECTORY TOPOLOGY CORES
    with_jax.py run DIRECTORY CORES INPUTS OUTPUTS

Runs where JAX and libtpu are installed. Reads `module.bin` and `signature.json` in the directory.
`compile` writes `optimized.hlo` and `memory.json`. `run` reads the arguments of all cores from
INPUTS, an .npz file of arrays of shape `(cores, ...)` named by index, and writes the results to
OUTPUTS in the same form.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

# Before JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # There is no Google Cloud machine to ask.
if sys.argv[1] == "run":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[3]}"

import jax
import numpy as np
import numpy.typing as npt
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies
from jax.extend.mlir.dialects import stablehlo

# `Any`: JAX is installed where this program runs, not where mypy does, and these are private.
Module: TypeAlias = Any
Device: TypeAlias = Any
CompileOptions: TypeAlias = Any

# `Any`: of any dtype.
Array: TypeAlias = npt.NDArray[Any]


def read_module(directory: pathlib.Path) -> Module:
    return stablehlo.deserialize_portable_artifact(
        ir.Context.current, (directory / "module.bin").read_bytes()
    )


def donate(module: Module, signature: Mapping[str, Any]) -> None:  # `Any`: of JSON.
    """Lets assignments overwrite variables, as TensorFlow does on TPUs."""
    (main,) = (
        op for op in module.body.operations if getattr(op, "name", None) and op.name.value == "main"
    )
    attributes = list(main.arg_attrs) if main.arg_attrs else []
    attributes = attributes or [ir.DictAttr.get({}) for _ in main.arguments]
    for index, result in enumerate(signature["results"]):
        if result["argument"] is not None:
            alias = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), index)
            attributes[result["argument"]] = ir.DictAttr.get({"tf.aliasing_output": alias})
    main.arg_attrs = ir.ArrayAttr.get(attributes)


def options_for(devices: Sequence[Device]) -> CompileOptions:
    """Returns options for one program with a replica on each device, and no partitioning."""
    options = compiler.get_compile_options(
        len(devices), 1, device_assignment=[device.id for device in devices]
    )
    options.executable_build_options.use_spmd_partitioning = False
    options.executable_build_options.use_shardy_partitioner = False
    return options


def compile_module(directory: pathlib.Path, topology: str, cores: str) -> None:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = description.devices[: int(cores)]
    signature = json.loads((directory / "signature.json").read_text())
    with mlir.make_ir_context():
        module = read_module(directory)
        donate(module, signature)
        executable = devices[0].client.compile(
            module,
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options_for(devices),
        )
    (directory / "optimized.hlo").write_text(executable.hlo_modules()[0].to_string())
    memory = executable.get_compiled_memory_stats()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "shared": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    (directory / "memory.json").write_text(json.dumps(sizes))


def run_module(directory: pathlib.Path, cores: str, inputs: str, outputs: str) -> None:
    devices = jax.devices("cpu")[: int(cores)]
    with mlir.make_ir_context():
        executable = devices[0].client.compile_and_load(
            read_module(directory),
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options_for(devices),
        )
    # JAX is told that the arrays are replicated, and does not check: each device has its own.
    mesh = jax.sharding.Mesh(devices, ["cores"])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_devices(values: Array) -> jax.Array:
        copies = [jax.device_put(v, d) for v, d in zip(values, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(copies[0].shape, everywhere, copies)

    def with_dtype(array: Array) -> Array:
        # A numpy file loses the dtype bfloat16, the only one here that numpy lacks.
        return array.view(jax.numpy.bfloat16) if array.dtype.kind == "V" else array

    stored = np.load(inputs)
    arguments = [on_devices(with_dtype(stored[str(i)])) for i in range(len(stored.files))]
    results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    # `Any`: `savez` has other keyword arguments, too.
    arrays: dict[str, Any] = {str(i): np.stack(copies) for i, copies in enumerate(results)}
    np.savez(outputs, **arrays)


def main(command: str, directory: str, *arguments: str) -> None:
    if command == "compile":
        compile_module(pathlib.Path(directory), *arguments)
    else:
        run_module(pathlib.Path(directory), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
