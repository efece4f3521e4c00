"""What setup.cfg can't say: folders of data lie beside the package in the repository, and inside of it in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("hyperparams", "trained_agents")


class BuildWithData(build_py):
    """Copies ``FOLDERS`` to where ``sb3_async1step.zoo`` looks for them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in (path for folder in FOLDERS for path in Path(folder).rglob("*") if path.is_file()):
                target = Path(self.build_lib, "sb3_async1step", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithData})
