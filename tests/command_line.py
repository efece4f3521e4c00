"""Programs on this process: a fresh Python takes seconds to import PyTorch and the Zoo."""

import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from sb3_async1step import zoo
from tests.helpers import DEADLINE


def call_main(main: Callable[[], None], words: list[str], folder: Path) -> tuple[int, str]:
    """
    Call a program's ``main()`` as its script would.

    :param main: parses ``sys.argv``
    :param words: the command line, the program's name included
    :param folder: the working directory
    :return: exit code, and what was printed
    """
    output = io.StringIO()
    with chdir(folder), patch.object(sys, "argv", words), redirect_stdout(output), redirect_stderr(output):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return code, output.getvalue()


def call_zoo(words: list[str], folder: Path) -> tuple[int, str]:
    """
    Call ``sb3-async1step``, see :func:`call_main`.

    :param words: the command line, the program's name included
    :param folder: the working directory
    :return: exit code, and what was printed
    """
    # What --vec-env and --vec-env-kwargs replace for the rest of the process
    defaults = {"default_vec_env_cls": None, "default_vec_env_kwargs": {}, "own_vec_env": None}
    with patch.multiple(zoo.AsyncExperimentManager, **defaults), patch.dict(os.environ):
        return call_main(zoo.main, words, folder)


def run_code(code: str, folder: Path) -> tuple[int, str]:
    """
    Run a program as ``python -c`` would.

    :param code: the program
    :param folder: the working directory
    :return: exit code, and what was printed
    """
    with patch.dict(os.environ):
        return call_main(lambda: exec(compile(code, "<example>", "exec"), {"__name__": "__main__"}), ["-c"], folder)


def run_code_afresh(code: str, folder: Path) -> tuple[int, str]:
    """
    Run a program by ``python -c``, on a process on which nothing has registered any env.

    :param code: the program
    :param folder: the working directory
    :return: exit code, and what was printed
    """
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr
