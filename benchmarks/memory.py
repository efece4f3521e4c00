"""Peak memory of a process. What ``getrusage()`` says of a child begins with the peak of its parent."""

import re
import subprocess
from contextlib import suppress
from pathlib import Path


def read_peak_memory(process_id: int | str = "self") -> float:
    """
    :param process_id: id of a process, by default this one
    :return: its peak resident memory since its program began, in MiB (Linux only)
    :raises OSError: if it has ended
    """
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process_id}/status").read_text())
    if peak is None:
        raise ProcessLookupError(f"Process {process_id} has ended.")
    return int(peak[1]) / 1024


def wait_and_measure(process: subprocess.Popen) -> float:
    """
    Wait until a process has ended.

    :param process: the process
    :return: its peak memory in MiB, but for its last half second
    """
    peak = 0.0
    while True:
        with suppress(OSError):
            peak = read_peak_memory(process.pid)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            return peak
