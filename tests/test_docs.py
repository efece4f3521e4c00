"""What README and docs print runs as printed, but for the numbers of steps and trials."""

import inspect
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.report import PAGES, insert_table, make_tables
from sb3_async1step import AsyncOneStepQ
from tests.command_line import call_main, call_zoo
from tests.helpers import DEADLINE

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in str(path)))


def python_examples():
    for path in DOCUMENTS:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), start=1):
            yield pytest.param(code, id=f"{path.relative_to(ROOT)}-{i}")


def read_commands(path):
    """The commands in a page's blocks of shell code, in order, each as a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def shorten(words):
    """The same command with small budgets, and one seed."""
    replaced = {"-n": "400", "--n-trials": "2", "--steps": "400", "--save-freq": "200"}
    words = [replaced.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    words = shlex.split(re.sub(r"--seeds( \d+)+", "--seeds 1", shlex.join(words)))
    if words[:2] == ["sb3-async1step", "train"]:
        # No steps without these; the evaluations would take longer than the training
        words += ["--eval-freq", "-1"] + ([] if "-n" in words else ["-n", "400"])
        # Each of Atari's 128 lanes takes 0.2 seconds to load its game
        words += ["-params", "n_envs:4"] if "--vec-env" in words else []
    if words[:2] == ["sb3-async1step", "enjoy"]:
        words += ["--no-render"] + ([] if "-n" in words else ["-n", "100"])
    if words[:3] == ["python", "-m", "benchmarks.learning"]:
        words += ["--results", "results", "--checkpoints", "2", "--episodes", "1"]
        words += [] if "--steps" in words else ["--steps", "400"]
    return words


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS])
def test_commands(path, tmp_path, monkeypatch):
    # For the processes that they start
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for words in read_commands(path):
        code, output = call(words, tmp_path)
        assert code == 0, f"{shlex.join(words)}\n{output}"


def call(words, folder):
    """Exit code and output of a command; the Zoo's and the benchmarks' run on this process."""
    if words[0] == "make":
        # What make's targets do is seen where they are used; here, that they exist
        words = ["make", "--dry-run", "-C", str(ROOT), *words[1:]]
    elif words[0] == "sb3-async1step":
        return call_zoo(shorten(words), folder)
    elif words[:2] == ["python", "-m"]:
        _, _, module, *options = shorten(words)
        return call_main(import_module(module).main, [module, *options], folder)
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
    return result.returncode, result.stdout + result.stderr


def test_tables_are_those_of_the_results():
    tables = make_tables()
    for page in PAGES:
        text = page.read_text()
        for name, lines in tables.items():
            assert insert_table(text, name, lines) == text, f"{page.name}: `make report` was not run"


@pytest.mark.parametrize("code", python_examples())
def test_python_example(code, tmp_path):
    short, n_calls = re.subn(r"learn\(([\d_]+)", lambda call: f"learn({min(int(call[1]), 500)}", code)
    assert n_calls > 0
    result = subprocess.run(
        [sys.executable, "-c", short],
        cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_parameter_table_names_all_parameters_and_defaults():
    section = (ROOT / "README.md").read_text().split("## Parameters")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    documented = {name.strip("`"): default.strip("`") for names, default, _ in rows for name in names.split(", ")}
    parameters = dict(inspect.signature(AsyncOneStepQ).parameters)
    del parameters["_init_setup_model"]
    assert list(documented) and set(documented) == set(parameters)
    for name, default in documented.items():
        if default not in ("", "as in SB3"):
            assert eval(default) == parameters[name].default
