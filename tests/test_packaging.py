"""What an installed package holds."""

import subprocess
import sys
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import sb3_async1step
from sb3_async1step.zoo import ALGORITHMS, hyperparams_path

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
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    package = {name for name in tracked if name.startswith("sb3_async1step/")}
    hyperparams = {f"sb3_async1step/{name}" for name in tracked if name.startswith("hyperparams/")}
    assert names == package | hyperparams


def test_the_wheel_works_without_the_sources(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        "import sb3_async1step, sb3_async1step.zoo as zoo; from pathlib import Path; "
        "print(sb3_async1step.__file__); print(*[Path(zoo.hyperparams_path(a)).is_file() for a in zoo.ALGORITHMS])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    file, found = result.stdout.splitlines()
    assert file.startswith(str(target))
    assert found == "True True"
