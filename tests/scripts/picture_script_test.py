"""scripts/picture.py and the picture that is in the repository."""

import struct

import pytest

from tests.scripts.scripts_test import SCRIPTS, run

PICTURE = SCRIPTS / "picture.py"
DRAWN = SCRIPTS.parent / "docs" / "images" / "same_curve.png"


def size(path):
    """Width and height of a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_the_picture_fits_into_a_readme():
    assert size(DRAWN) == (1600, 600)
    assert DRAWN.stat().st_size < 150_000


def test_a_file_that_cannot_be_written_is_refused_before_training(tmp_path):
    done = run(PICTURE, f"--png={tmp_path / 'nowhere' / 'x.png'}", timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("picture.py: --png=")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_picture_is_drawn_from_runs_that_agree(tmp_path):
    # The program fails if a run of tfbig differs from plain Keras by more than rounding errors.
    done = run(PICTURE, f"--png={tmp_path / 'x.png'}", timeout=1100)
    assert done.returncode == 0, done.stderr
    assert size(tmp_path / "x.png") == (1600, 600)
