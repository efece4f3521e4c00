"""Writes the tables between the marks of the pages, and the pictures."""

import re
from pathlib import Path

from benchmarks.actor_learners import read_all
from benchmarks.learning import RESULTS
from benchmarks.report.figures import draw_actor_learners, draw_curves, draw_defaults, draw_node_kills, draw_speeds
from benchmarks.report.results import read_node_kills, read_runs, read_throughput
from benchmarks.report.tables import (
    actor_learners_table,
    defaults_table,
    make_learning_tables,
    make_speed_tables,
    node_kills_table,
    race_table,
)

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "docs" / "pictures"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "guide" / "performance.md",
    ROOT / "docs" / "guide" / "more_machines.md",
)


def make_tables() -> dict[str, list[str]]:
    """
    :return: the lines of all tables by the names of their marks
    """
    runs, throughput = read_runs(), read_throughput()
    kills = read_node_kills()
    return {
        **({"node kills": node_kills_table(kills)} if kills else {}),
        **make_learning_tables(runs),
        "defaults": defaults_table(read_runs(RESULTS / "defaults")),
        **make_speed_tables(throughput),
        "race": race_table(runs, throughput),
        "actor-learners": actor_learners_table(read_all()),
    }


def insert_table(text: str, name: str, lines: list[str]) -> str:
    """
    :param text: text of a page
    :param name: name of the marks
    :param lines: lines of the table
    :return: the text with the table between the marks, if it has them
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    table = "\n".join(lines)
    return re.sub(pattern, lambda marks: f"{marks[1]}{table}\n{marks[2]}", text, flags=re.DOTALL)


def main() -> None:
    """Write all tables and pictures."""
    tables = make_tables()
    for page in PAGES:
        text = page.read_text()
        for name, lines in tables.items():
            text = insert_table(text, name, lines)
        page.write_text(text)
    for env_id, groups in read_runs().items():
        draw_curves(env_id, groups, PICTURES / f"{env_id}.png")
    if defaults := read_runs(RESULTS / "defaults"):
        draw_defaults(defaults, PICTURES / "learning_curve.png")
    draw_speeds(read_throughput(), PICTURES / "throughput.png")
    if kills := read_node_kills():
        draw_node_kills(kills[-1], PICTURES / "node_kills.png")
    if studies := read_all():
        draw_actor_learners(studies, PICTURES / "actor_learners.png")
