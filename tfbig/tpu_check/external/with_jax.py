"""Compiles a lowered program for TPUs that are not there, or runs it on the CPU.

    with_jax.py compile DIRECTORY TOPOLOGY CORES
    with_jax.py run DIRECTORY CORES INPUTS OUTPUTS

To be run where JAX and libtpu are installed. Reads `module.bin` and `signature.json` in the
directory. `compile` writes `optimized.hlo` and `memory.json`. `run` reads the arguments of all
cores from INPUTS, an .npz file of arrays `(cores, ...)` named by index, and writes the results
into OUTPUTS.
"""

import json
import os
import pathlib
import sys
from typing import Any

# Before JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # There is no machine of Google's to be asked.
if sys.argv[1] == "run":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[3]}"

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies
from jax.extend.mlir.dialects import stablehlo


def read_module(directory):
    return stablehlo.deserialize_portable_artifact(
        ir.Context.current, (directory / "module.bin").read_bytes()
    )


def donate(module, signature):
    """Has variables overwritten by what is assigned to them, as TensorFlow does on TPUs."""
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


def options_for(devices):
    """One program, a replica of it on each device, and nothing partitioned."""
    options = compiler.get_compile_options(
        len(devices), 1, device_assignment=[device.id for device in devices]
    )
    options.executable_build_options.use_spmd_partitioning = False
    options.executable_build_options.use_shardy_partitioner = False
    return options


def compile_module(directory, topology, cores):
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = described.devices[: int(cores)]
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


def run_module(directory, cores, inputs, outputs):
    devices = jax.devices("cpu")[: int(cores)]
    with mlir.make_ir_context():
        executable = devices[0].client.compile_and_load(
            read_module(directory),
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options_for(devices),
        )
    # Said to be the same everywhere, which nobody looks at: each device has an array of its own.
    mesh = jax.sharding.Mesh(devices, ["cores"])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_devices(values):
        copies = [jax.device_put(v, d) for v, d in zip(values, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(copies[0].shape, everywhere, copies)

    def known(array):
        # A file of numpy forgets what bfloat16 is, the one kind that numpy does not know here.
        return array.view(jax.numpy.bfloat16) if array.dtype.kind == "V" else array

    given = np.load(inputs)
    arguments = [on_devices(known(given[str(i)])) for i in range(len(given.files))]
    results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    arrays: dict[str, Any] = {str(i): np.stack(copies) for i, copies in enumerate(results)}
    np.savez(outputs, **arrays)


def main(command, directory, *arguments):
    if command == "compile":
        compile_module(pathlib.Path(directory), *arguments)
    else:
        run_module(pathlib.Path(directory), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
