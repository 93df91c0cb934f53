"""Programs as people write them: cut or on replicas, they train as in plain Keras.

Each program runs in float64, with a last batch of one sample: whole in plain Keras on one
device, cut into three micro-batches, and cut into two on each of two replicas; with SGD and
with an optimizer that adapts to gradients. A wrong square hides behind SGD, a constant factor
behind most others, though not in their state. Weights, optimizers' variables and history must
agree. Then the cut model is saved, loaded and trained on.

Tracing takes nearly all of the time. So plain Keras runs without, and of cut and replicas one
has SGD and the other the other optimizer, in turn; `--slow` has all.

`TFBIG_STORE_ZOO=1 python -m pytest tests/zoo --slow` stores docs/zoo.md.
"""

import keras
import pytest

from tests.conftest import make_strategy
from tests.zoo import page, program, trained
from tests.zoo.program import PROGRAMS

program.load()

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`gradient_accumulation_steps` is larger"),
    # Layers that make others in the constructor and have no `build`, as most people's. Keras
    # builds them when the loaded model is made.
    pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer"),
    # KerasHub's T5 hands masks to attention that takes them as an argument.
    pytest.mark.filterwarnings(r"ignore:Layer '\w+' \(of type T5MultiHeadAttention\)"),
]

# Three micro-batches of two on one replica, two of up to two on each of two.
STEPS = {"default": 3, "mirrored_2": 2, "mirrored_4": 2}

EXACT = [p for p in PROGRAMS.values() if p.is_exact]
INEXACT = [p for p in PROGRAMS.values() if not p.is_exact]


def each(programs):
    return pytest.mark.parametrize("program", programs, ids=lambda p: p.name)


def deviation(program, optimizer, strategy, directory=None):
    """Of a cut program from plain Keras; after a file too, if there is a directory for it."""
    keras.backend.clear_session()
    plain = trained.plain(program.name, optimizer, directory)
    keras.backend.clear_session()
    options = {"gradient_accumulation_steps": STEPS[strategy]}
    with make_strategy(strategy).scope():
        training = trained.Training(program, optimizer, plain.initial, **options)
        found = training.run().deviation(plain.result)
        if directory is not None:
            training.reload(directory)
            assert training.model.gradient_accumulation_steps == STEPS[strategy]
            found = max(found, training.run_on().deviation(plain.later))
    page.FOUND[program.name][optimizer, strategy] = found
    return found


def turns(program):
    """The optimizers of a program that is cut, and of one on two replicas."""
    optimizers = [program.adaptive, "sgd"]
    return optimizers if list(PROGRAMS).index(program.name) % 2 else optimizers[::-1]


@each(EXACT)
def test_program_trains_as_in_plain_keras(program, tmp_path):
    cut, on_replicas = turns(program)
    found = {
        f"{cut}, cut": deviation(program, cut, "default", tmp_path),
        f"{on_replicas}, 2 replicas": deviation(program, on_replicas, "mirrored_2"),
    }
    assert not {k: d for k, d in found.items() if d > program.tolerance}
