"""Lowers a core's program with TensorFlow's kernels for TPUs: with_tensorflow.py DIRECTORY.

Runs where `tensorflow-tpu` is installed. Reads `graph.pb` and `signature.json` in the directory,
and writes `module.bin`: StableHLO in its portable form.
"""

import json
import pathlib
import sys

import tensorflow as tf
from tensorflow.python.eager import context


def main(directory: str) -> None:
    path = pathlib.Path(directory)
    signature = json.loads((path / "signature.json").read_text())
    graph = tf.compat.v1.GraphDef.FromString((path / "graph.pb").read_bytes())
    # The compiler does not find functions that are imported into the graph of a function.
    context.ensure_initialized()
    for function in graph.library.function:
        context.context().add_function_def(function)
    # The arguments replace the placeholders, which TPUs do not know.
    nodes = [node for node in graph.node if node.op != "Placeholder"]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name.split(":")[0].removeprefix("^") for node in nodes for name in node.input}
    arguments, results = signature["arguments"], signature["results"]

    @tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types.
    def update(*values: tf.Tensor) -> list[tf.Tensor]:
        names = [a["tensor"] for a in arguments]
        given = {n: v for n, v in zip(names, values, strict=True) if n.split(":")[0] in used}
        outputs: list[tf.Tensor] = tf.graph_util.import_graph_def(
            graph, input_map=given, return_elements=[r["tensor"] for r in results], name=""
        )
        return outputs

    specs = [tf.TensorSpec(a["shape"], a["dtype"]) for a in arguments]
    lower = update.experimental_get_compiler_ir(*specs)
    (path / "module.bin").write_bytes(lower(stage="stablehlo_serialized", platform_name="TPU"))


if __name__ == "__main__":
    main(*sys.argv[1:])
