"""Configuration of the documentation."""

import zlib
from pathlib import Path

from sb3_async1step import __version__

HERE = Path(__file__).parent


def write_inventory(project: str) -> str:
    """
    Write the list of a project's objects that our pages link to in the format that intersphinx reads.

    The build downloads nothing: a line of ``inventories/PROJECT.txt`` names a page of the project's documentation, the
    kind of an object, the name under which the page documents it, and further names of the same object.

    :param project: name of the list
    :return: path of the file
    """
    objects = []
    for line in (HERE / "inventories" / f"{project}.txt").read_text().splitlines():
        page, kind, name, *other_names = line.split()
        objects += [f"{alias} py:{kind} 1 {page}#{name} -" for alias in (name, *other_names)]
    header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n# Compressed using zlib.\n"
    path = HERE / "_build" / "inventories" / f"{project}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + zlib.compress("\n".join(objects).encode()))
    return str(path)


project = "sb3-async1step"
author = "the sb3-async1step developers"
project_copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# A longer signature has a line for each parameter
python_maximum_signature_line_length = 100

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

intersphinx_mapping = {
    name: (address, write_inventory(name))
    for name, address in {
        "gymnasium": "https://gymnasium.farama.org/",
        "numpy": "https://numpy.org/doc/stable/",
        "python": "https://docs.python.org/3/",
        "stable_baselines3": "https://stable-baselines3.readthedocs.io/en/master/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }.items()
}

html_theme = "sphinx_rtd_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
