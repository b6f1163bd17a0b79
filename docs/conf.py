"""The site's settings: Sphinx with MyST for Markdown and furo for the looks (scripts/docs.sh)."""

import re

from sphinx.application import Sphinx

project = "eagle3fn"
author = "the eagle3fn authors"
html_title = "eagle3fn"
html_theme = "furo"
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Headings have the anchors that they have on GitHub; a link to one that is not there is a warning,
# and with -W an error. A link to a file outside docs/ offers it for download.
myst_heading_anchors = 3

# Docstrings have Google's sections, and code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88


def offer_pages_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Let a link to a Markdown file outside docs/ offer it too, in place of a missing page."""
    source[0] = re.sub(r"\]\(((?:\.\./)[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", offer_pages_outside)
