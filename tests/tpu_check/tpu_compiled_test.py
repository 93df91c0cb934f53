"""The TPU compiler's output: requesting, parsing and reporting it. Nothing is compiled."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tfbig import errors, tpu_check
from tfbig.tpu_check import environments, hlo, lowering, report

SLICE = tpu_check.Slice.parse("v5e:2x2")

# XLA's format, abridged.
HLO = """HloModule a, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%unused (a: f32[8]) -> f32[8] {
  ROOT %all-reduce.9 = f32[8]{0} all-reduce(%a), to_apply=%region_0.1
}

%called.2 (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.3 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%region_0.1
}

%body.3 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%t), kind=kLoop, calls=%called.2
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%i, %fusion.1)
}

%condition.4 (t: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%branch.5 (t: f32[8]) -> bf16[4] {
  ROOT %all-gather-start.1 = (bf16[2]{0:T(4,1)}, bf16[4]{0:T(4,1)}) all-gather-start(%t)
}

%branch.6 (t: f32[8]) -> bf16[4] {
  ROOT %zero = bf16[4]{0} broadcast(%c)
}

ENTRY %main.7 (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0:T(128)}) while(%t), condition=%condition.4, body=%body.3
  %conditional.1 = bf16[4]{0} conditional(%p, %x, %x), branch_computations={%branch.5, %branch.6}
  %all-reduce.1 = (f32[3,4]{1,0:T(4,128)}, f32[5]{0}, /*index=2*/pred[2]{0}) all-reduce(%x, %y)
  ROOT %copy = f32[8]{0} copy(%x)
}
"""


def test_collectives_and_their_positions():
    found = {c.name: c for c in hlo.collectives(HLO)}
    assert sorted(found) == ["all-gather-start.1", "all-reduce.1", "all-reduce.3"]
    one = found["all-reduce.1"]
    assert (one.kind, one.arrays, one.bytes, one.inside) == ("all-reduce", 3, 4 * 17 + 2, ())
    assert found["all-reduce.3"].inside == ("loop",)
    gather = found["all-gather-start.1"]
    assert (gather.kind, gather.bytes, gather.inside) == ("all-gather", 8, ("conditional",))


@pytest.mark.parametrize(
    ("instruction", "arrays", "size"),
    [
        ("((f32[2]{0}, f32[3,2]{1,0}), (f32[4]{0}, f32[6,2]{1,0})) all-gather-start(", 2, 64),
        ("(f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(", 1, 8),
        ("(f32[2]{0}, f32[3]{0}) all-reduce-start(", 2, 20),
        ("f32[2]{0} all-reduce-start(", 1, 8),
    ],
)
def test_operands_of_asynchronous_collectives_are_not_counted(instruction, arrays, size):
    (found,) = hlo.collectives(f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  %a = {instruction}%x)\n}}")
    assert (found.arrays, found.bytes) == (arrays, size)


def memory(**sizes):
    sizes = dict.fromkeys(("arguments", "results", "shared", "temporaries", "code"), 0) | sizes
    return lowering.Memory(**sizes)


def test_memory_shared_by_results_and_arguments_counts_once():
    sizes = memory(arguments=10, results=7, shared=6, temporaries=100, code=1000)
    assert sizes.total == 1111


def test_report_of_a_compiled_program():
    outcome = lowering.Compiled(
        None,
        memory(arguments=2 * 10**9, temporaries=6 * 10**9),
        [hlo.Collective("all-reduce.1", "all-reduce", 12, 184, ())],
    )
    text = "\n".join(report.compiled(outcome, SLICE))
    assert outcome.errors() == []
    assert text.startswith("by the TPU compiler for v5e, 4 cores")
    assert "1 all-reduce of 12 arrays, 184 B from each core per update" in text
    assert "estimate per core: 8 GB of 16 GB of HBM, 50%" in text
    assert "runs on" not in text


def test_an_exchange_in_a_loop_is_an_error():
    outcome = lowering.Compiled(None, memory(), hlo.collectives(HLO))
    assert len(outcome.errors()) == 2
    assert "all-reduce 'all-reduce.3' is inside a loop" in " ".join(outcome.errors())
    assert "is inside a conditional" in "\n".join(report.compiled(outcome, SLICE))


def test_report_of_a_rejected_program():
    outcome = lowering.Compiled("UNIMPLEMENTED: no such thing")
    assert outcome.errors() == ["the compiler rejects it: UNIMPLEMENTED: no such thing"]
    (line,) = report.compiled(outcome, SLICE)
    assert line == "no: the TPU compiler for v5e rejects it: UNIMPLEMENTED: no such thing"


@pytest.mark.parametrize(
    ("limit", "share", "largest"),
    [(0, 64, None), (1, 64, 1), (7, 64, 4), (64, 64, 64), (999, 48, 48), (40, 48, 32), (1, 1, 1)],
)
def test_the_largest_micro_batch_that_fits(limit, share, largest):
    """Memory grows with samples; the compiler rejects more than twice the limit."""

    def compiled_with(size):
        tried.append(size)
        if size > 2 * limit:
            return lowering.Compiled("RESOURCE_EXHAUSTED")
        over = SLICE.chip.hbm * (size > limit)
        return lowering.Compiled(None, memory(temporaries=size + over))

    tried: list[int] = []
    found = lowering.largest_that_fits(compiled_with, share, SLICE)
    fitting = [size for size, outcome in found.items() if outcome.fits(SLICE.chip)]
    assert max(fitting, default=None) == largest
    assert len(tried) == len(set(tried)) <= 3
    text = "\n".join(report.largest(found, share, SLICE))
    assert (f"up to {largest}," if largest else "no micro-batch") in text
    # Known sizes are not compiled again.
    before = len(tried)
    lowering.largest_that_fits(compiled_with, share, SLICE, found)
    assert len(tried) == before


@pytest.mark.parametrize(("known", "limit", "largest"), [(24, 30, 16), (128, 64, 64)])
def test_known_sizes_are_reported_like_tried_ones(known, limit, largest):
    """A known size that is no candidate is left out; one above the share counts as the share."""

    def compiled_with(size):
        tried.append(size)
        return lowering.Compiled(None, memory(temporaries=2 * SLICE.chip.hbm * (size > limit)))

    tried: list[int] = []
    fitting = lowering.Compiled(None, memory())
    found = lowering.largest_that_fits(compiled_with, 64, SLICE, {known: fitting})
    assert max(n for n, outcome in found.items() if outcome.fits(SLICE.chip)) == largest
    assert set(found) <= {2**i for i in range(7)}
    assert 64 not in tried


@pytest.fixture
def external(tmp_path, monkeypatch):
    """Returns a function that runs the text of a program as if in another environment."""
    monkeypatch.setattr(environments, "_EXTERNAL", tmp_path)
    monkeypatch.setattr(environments.Environments, "python", lambda self, program: sys.executable)
    monkeypatch.setattr(environments.time, "sleep", lambda seconds: None)
    # No other test shares this test's locks.
    monkeypatch.setattr(environments.tempfile, "gettempdir", lambda: str(tmp_path))

    def run(text, *arguments, **options):
        (tmp_path / "program.py").write_text(text)
        environments.Environments(tmp_path).run("program", *arguments, **options)

    return run


def test_the_cause_of_a_failure_is_reported(external):
    with pytest.raises(environments.ExternalError, match=r"ValueError: no such op 'X'") as caught:
        external("print('noise')\nraise ValueError(\"no such op 'X'\")")
    assert "Traceback" in caught.value.output
    assert "Traceback" not in str(caught.value)


def test_a_hanging_program_is_killed(external):
    with pytest.raises(environments.ExternalError, match="more than 1 s"):
        external("import time; time.sleep(60)", timeout=1)


def test_retries_while_libtpu_is_in_use(external, tmp_path):
    text = (
        "import pathlib, sys\npath = pathlib.Path(sys.argv[1])\n"
        "path.write_text(path.read_text() + 'x' if path.exists() else 'x')\n"
        "sys.exit('see /tmp/libtpu_lockfile' if len(path.read_text()) < 3 else 0)"
    )
    external(text, tmp_path / "tries")
    assert (tmp_path / "tries").read_text() == "xxx"


@pytest.mark.parametrize("is_in_use", [True, False])
def test_libtpu_in_use_is_not_a_rejection(tmp_path, is_in_use):
    class Failing:
        def run(self, *_):
            said = "The TPU is already in use by process 7" if is_in_use else "no such op"
            raise environments.ExternalError("failed: JaxRuntimeError: ABORTED", said)

    lowered = lowering.Lowered(tmp_path, None, Failing())
    if is_in_use:
        with pytest.raises(environments.ExternalError, match="ABORTED"):
            lowered.compile(SLICE)
    else:
        assert lowered.compile(SLICE).message == "ABORTED"


def test_files_preserve_bfloat16(tmp_path):
    class Copying:
        def run(self, program, command, directory, cores, inputs, outputs):
            outputs.write_bytes(inputs.read_bytes())

    given = np.ones((4, 2), tf.bfloat16.as_numpy_dtype)
    (got,) = lowering.Lowered(tmp_path, None, Copying()).run([given])
    assert got.dtype == given.dtype
    np.testing.assert_array_equal(got, given)


def test_other_failures_are_not_retried(external, tmp_path):
    with pytest.raises(environments.ExternalError):
        external("import sys; open(sys.argv[1], 'a').write('x'); 1 / 0", tmp_path / "tries")
    assert (tmp_path / "tries").read_text() == "x"


def test_an_environment_that_cannot_be_created(tmp_path, monkeypatch):
    def install(command, **_):
        done = "pip" in command
        return subprocess.CompletedProcess(command, done, "", "ERROR: no such version\nhint")

    monkeypatch.setattr(environments.subprocess, "run", install)
    made = environments.Environments(tmp_path / "new")
    with pytest.raises(
        environments.UnavailableError, match="cannot be created: ERROR: no such versi"
    ):
        made.python("with_jax")
    # A second attempt must not find a partial installation.
    assert not (tmp_path / "new" / "jax").exists()


def test_an_environment_is_created_once(tmp_path, monkeypatch):
    commands = []

    def install(command, **_):
        commands.append(command)
        (tmp_path / "jax/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "jax/bin/python").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", install)
    made = environments.Environments(tmp_path)
    assert made.python("with_jax") == made.python("with_jax") == tmp_path / "jax/bin/python"
    assert len(commands) == 2
    assert "libtpu==0.0.42.1" in commands[1]
    # A different version is installed anew.
    monkeypatch.setitem(environments.PROGRAMS, "with_jax", ("jax==0.11",))
    made.python("with_jax")
    assert len(commands) == 4
    # The interpreter is gone, as after an upgrade of Python.
    (tmp_path / "jax/bin/python").unlink()
    (tmp_path / "jax/bin/python").symlink_to(tmp_path / "none")
    made.python("with_jax")
    assert len(commands) == 6


def test_an_interpreter_that_does_not_start(tmp_path, external, monkeypatch):
    monkeypatch.setattr(environments.Environments, "python", lambda *_: tmp_path / "none")
    with pytest.raises(environments.UnavailableError, match="none cannot be started"):
        external("")


def test_an_existing_environment_needs_no_lock(tmp_path):
    (tmp_path / "jax/bin").mkdir(parents=True)
    (tmp_path / "jax/bin/python").touch()
    (tmp_path / "jax/installed.txt").write_text("\n".join(environments.PROGRAMS["with_jax"]))
    assert environments.Environments(tmp_path).python("with_jax").exists()
    assert not (tmp_path / "lock").exists()


def test_another_user_s_lock_is_only_read(external, tmp_path, monkeypatch):
    lock, opened = tmp_path / "tfbig_tpu_check.lock", os.open
    lock.touch()

    def refusing(path, flags, *arguments, **options):
        if path == lock and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(environments.os, "open", refusing)
    external(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert (tmp_path / "ran").exists()


def test_a_lock_that_cannot_be_opened(external, tmp_path):
    (tmp_path / "tfbig_tpu_check.lock").mkdir()
    with pytest.raises(environments.UnavailableError, match="lock file must be readable"):
        external("")


def test_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.TfbigError, match="cannot be created"):
        environments.Environments(tmp_path / "file" / "new").python("with_jax")
