# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.contracts [NAME ...]``: renews golden files, all by default, and prints what changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.contracts.golden_files import CONTRACTS, GOLDEN, difference, path_of


def main(names: Sequence[str]) -> int:
    """Renew the golden files of ``names``; returns the exit code."""
    if unknown := [name for name in names if name not in CONTRACTS]:
        print(f"no such contract: {', '.join(unknown)}\n  expected: some of {', '.join(CONTRACTS)}", file=sys.stderr)
        return 64
    renewed = 0
    for name in names or CONTRACTS:
        text = CONTRACTS[name]()
        if changes := difference(name, text):
            print(changes)
            renewed += 1
            path_of(name).parent.mkdir(parents=True, exist_ok=True)
            path_of(name).write_text(text, encoding="utf-8")
    if not names:
        for stale in set(GOLDEN.rglob("*.txt")) - {path_of(name) for name in CONTRACTS}:
            print(f"removed {stale.relative_to(GOLDEN)}")
            stale.unlink()
    print(f"{renewed} of {len(names or CONTRACTS)} golden files renewed in {GOLDEN.relative_to(GOLDEN.parents[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
