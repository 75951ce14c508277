"""Settings of the site. `make docs` builds it into docs/_build/html, without a network."""

import importlib.util
import os
import sys
from pathlib import Path

import optax_smartclip

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "optax-smartclip"
author = "the optax-smartclip authors"
project_copyright = author
release = version = optax_smartclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "docstrings",
    "narrow",
    "source_pages",
]
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints"]
nitpicky = True

# The pages are also read on GitHub, so they use only extensions that GitHub renders as well.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# The notebooks are stored with their outputs. `make colabs` runs them.
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # The extension `docstrings` puts them next to each argument.
autoclass_content = "class"
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "name"

# Links to the documentation of Optax and JAX need a network during the build.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
    }

# MathJax draws the equations as SVG with one script and without fonts. The site serves the script
# itself, so that pages are complete without a network. If its package is not installed, the script
# comes from MathJax's CDN.
html_static_path = ["_static"]
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
if _mathjax is not None and _mathjax.origin is not None:
    html_static_path.append(str(Path(_mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"))
    mathjax_path = "tex-svg.js"

html_theme = "sphinx_book_theme"
html_title = "optax-smartclip"
html_css_files = ["site.css"]
html_js_files = ["site.js"]
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
# CI sets the address of the repository. With it, notebooks have a button that opens Colab.
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

# `make links` checks links, which needs a network.
linkcheck_ignore = [r"https://doi\.org/"]  # Publishers refuse programs.
linkcheck_anchors = False
