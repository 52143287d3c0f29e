"""The documentation: `make docs` builds it and fails at any warning."""

from star_dss_plugin import __version__

project = "STAR-DSS plugin"
author = "the star-dss-plugin developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"STAR-DSS {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# Docstrings put code in single backticks, as the comments do.
default_role = "literal"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
