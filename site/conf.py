"""Sphinx's settings for the course as a web page; `tools/build_site.py` puts the sources together and calls it.

Formulas are written as MathML when the page is built: browsers draw it themselves, and the page carries no script for
it.
"""
import re

from docutils import nodes
from latex2mathml.converter import convert

project, author, copyright = "lora_edu", "the lora_edu authors", "2026, MIT licence"
html_title = "lora_edu"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}                                # the labs are the page's own modules: _static/mount.js
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
myst_fence_as_directive = []
napoleon_custom_sections = ["Returns", "Shapes", "Source", "Sources"]     # a sentence, not "type: meaning"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "navbar_center": [], "navbar_align": "left", "show_toc_level": 2,
    "navigation_with_keys": False, "search_as_you_type": False, "back_to_top_button": False,
    "footer_start": ["copyright"], "footer_end": [], "secondary_sidebar_items": ["page-toc"],
    "article_footer_items": ["sourcelink", "prev-next"], "show_prev_next": False,       # once is enough
}
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["contents.html"]}
templates_path = ["_templates"]
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("mount.js", {"type": "module"})]
html_show_sphinx = False
html_sourcelink_suffix = ""
html_math_renderer = "mathml"
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
exclude_patterns = ["jupyter_execute"]


def inline(self, node):
    self.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def block(self, node):
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def plain_sections(app, what, name, obj, options, lines):
    """"Raises (then nothing is changed):" is two things: a section, and a sentence about it."""
    for i, line in enumerate(lines):
        if match := re.fullmatch(r"Raises \((.*)\):", line):
            lines[i:i + 1] = [f"*Where it raises, {match[1]}.*", "", "Raises:"]
            return


def setup(app):
    app.connect("autodoc-process-docstring", plain_sections, priority=100)      # before napoleon
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
