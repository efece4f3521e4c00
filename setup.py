"""What setup.cfg can't say: hyperparams/ lies beside the package in the repository, and inside of it in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithHyperparameters(build_py):
    """Copies ``hyperparams/`` to where ``sb3_async1step.zoo`` looks for it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "sb3_async1step", "hyperparams")
            self.mkpath(str(folder))
            for path in Path("hyperparams").glob("*.yml"):
                self.copy_file(str(path), str(folder))


setup(cmdclass={"build_py": BuildWithHyperparameters})
