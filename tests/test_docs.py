"""The examples in README and docs run as printed, but for the number of steps."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_async1step import AsyncOneStepQ

ROOT = Path(__file__).parent.parent


def python_examples():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), start=1):
            yield pytest.param(code, id=f"{path.relative_to(ROOT)}-{i}")


@pytest.mark.parametrize("code", python_examples())
def test_python_example(code, tmp_path):
    short, n_calls = re.subn(r"learn\(([\d_]+)", lambda call: f"learn({min(int(call[1]), 4000)}", code)
    assert n_calls > 0
    result = subprocess.run(
        [sys.executable, "-c", short],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
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
