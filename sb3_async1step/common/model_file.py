"""Files of saved models: they are written completely or not at all, and checked before they are loaded."""

import errno
import functools
import io
import json
import os
import pathlib
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.save_util import data_to_json, open_path
from stable_baselines3.common.utils import get_system_info

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Temporary files are hidden and lack the suffix of models, so that a search for models does not find them. Their
#: names are short, since the target's may be as long as the file system allows
TEMPORARY_PREFIX = ".sb3_async1step-"
#: Why a file could be written that can't be replaced: a mount point, a folder that is read-only or someone else's
IRREPLACEABLE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
#: Errors of ``fsync`` where there is no such thing
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def pack_model(attributes: dict[str, Any], torch_parts: dict[str, Any]) -> memoryview:
    """
    Do what SB3's ``save_to_zip_file()`` does, but so that it can be interrupted. There, torch writes into the archive:
    its C++ code calls methods of Python, and a ``KeyboardInterrupt`` in one of these ends the process.

    :param attributes: a model's attributes
    :param torch_parts: by their names in the file, what torch saves
    :return: content of the model's file
    """
    file = io.BytesIO()
    archive = zipfile.ZipFile(file, mode="w")
    try:
        archive.writestr("data", data_to_json(attributes))
        for name, part in torch_parts.items():
            # No bytecode is run while torch writes into it, so nothing is raised
            buffer = io.BytesIO()
            th.save(part, buffer)
            archive.writestr(f"{name}.pth", buffer.getbuffer())
        archive.writestr("_stable_baselines3_version", sb3.__version__)
        archive.writestr("system_info.txt", describe_system())
        archive.close()
    except BaseException:
        # If a write was interrupted, closing raises a ValueError in place of the interrupt. There is nothing to close
        archive.fp = None
        raise
    return file.getbuffer()


@functools.cache
def describe_system() -> str:
    """
    :return: what SB3 tells about the system. It looks for packages that may be missing, which takes a while
    """
    return get_system_info(print_info=False)[1]


def write_atomically(path: pathlib.Path, content: bytes | memoryview) -> None:
    """
    Write to a temporary file next to the target, which then replaces the target. Whatever happens (an exception, a
    kill, a power cut), either the old file or the new one is there.

    A FIFO or a device is written into, and so is, with a warning, a file that can't be replaced.

    :param path: the target; its folder is created if it does not exist
    :param content: what to write
    :raises OSError: if the content could not be written
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    # Replace the file that a link points to, not the link
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    try:
        _replace(path, content)
    except OSError as error:
        if error.errno not in IRREPLACEABLE or not path.exists():
            raise
        warnings.warn(
            f"{path} can't be replaced ({error.strerror}), so it is written in place: if that is interrupted, the "
            "old model is lost.",
            stacklevel=3,
        )
        with open(path, "wb") as file:
            _write(file, content)


def _replace(path: pathlib.Path, content: bytes | memoryview) -> None:
    with _create_locked(path.parent) as file:
        temporary = pathlib.Path(file.name)
        try:
            _write(file, content)
            if path.exists():
                # Not every file system has modes
                with suppress(OSError):
                    shutil.copymode(path, temporary)
            if fcntl is None:
                # Windows can't rename an open file
                file.close()
            os.replace(temporary, path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
    # Without this, a power cut may undo the renaming. Not every file system can do it, and Windows can't open folders
    with suppress(OSError):
        _fsync_folder(path.parent)


def _write(file: BinaryIO, content: bytes | memoryview) -> None:
    file.write(content)
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def _fsync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_locked(folder: pathlib.Path) -> BinaryIO:
    """Create a temporary file. Its writer holds a lock on it, which the system releases at the writer's death."""
    while True:
        file = open(folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}", "xb")  # noqa: SIM115
        try:
            if fcntl is not None:
                # Not every file system has locks; those without keep the files of dead writers
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            # Before it was locked, another writer may have removed it as a dead one's
            if os.path.exists(file.name):
                return file
        except BaseException:
            file.close()
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise
        file.close()


def remove_leftovers(folder: pathlib.Path) -> None:
    """
    Remove the temporary files of writers that were killed.

    :param folder: where they are; nothing happens where the system has no locks on files
    """
    for temporary in folder.glob(f"{TEMPORARY_PREFIX}*") if fcntl is not None else ():
        # An error if its writer lives or has just ended
        with suppress(OSError), open(temporary, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def read_attributes(path: str | pathlib.Path | io.BufferedIOBase) -> dict[str, Any]:
    """
    Check that a file is a saved model, and that it is whole.

    :param path: a saved model
    :return: its attributes, as SB3 wrote them in JSON
    :raises ValueError: if it is damaged, or no saved model
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            # Checksums tell whether anything was changed
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            attributes = json.loads(archive.read("data"))
        if not isinstance(attributes, dict):
            raise ValueError("its data are no attributes")
    except MemoryError:
        raise
    # zipfile, zlib and json raise many kinds, also NotImplementedError, EOFError and RecursionError
    except Exception as error:
        raise ValueError(f"{path} is damaged, or no saved model: {describe(error)}.") from error
    finally:
        if file is path:
            file.seek(0)
        else:
            file.close()
    return attributes


def check_saved_model(
    path: str | pathlib.Path | io.BufferedIOBase, algorithm: str, expected: Collection[str], counterpart: str
) -> dict[str, Any]:
    """
    Check that a file holds a model that an algorithm can load, for a clearer error than that of loading another one.

    :param path: a saved model
    :param algorithm: name of the algorithm that is about to load it
    :param expected: names of attributes that only models which it can load have together
    :param counterpart: name of SB3's algorithm with the same policies
    :return: the model's attributes, as SB3 wrote them in JSON
    :raises ValueError: if the file is damaged, or was saved by another algorithm
    """
    attributes = read_attributes(path)
    # Who saved it may have left some out
    if attributes.get("_saved_by") != algorithm and not set(expected) <= set(attributes):
        raise ValueError(
            f"{path} was not saved by {algorithm}: load it with the class that saved it. "
            f"To start from the weights of {counterpart}, use "
            f"model.policy.load_state_dict({counterpart.lower()}.policy.state_dict())."
        )
    return attributes


@contextmanager
def explain_errors(path: object) -> Iterator[None]:
    """
    Inside the ``with`` block, in which a model is built from a file, a ``KeyError`` or whatever else its content leads
    to becomes a ``ValueError`` that names the file.

    :param path: the file
    :return: a context manager
    :raises ValueError: see above
    """
    try:
        yield
    except (ValueError, OSError, MemoryError):
        # These say what is wrong
        raise
    except Exception as error:
        raise ValueError(f"{path} can't be loaded: {describe(error)}.") from error


def describe(error: Exception) -> str:
    """
    :param error: an exception
    :return: its class and its text on one line, without a full stop
    """
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")
