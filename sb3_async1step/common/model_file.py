"""Files of saved models: they are written completely or not at all, and checked before they are loaded."""

import io
import json
import os
import pathlib
import shutil
import sys
import uuid
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module

from stable_baselines3.common.save_util import open_path

#: Modules that earlier versions of this package had, and in which saved models look for classes
RENAMED_MODULES = {
    "sb3_async1step.common.policies": "sb3_async1step.value_based.policies",
    "sb3_async1step.common.actor_learner": "sb3_async1step.workers.actor_learner",
}


@contextmanager
def write_atomically(path: pathlib.Path, default_suffix: str) -> Iterator[io.BufferedWriter]:
    """
    Write to a temporary file next to the target, which replaces the target at the end of the ``with`` block. Whatever
    happens (an exception, a kill, a power cut), either the old file or the new one is there.

    :param path: the target; its folder is created if it does not exist
    :param default_suffix: suffix for a name without one
    :return: a context manager that gives the open temporary file
    """
    if path.suffix == "":
        path = path.with_name(path.name + default_suffix)
    # Replace the file that a link points to, not the link
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and without the suffix, so that a search for models does not find it
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def _fsync_folder(folder: pathlib.Path) -> None:
    # Without this, a power cut may undo the renaming. Windows cannot open folders
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def renamed_modules() -> Iterator[None]:
    """
    Inside the ``with`` block, models of earlier versions of this package can be unpickled.

    :return: a context manager
    """
    for old, new in RENAMED_MODULES.items():
        sys.modules.setdefault(old, import_module(new))
    try:
        yield
    finally:
        for old in RENAMED_MODULES:
            sys.modules.pop(old, None)


def check_saved_model(
    path: str | pathlib.Path | io.BufferedIOBase, algorithm: str, expected: Collection[str], counterpart: str
) -> None:
    """
    Check that a file holds a model that an algorithm can load, for a clearer error than that of loading another one.

    :param path: a saved model
    :param algorithm: name of the algorithm that is about to load it
    :param expected: names of attributes that only models which it can load have together
    :param counterpart: name of SB3's algorithm with the same policies
    :raises ValueError: if the file is damaged, or was saved by another algorithm
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            attributes = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no saved model: {error}") from error
    finally:
        if file is path:
            file.seek(0)
        else:
            file.close()
    if not set(expected) <= set(attributes):
        raise ValueError(
            f"{path} was not saved by {algorithm}: load it with the class that saved it. "
            f"To start from the weights of {counterpart}, use "
            f"model.policy.load_state_dict({counterpart.lower()}.policy.state_dict())."
        )
