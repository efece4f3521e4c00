"""Exceptions of envs on their way to the caller of ``learn()``."""

from contextlib import suppress

# In what libraries say of objects that belong to one thread: SQLite, event loops, signals, Tk, OpenGL
THREAD_WORDS = ("thread", "event loop", "context")


def add_note(exception: BaseException, note: str) -> None:
    """
    :param exception: an exception; one that refuses notes, as that of a frozen dataclass does, goes without
    :param note: what its traceback shall say, too
    """
    with suppress(Exception):
        exception.add_note(note)


def read_text(exception: BaseException) -> str:
    """
    :param exception: an exception
    :return: its message; empty if ``str()`` fails
    """
    with suppress(Exception):
        return str(exception)
    return ""


def advise_on_threads(exception: BaseException, thread: str = "a worker", instead: str = "n_workers=1") -> None:
    """
    Say what to do about an env that is bound to the thread that made it.

    :param exception: raised on another thread than the one that called ``learn()``
    :param thread: whose thread that is
    :param instead: what to use to have the env stepped on the calling thread
    """
    if any(word in read_text(exception).lower() for word in THREAD_WORDS):
        add_note(
            exception,
            f"It was raised on the thread of {thread}. If the env is bound to the thread that made it, use {instead}, "
            "or SubprocVecEnv, which gives each env a process.",
        )
