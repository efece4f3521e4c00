"""
What README, CONTRIBUTING and docs print runs as printed, except for the numbers of steps, lanes and trials; their links
and tables are right.
"""

import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import yaml
from stable_baselines3.common.utils import LinearSchedule  # noqa: F401 (the parameters' tables name it)

from benchmarks import actor_learners, learning
from benchmarks.report import PAGES, insert_table, make_tables
from sb3_async1step import __version__
from sb3_async1step.registry import ALGORITHMS
from tests.command_line import call_main, call_zoo, run_code, run_code_afresh
from tests.helpers import DEADLINE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts),
)
# The examples of these pages are one program: each uses what the examples before it define
PROGRAMS = (DOCS / "guide" / "tutorial.md",)
# The commands of the results train in several ways, half a minute in all; Ray starts a cluster
SLOW_DOCUMENTS = (DOCS / "results.md", DOCS / "guide" / "more_machines.md")


def read_blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def python_examples():
    """The examples of all documents; one that stands in several of them runs once."""
    examples = {}
    for path in DOCUMENTS:
        blocks = read_blocks(path, "python")
        for i, code in enumerate(["\n".join(blocks)] if path in PROGRAMS and blocks else blocks, start=1):
            examples.setdefault(code, f"{path.relative_to(ROOT)}-{i}")
    slow = {code for path in SLOW_DOCUMENTS for code in read_blocks(path, "python")}
    return [
        pytest.param(code, id=name, marks=[pytest.mark.slow] if code in slow else []) for code, name in examples.items()
    ]


def read_commands(path):
    """The commands in a page's blocks of shell code, in order, each as a list of words."""
    return [
        shlex.split(line)
        for block in read_blocks(path, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def shorten(words):
    """The same command with small budgets, and one seed."""
    replaced = {"-n": "200", "--n-trials": "2", "--steps": "200", "--save-freq": "100"}
    words = [replaced.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    words = shlex.split(re.sub(r"--seeds( \d+)+", "--seeds 1", shlex.join(words)))
    if words[:2] == ["sb3-async1step", "train"]:
        # No steps without these; the evaluations would take longer than the training
        words += ["--eval-freq", "-1"] + ([] if "-n" in words else ["-n", "200"])
        # Each of Atari's 128 lanes takes 0.2 seconds to load its game
        words += ["-params", "n_envs:4"] if "--vec-env" in words else []
    if words[:2] == ["sb3-async1step", "enjoy"]:
        words += ["--no-render"] + ([] if "-n" in words else ["-n", "100"])
    if words[:3] == ["python", "-m", "benchmarks.learning"]:
        words += ["--results", "results", "--checkpoints", "2", "--episodes", "1"]
        words += [] if "--steps" in words else ["--steps", "200"]
    if words[:3] == ["python", "-m", "benchmarks.defaults"]:
        words += ["--results", "results", "--steps", "200"]
    return words


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.slow] if path in SLOW_DOCUMENTS else [])
        for path in DOCUMENTS
        if read_commands(path)
    ],
)
def test_commands(path, tmp_path, monkeypatch):
    # For the processes that they start
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(learning, "N_FINAL_EPISODES", 5)
    monkeypatch.setattr(actor_learners, "N_ACTOR_LEARNERS", (1,))
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
        return call_main(importlib.import_module(module).main, [module, *options], folder)
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("code", python_examples())
def test_python_example(code, tmp_path):
    is_atari = "atari" in code.lower()
    most = 400 if is_atari else 2000
    short, n_calls = re.subn(r"learn\(([\d_]+)", lambda call: f"learn({min(int(call[1]), most)}", code)
    assert n_calls > 0
    if is_atari or "vec_env_cls" in code:
        # A lane of Atari takes 0.2 seconds to load its game, and a lane may have a process of its own
        short = re.sub(r"n_envs=(\d+)", lambda lanes: f"n_envs={min(int(lanes[1]), 4)}", short)
    matplotlib.use("agg")
    # Other tests have registered Atari's games on this process
    exit_code, output = (run_code_afresh if is_atari else run_code)(short, tmp_path)
    plt.close("all")
    assert exit_code == 0, output
    # Files that the page says are there
    for name in re.findall(r'savefig\("(.*?)"\)', code):
        assert (tmp_path / name).stat().st_size > 0


def test_tables_are_those_of_the_results():
    tables = make_tables()
    for page in PAGES:
        text = page.read_text()
        for name, lines in tables.items():
            assert insert_table(text, name, lines) == text, f"{page.name}: `make report` was not run"


# The tables of docs/guide/parameters.md that describe an algorithm; the later ones override the earlier ones
PARAMETER_TABLES = {
    "async_one_step_q": ("All algorithms", "Value-based algorithms"),
    "async_one_step_sarsa": ("All algorithms", "Value-based algorithms", "AsyncOneStepSarsa"),
    "async_n_step_q": ("All algorithms", "Value-based algorithms", "AsyncNStepQ"),
    "a3c": ("All algorithms", "A3C"),
}


def read_parameter_table(heading):
    """Documented defaults of the parameters under a heading of docs/guide/parameters.md, by name."""
    _, *sections = (DOCS / "guide" / "parameters.md").read_text().split("\n## ")
    (table,) = (section for section in sections if section.splitlines()[0] == heading)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    return {name.strip("`"): default.strip("`") for names, default, _ in rows for name in names.split(", ")}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_parameter_tables_name_all_parameters_and_defaults(algo):
    documented = {}
    for heading in PARAMETER_TABLES[algo]:
        documented |= read_parameter_table(heading)
    parameters = dict(inspect.signature(ALGORITHMS[algo].model_class).parameters)
    del parameters["_init_setup_model"]
    assert list(documented) and set(documented) == set(parameters)
    for name, default in documented.items():
        if default not in ("", "as in SB3"):
            assert repr(eval(default)) == repr(parameters[name].default)


def test_every_algorithm_has_a_page():
    overview = (DOCS / "modules" / "algorithms.md").read_text()
    for algo, algorithm in ALGORITHMS.items():
        page = (DOCS / "modules" / f"{algo}.md").read_text()
        assert page.startswith(f"# {algorithm.name}\n")
        assert f".. autoclass:: sb3_async1step.{algorithm.name}\n" in page
        assert f"]({algo}.md)" in overview
        assert f"\nmodules/{algo}\n" in (DOCS / "index.md").read_text()


def find_anchors(path):
    """The anchors that GitHub and MyST give to a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS])
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"```{image} (\S+)", path.read_text())
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.is_file(), target
        assert not anchor or anchor in find_anchors(page), target


def test_a_broken_link_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page's `title`, 2\n\n[](#a-pages-title-2)\n\n```bash\n# no heading\n```\n")
    assert find_anchors(page) == {"a-pages-title-2"}
    test_relative_links_lead_somewhere(page)
    for link in ("[](#another)", "[text](missing.md)", "![](missing.png)"):
        page.write_text(f"# Title\n\n{link}\n")
        with pytest.raises(AssertionError):
            test_relative_links_lead_somewhere(page)


def list_inventory_objects():
    for path in sorted((DOCS / "inventories").glob("*.txt")):
        for line in path.read_text().splitlines():
            page, kind, *names = line.split()
            assert page.endswith((".html", "/")) and kind in ("class", "data", "exception", "function", "method")
            yield from names


def import_object(name):
    """The object of a full name: a module's, a class's, or a builtin."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    return eval(name, {})


def test_the_objects_that_the_docs_link_to_exist():
    names = list(list_inventory_objects())
    assert len(names) == len(set(names))
    for name in names:
        import_object(name)
    with pytest.raises(AttributeError):
        import_object("stable_baselines3.common.base_class.BaseAlgorithm.unlearn")


def test_citations_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"version = {{{__version__}}}" in (DOCS / "misc" / "citing.md").read_text()


def test_pre_commit_runs_the_ruff_of_the_constraints():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (revision,) = (repo["rev"] for repo in config["repos"] if "ruff" in repo["repo"])
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()
