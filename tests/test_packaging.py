"""What an installed package holds."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import sb3_async1step
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.zoo import hyperparams_path

ROOT = Path(__file__).parent.parent


def test_version_and_licence():
    assert version("sb3-async1step") == sb3_async1step.__version__
    assert metadata("sb3-async1step")["License"] == "MIT"


def test_hyperparameters_are_reachable():
    for algo in ALGORITHMS:
        assert Path(hyperparams_path(algo)).read_text() == (ROOT / "hyperparams" / f"{algo}.yml").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy: building leaves files beside the sources
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, stdout=subprocess.DEVNULL)
    # As from a package index that has no wheel
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder like ``site-packages``, with what the wheel holds."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    package = {name for name in tracked if name.startswith("sb3_async1step/")}
    data = {f"sb3_async1step/{name}" for name in tracked if name.startswith(("hyperparams/", "trained_agents/"))}
    assert names == package | data


def test_the_wheel_works_without_the_sources(site, tmp_path):
    code = """
import sys, sb3_async1step, sb3_async1step.registry, sb3_async1step.sb3_internals
from pathlib import Path
print([name for name in ("rl_zoo3", "optuna", "huggingface_sb3", "ale_py", "ray") if name in sys.modules])
from sb3_async1step.registry import ALGORITHMS
from sb3_async1step.zoo import hyperparams_path
print("ray" in sys.modules)
print(sb3_async1step.__file__)
print(*[Path(hyperparams_path(a)).is_file() for a in ALGORITHMS])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported, has_imported_ray, file, found = result.stdout.splitlines()
    # What only the extras bring, the library does not import
    assert (imported, has_imported_ray) == ("[]", "False")
    assert file.startswith(str(site))
    assert found.split() == ["True"] * len(ALGORITHMS)


# The imports of what others wrote are as good as Any: reading them takes half a minute
MYPY_SETTINGS = """
[mypy]
[mypy-torch.*,stable_baselines3.*,gymnasium.*,numpy.*]
follow_imports = skip
follow_imports_for_stubs = true
"""
PROGRAM_OF_A_USER = """
from sb3_async1step import AsyncOneStepQ

model = AsyncOneStepQ("MlpPolicy", "CartPole-v1", gamma=0.9)
reveal_type(model.learn(1000))
AsyncOneStepQ("MlpPolicy", "CartPole-v1", gamma="0.9")
"""


@pytest.mark.parametrize("installed", ["editable", "as a wheel"])
def test_type_checkers_read_our_annotations(installed, site, tmp_path):
    (tmp_path / "mypy.ini").write_text(MYPY_SETTINGS)
    (tmp_path / "program.py").write_text(PROGRAM_OF_A_USER)
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    if installed == "as a wheel":
        environment["PYTHONPATH"] = str(site)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--verbose", "program.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    revealed, wrong, _ = result.stdout.splitlines()
    assert re.fullmatch(r'program.py:5: note: Revealed type is ".*\bAsyncOneStepQ"', revealed)
    assert wrong.startswith('program.py:6: error: Argument "gamma" to "AsyncOneStepQ" has incompatible type "str"')
    package = (site if installed == "as a wheel" else ROOT) / "sb3_async1step"
    assert f"{package}/py.typed" in result.stderr or f"Parsing {package}/__init__.py" in result.stderr


# ---------------------------------------------------------------------- versions

#: What `make test-lowest` installs
EXTRAS_TESTED = ("zoo", "atari", "minatar", "tests")


def read_requirements():
    """What the package and the tested extras require, by name; two ranges of a package must be the same."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    sections = [config["options"]["install_requires"], *(config["options.extras_require"][e] for e in EXTRAS_TESTED)]
    lines = [line for section in sections for line in section.splitlines() if line and not line.startswith("#")]
    requirements = {}
    for requirement in map(Requirement, lines):
        assert requirements.setdefault(requirement.name, requirement).specifier == requirement.specifier
    return requirements


def read_pins(path):
    return {
        requirement.name: Version(specifier.version)
        for requirement in map(Requirement, re.findall(r"^[\w-].*", path.read_text(), re.MULTILINE))
        for specifier in requirement.specifier
        if specifier.operator == "=="
    }


def test_lowest_versions_are_those_that_are_tested():
    """``constraints-lowest.txt`` pins the lower end of each range, and nothing else."""
    lowest = {
        name: Version(specifier.version)
        for name, requirement in read_requirements().items()
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    assert read_pins(ROOT / "constraints-lowest.txt") == lowest
