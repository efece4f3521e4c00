"""Ray, which is an optional extra."""

from importlib import import_module
from typing import Any


def import_ray() -> Any:
    """
    :return: the package ``ray``
    :raises ImportError: if it is not installed
    """
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise ImportError("RayVecEnv needs Ray, which is not installed: pip install 'sb3-async1step[ray]'") from error


def lost_errors(ray: Any) -> tuple[type[Exception], ...]:
    """
    :param ray: the package ``ray``
    :return: what it raises if a process or a machine has ended that was asked something: before it had answered, or
        while the answer was on its way; or if Ray has killed the process, since its machine had run out of memory
    """
    errors = ray.exceptions
    return errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError, errors.OutOfMemoryError
