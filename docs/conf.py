"""The site: `make docs` builds it from this folder into docs/_build/html, without a network."""

import importlib.util
import os
import sys
from pathlib import Path

import optax_smartclip

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "optax-smartclip"
author = "The optax-smartclip authors"
project_copyright = author
release = version = optax_smartclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "docstrings",
    "source_pages",
]
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints"]
nitpicky = True

# Pages. They are read on GitHub as well, so that only what it renders, too, is used in their text.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# The notebooks have their outputs. `make colabs` runs them.
nb_execution_mode = "off"

# Docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # The extension `docstrings` puts them next to each argument.
autoclass_content = "class"
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "name"

# Links to the documentation of Optax and JAX need the network while the site is built.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
    }

# Equations: MathJax's single file that draws SVG needs no fonts. It is served from the site, so
# that the pages are whole without a network; where its package is missing, from MathJax's CDN.
html_static_path = ["_static"]
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
if _mathjax is not None and _mathjax.origin is not None:
    html_static_path.append(str(Path(_mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"))
    mathjax_path = "tex-svg.js"

html_theme = "sphinx_book_theme"
html_title = "optax-smartclip"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # The search field is in the sidebar.
    "use_download_button": False,
    "use_fullscreen_button": False,
}
# The address of the repository, which CI sets. With it, notebooks have a button that opens Colab.
if "GITHUB_REPOSITORY" in os.environ:
    html_theme_options |= {
        "repository_url": "https://github.com/" + os.environ["GITHUB_REPOSITORY"],
        "repository_branch": "main",
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }

# `make links`, where there is a network.
linkcheck_ignore = [r"https://doi\.org/"]  # Publishers refuse programs.
linkcheck_anchors = False
