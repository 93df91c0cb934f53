"""`python -m tfbig.launch` without importing TensorFlow, which takes seconds."""

import pathlib
import runpy
import sys
import types

# The package without what its __init__ imports.
package = types.ModuleType("tfbig")
package.__path__ = [str(pathlib.Path(__file__).parents[2] / "tfbig")]
sys.modules["tfbig"] = package
runpy.run_module("tfbig.launch", run_name="__main__", alter_sys=True)
