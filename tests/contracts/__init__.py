# SPDX-License-Identifier: Apache-2.0
"""Golden files of everything that users' scripts, dashboards and other versions of this project read.

Each file in ``golden/`` is made by the functions that write the real thing, over a fixed input: exit codes, flags and variables, help,
the members of every JSON document with type, example and whether it may be null (`shapes`), metrics, log lines, error labels, rule ids.
A test fails when one of them changes.

To renew them all, or some by name, and to see what changed::

    python -m tests.contracts [NAME ...]

Commit the golden files with the change that made them differ. A removed or renamed name needs an alias for one release and a line in
CHANGELOG.md; an added one needs neither. `sources` alone imports the package: a moved module is a change there and in no test.
"""
