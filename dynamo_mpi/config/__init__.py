# SPDX-License-Identifier: Apache-2.0
"""Options and settings, in order of precedence: flags, environment variables, settings file, defaults."""
