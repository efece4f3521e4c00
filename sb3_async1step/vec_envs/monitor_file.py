"""The monitor file of an env that was made again."""

import json
import os
from pathlib import Path

from stable_baselines3.common.monitor import ResultsWriter


class ContinuedResultsWriter(ResultsWriter):
    """
    Goes on with the file of a process that has ended, which ``Monitor`` would empty. A row that was not finished is
    removed, and times count from the start that the header names.

    :param filename: the file; ``"monitor.csv"`` is appended if it does not end so
    :param header: what the first line of a new file says
    :param extra_keys: what a row has besides reward, length and time of an episode
    :param override_existing: whether the file has a header, which SB3 writes only then
    """

    def __init__(
        self,
        filename: str = "",
        header: dict[str, float | str] | None = None,
        extra_keys: tuple[str, ...] = (),
        override_existing: bool = True,
    ) -> None:
        super().__init__(filename, header, extra_keys, override_existing=False)
        self._seconds_before = 0.0
        lines = read_whole_lines(Path(self.file_handler.name))
        if not override_existing:
            return
        if len(lines) < 2:
            # The process ended before it had written the header
            self.close()
            super().__init__(filename, header, extra_keys)
        elif header is not None:
            self._seconds_before = float(header["t_start"]) - json.loads(lines[0][1:])["t_start"]

    def write_row(self, epinfo: dict[str, float]) -> None:
        """
        :param epinfo: return, length and time of an episode
        """
        super().write_row({**epinfo, "t": round(epinfo["t"] + self._seconds_before, 6)})


def read_whole_lines(path: Path) -> list[bytes]:
    """
    :param path: a file; what follows its last line break is cut off
    :return: its lines
    """
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    os.truncate(path, len(content) - len(rest))
    return lines
