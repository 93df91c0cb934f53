"""The documentation is correct: programs run, links work, names and messages exist.

In docs/*.md, every ```python block runs, unless the line before it is `<!-- not run: reason -->`.
The blocks of a page run in order, in one process. In docs/troubleshooting.md, every code span or
text block with a … quotes a message of tfbig, where … stands for what varies.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
import types
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/*.md"))
OTHER_TEXTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "scripts/README.md")
]

NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"\btfbig(?:\.[A-Za-z_]\w*)+")
SPAN = re.compile(r"(`+) ?(.+?) ?\1(?!`)")

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
every_text = pytest.mark.parametrize(
    "path", [*OTHER_TEXTS, *PAGES], ids=lambda path: str(path.relative_to(ROOT))
)


def fences(text):
    """For each block, its language, the 0-based number of its first line, and its lines."""
    lines = text.splitlines()
    begin = None
    for i, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = i
        else:
            yield lines[begin][3:].strip(), begin + 1, lines[begin + 1 : i]
            begin = None
    assert begin is None, f"The block at line {begin + 1} is not closed."


def program(text):
    """The blocks that run, each at its own lines, so that tracebacks show lines of the page."""
    lines = text.splitlines()
    code = [""] * len(lines)
    for language, first, block in fences(text):
        before = lines[first - 2] if first > 1 else ""
        if language == "python" and not NOT_RUN.fullmatch(before):
            code[first : first + len(block)] = block
    return "\n".join(code) + "\n"


def prose(text):
    """A page without its code blocks."""
    lines = text.splitlines()
    for _, first, block in fences(text):
        lines[first : first + len(block)] = [""] * len(block)
    return "\n".join(lines)


def anchors(text):
    """The anchors that GitHub creates for a page's headings."""
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        heading = LINK.sub(lambda m: m[0][1:].split("]")[0], heading)
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def squeezed(text):
    return " ".join(text.split())


def test_there_are_pages():
    # Otherwise the parametrizations would be empty and pass.
    assert {"guide", "troubleshooting"} <= {path.stem for path in PAGES}


# Runs each given file in a forked child, after importing what takes long.
RUNNER = """
import os, runpy, sys, traceback

import keras, tensorflow, tfbig

failed = 0
for file in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.chdir(os.path.dirname(file))
        try:
            runpy.run_path(file)
        except BaseException:
            print("FAILED:", os.path.basename(file), file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


def test_programs_run(tmp_path):
    files = []
    for path in PAGES:
        if "```python" not in path.read_text():
            continue
        file = tmp_path / path.stem / f"{path.stem}.py"
        file.parent.mkdir()
        file.write_text(program(path.read_text()))
        assert file.read_text().strip(), path
        files.append(file)
    missing = [n for n in ("onnx", "onnxruntime", "tf2onnx") if importlib.util.find_spec(n) is None]
    if missing:
        files.remove(tmp_path / "export" / "export.py")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, *files],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[result.stderr.find("FAILED:") :][:5000]
    if missing:
        pytest.skip(f"docs/export.md: {', '.join(missing)} not installed. pip install tfbig[onnx]")


# The time of an epoch and of a step.
SECONDS = re.compile(r"\d+m?s(/step)?")


@pytest.mark.parametrize("removed", ["+", "-"], ids=["before", "after"])
def test_first_program_of_the_readme_prints_what_it_says(removed, tmp_path):
    blocks = list(fences((ROOT / "README.md").read_text()))
    (diff,) = [lines for language, _, lines in blocks if language == "diff"]
    (output,) = [lines for language, _, lines in blocks if language == "text"]
    file = tmp_path / "first.py"
    file.write_text("\n".join(line[1:] for line in diff if not line.startswith(removed)))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, file],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert SECONDS.sub("", result.stdout).split() == SECONDS.sub("", " ".join(output)).split()


@every_page
def test_blocks_say_what_they_are(path):
    text = path.read_text()
    assert {language for language, _, _ in fences(text)} <= {"python", "console", "text"}
    # Elsewhere, the marker would have no effect.
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if "not run:" in line:
            assert NOT_RUN.fullmatch(line), line
            assert lines[i + 1] == "```python", line


@every_text
def test_links_lead_somewhere(path):
    wrong = []
    for target in LINK.findall(prose(path.read_text())):
        url = urllib.parse.urlsplit(target)
        if url.scheme:
            continue
        file = (path.parent / url.path) if url.path else path
        if not file.exists() or (
            url.fragment and url.fragment not in set(anchors(file.read_text()))
        ):
            wrong.append(target)
    assert not wrong


@every_text
def test_names_of_tfbig_exist(path):
    assert not [name for name in set(NAME.findall(path.read_text())) if not exists(name)]


def test_every_canary_is_listed():
    canaries = (ROOT / "tests/keras_defects/canaries_test.py").read_text()
    tests = re.findall(r"^def (test_\w+)", canaries, flags=re.MULTILINE)
    # A name that ends in … stands for all tests that begin with it.
    listed = re.findall(r"`(test_\w+)(…?)`", (ROOT / "docs/keras.md").read_text())
    covered = [
        {test for test in tests if (test.startswith(name) if is_prefix else test == name)}
        for name, is_prefix in listed
    ]
    assert all(covered)
    assert set().union(*covered) == set(tests)


def test_the_architecture_names_modules_that_exist_and_all_of_the_update():
    text = (ROOT / "docs/architecture.md").read_text()
    # Without patterns, such as tests/*_test.py.
    named = set(re.findall(r"(?<![*\w])\w+\.py\b", text))
    files = [*ROOT.glob("tfbig/**/*.py"), *ROOT.glob("tests/**/*.py")]
    assert named <= {file.name for file in files}
    modules = {file.stem: file.read_text() for file in ROOT.glob("tfbig/_update/*.py")}
    assert {f"{module}.py" for module in modules} - named == {"__init__.py"}
    for module, name in re.findall(r"`(\w+)\.(\w+)`", text):
        assert name == "py" or module not in modules or name in modules[module]


def replaced_functions():
    """Names of the functions in Keras and TensorFlow that are tfbig's, and the files of these."""
    importlib.import_module("tfbig")
    for name, module in list(sys.modules.items()):
        if not name.startswith(("keras.src.", "tensorflow.python.")):
            continue
        classes = [v for v in list(vars(module).values()) if inspect.isclass(v)]
        for owner in (module, *(c for c in classes if c.__module__ == name)):
            for attribute, value in list(vars(owner).items()):
                function = value.func if isinstance(value, functools.partial) else value
                if isinstance(function, types.FunctionType):
                    file = pathlib.Path(function.__code__.co_filename)
                    if ROOT / "tfbig" in file.parents:
                        yield attribute, file.name


def test_replaced_functions_are_listed():
    _, section = (ROOT / "docs/keras.md").read_text().split("## Functions that tfbig replaces")
    rows = re.findall(r"^\| (.*`.*) \| (.*`.*) \|$", section, flags=re.MULTILINE)
    listed = {
        (name.split(".")[-1], file)
        for functions, files in rows
        for name in re.findall(r"`([\w.]+)`", functions)
        for file in re.findall(r"`(\w+\.py)`", files)
        # The names of classes only say whose function it is.
        if "." in name or not name[0].isupper()
    }
    # Of several that replace one function, each calls the next: only the last is seen.
    replaced = set(replaced_functions())
    assert len(replaced) > 30
    assert sorted(replaced - listed) == []
    assert {name for name, _ in listed} == {name for name, _ in replaced}
    for name, file in listed:
        assert name in (ROOT / "tfbig" / "_keras" / file).read_text()


def test_names_in_the_source_exist():
    """Above all those in docstrings, from which the API reference is built."""
    text = "\n".join(file.read_text() for file in ROOT.glob("tfbig/**/*.py"))
    assert not [name for name in set(NAME.findall(text)) if not exists(name)]


def exists(name):
    value = importlib.import_module("tfbig")
    for i, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(name.split(".")[:i]))
            except ImportError:
                return False
        value = getattr(value, part)
    return True


@every_text
def test_commands_exist(path):
    """Scripts and modules that the page starts, and their flags."""
    blocks = [squeezed(" ".join(b)) for k, _, b in fences(path.read_text()) if k == "console"]
    spans = [m[2] for m in SPAN.finditer(prose(path.read_text()))]
    for command in [*blocks, *spans]:
        modules = re.findall(r"python -m (tfbig\.\w+)", command)
        scripts = re.findall(r"(?<![\w./])scripts/[\w./]+", command)
        files = [f for m in modules for f in sources_of(m)] + [ROOT / s for s in scripts]
        assert all(file.exists() for file in files), command
        # Scripts share flags, which one module defines.
        only_modules = "\n".join(f.read_text() for f in files if f.is_file())
        known = only_modules if modules and not scripts else all_programs()
        for flag in re.findall(r"(?<!\S)--(?!help)([\w-]+)", command):
            is_foreign = not files and not command.startswith("--")
            assert is_foreign or re.search(rf"(\"|--){flag}\b", known), (flag, command)


def sources_of(module):
    """The file that `python -m` runs, and that with its flags if there is one."""
    path = ROOT / module.replace(".", "/")
    if not path.is_dir():
        return [path.with_suffix(".py")]
    return [path / "__main__.py", *path.glob("_command_line.py")]


@functools.cache
def all_programs():
    files = [f for f in ROOT.glob("scripts/**/*") if f.is_file() and f.suffix != ".npz"]
    files = [f for f in files if "__pycache__" not in f.parts]
    files += [*ROOT.glob("tfbig/*.py"), *ROOT.glob("tfbig/*/__main__.py")]
    files += ROOT.glob("tfbig/*/_command_line.py")
    return "\n".join(file.read_text() for file in files)


@functools.cache
def messages():
    """All strings in the source of tfbig, with … for what is filled in."""
    found = []
    for file in ROOT.glob("tfbig/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append(squeezed("".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(squeezed(node.value))
    return found


def is_message(quoted):
    # The parts between two … occur in one string, in this order.
    parts = [re.escape(part) for part in quoted.split("…")]
    assert max(map(len, parts)) > 12, f"{quoted}: too short to identify a message"
    pattern = re.compile(".*?".join(parts))
    # Most messages lack it, and a search for a pattern takes long.
    longest = max(quoted.split("…"), key=len)
    return any(longest in message and pattern.search(message) for message in messages())


def test_messages_are_those_of_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [squeezed(" ".join(block)) for k, _, block in fences(text) if k == "text"]
    quoted += [m[2] for m in SPAN.finditer(prose(text)) if "…" in m[2]]
    assert len(quoted) > 30
    assert not [q for q in quoted if not is_message(q)]
