# SPDX-License-Identifier: Apache-2.0
"""Sphinx' configuration of the site."""

from __future__ import annotations

project = "dynamo_mpi"
author = "the dynamo_mpi contributors"
extensions = ["myst_parser"]
root_doc = "index"
# links to headings by the names that GitHub's pages give them
myst_heading_anchors = 4
# blocks of shell or JSON with "…" in them are shown all the same
suppress_warnings = ["misc.highlighting_failure"]

# flags stand in running text, and "--" is two of them
smartquotes = False

html_theme = "furo"
html_title = "dynamo_mpi"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
