# SPDX-License-Identifier: Apache-2.0
"""Listen on a free port of ADDRESS, print the port, and never say a word: ``silent_server.py ADDRESS``."""

import signal
import socket
import sys

# the kernel completes connections by itself, without an accept
with socket.create_server((sys.argv[1], 0), backlog=16) as server:
    print(server.getsockname()[1], flush=True)
    signal.pause()
