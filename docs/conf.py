"""Sphinx configuration.

``DOCS_OFFLINE=1`` leaves out the links to the documentation of other projects, whose inventories are downloaded during
the build. ``python docs/conf.py`` prints 1 where they cannot be reached, else 0; ``make docs`` uses that.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from urllib.error import URLError
from urllib.request import urlopen

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "anndata": ("https://anndata.readthedocs.io/en/stable", None),
    "matplotlib": ("https://matplotlib.org/stable", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "pandas": ("https://pandas.pydata.org/docs", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
    "scipy": ("https://docs.scipy.org/doc/scipy", None),
    "spatialdata": ("https://spatialdata.scverse.org/en/stable", None),
    "squidpy": ("https://squidpy.readthedocs.io/en/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "xarray": ("https://docs.xarray.dev/en/stable", None),
}


def _inventories_unreachable() -> bool:
    try:
        for url, _ in intersphinx_mapping.values():
            urlopen(f"{url}/objects.inv", timeout=10).close()
    except (URLError, TimeoutError):
        return True
    return False


if __name__ == "__main__":
    print(int(_inventories_unreachable()))
    raise SystemExit

if os.environ.get("DOCS_OFFLINE", "0") == "1":
    intersphinx_mapping = {}

from importlib.metadata import version as _version  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from sphinx.ext.napoleon import NumpyDocstring  # noqa: E402

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

# -- project ----------------------------------------------------------------------------------------------------------
project = "spatial-impute"
author = "spatial_impute contributors"
copyright = f"{datetime.now():%Y}, {author}"
release = version = _version("spatial-impute")

# -- general ----------------------------------------------------------------------------------------------------------
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "literal"
nitpicky = True
# Only our own names are checked, so that the build gives the same verdict with and without a network;
# and private ones have no page.
nitpick_ignore_regex = [("py:.*", r"(?!spatial_impute\b).*"), ("py:class", r"spatial_impute(\.\w+)*\._.*")]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
napoleon_custom_sections = ["Shapes"]
napoleon_google_docstring = False
napoleon_include_init_with_doc = False
napoleon_use_rtype = False

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their output
nb_output_stderr = "remove"

# -- HTML -------------------------------------------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_title = "spatial_impute"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "navbar_persistent": [],  # the search field is in the sidebar; not a second one above the page
}

# -- prose in Returns, short type names -------------------------------------------------------------------------------
# How types are written in signatures (string annotations are not resolved) -> where they are documented.
TYPE_NAMES = {
    "AnnData": "anndata.AnnData",
    "Axes": "matplotlib.axes.Axes",
    "DataArray": "xarray.DataArray",
    "Figure": "matplotlib.figure.Figure",
    "Iterable": "collections.abc.Iterable",
    "Mapping": "collections.abc.Mapping",
    "Path": "pathlib.Path",
    "Sequence": "collections.abc.Sequence",
    "SpatialData": "spatialdata.SpatialData",
    "nn.Module": "torch.nn.Module",
    "np.ndarray": "numpy.ndarray",
    "pd.DataFrame": "pandas.DataFrame",
    "pd.Series": "pandas.Series",
    "torch.Tensor": "torch.Tensor",
}


class ProseReturns(NumpyDocstring):
    """Take a Returns section as it is written, as scverse docstrings do: prose and ``name : type`` lists."""

    def _parse_returns_section(self, section: str) -> list[str]:
        lines = self._dedent(self._consume_to_next_section())
        return [*self._format_block(":returns: ", lines), ""] if any(lines) else []


def _resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Look a short type name up in the other projects' inventories under its full name."""
    from sphinx.ext.intersphinx import resolve_reference_any_inventory

    full_name = TYPE_NAMES.get(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or full_name is None:
        return None
    node = node.copy()
    node["reftarget"] = full_name
    return resolve_reference_any_inventory(env, honor_disabled_refs=False, node=node, contnode=contnode)


def _draw_gallery(app: Sphinx) -> None:
    """Run the code of the gallery, so that its figures are those of this version."""
    sys.path.insert(0, app.srcdir.as_posix())
    import gallery_figures

    gallery_figures.draw()


def setup(app: Sphinx) -> None:
    """Register the adaptations above."""
    app.connect("builder-inited", _draw_gallery)
    NumpyDocstring._parse_returns_section = ProseReturns._parse_returns_section
    app.connect("missing-reference", _resolve_short_name)
