"""Files that are written whole, or not at all."""

import os
import pathlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter


@contextmanager
def write_atomically(path: pathlib.Path, default_suffix: str) -> Iterator[BufferedWriter]:
    """
    Write beside the file, and put the result in its place at the end of the ``with`` block. Whatever happens (an
    exception, a kill, a power cut), either the old file or the new one is there.

    :param path: the file; its folder is created if there is none
    :param default_suffix: added to a name without suffix
    :return: a context manager, for the open file
    """
    if path.suffix == "":
        path = path.with_name(path.name + default_suffix)
    # Through a link, to the file
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and without the suffix, so nobody who looks for models finds it
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def _fsync_folder(folder: pathlib.Path) -> None:
    # Without this, a power cut may undo the renaming; Windows has no such thing
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
