"""The site: Markdown pages of this folder, other files' pages, and the reference made from the package."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docstrings
import mathml
import site_parts

project = "diffdistill"
version = release = metadata.version("diffdistill")
copyright = "the authors of diffdistill, Apache-2.0"

if missing := site_parts.missing_notebooks():
    raise SystemExit(f"docs/notebooks/ lacks executed copies of {', '.join(missing)}: run make notebooks first")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
nb_execution_mode = "off"  # make notebooks has executed them
myst_enable_extensions = ["dollarmath", "html_image"]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "examples"]

myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 130
smartquotes = False  # alpha'(t) is a derivative, --help an option
default_role = "literal"
highlight_language = "none"

html_theme = "furo"
html_title = f"diffdistill {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app):
    def read(app, name, source):
        source[0] = site_parts.filled(source[0], f"docs/{name}".rpartition("/")[0])

    def described(app, what, name, thing, options, lines):
        lines[:] = docstrings.as_rst(lines)

    def signed(app, what, name, thing, options, signature, returns):
        # <factory> and its like are no Python, and one of them keeps Sphinx from reading the whole signature
        return (re.sub(r"<[^<>]*>", "...", signature), returns) if signature else None

    def outdated(app, env, added, changed, removed):
        # what other files decide: Sphinx watches the pages alone
        return [name for name in env.found_docs if site_parts.depends(Path(env.doc2path(name)).read_text())]

    mathml.setup(app)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", read)
    app.connect("autodoc-process-signature", signed)
    app.connect("autodoc-process-docstring", described)
    return {"parallel_read_safe": True}
