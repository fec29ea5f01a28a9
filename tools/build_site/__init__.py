# SPDX-License-Identifier: Apache-2.0
"""Builds a site of the pages: ``make docs``. `stage` collects the pages, Sphinx makes HTML of them."""
