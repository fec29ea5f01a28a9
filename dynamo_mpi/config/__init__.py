# SPDX-License-Identifier: Apache-2.0
"""Options and settings: flags over environment over a settings file over defaults."""
