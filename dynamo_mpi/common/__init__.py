# SPDX-License-Identifier: Apache-2.0
"""What every other package may use: errors, logs, files, processes. Imports no other package of this project."""
