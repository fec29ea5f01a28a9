# SPDX-License-Identifier: Apache-2.0
"""One recipe over all versions of TensorRT-LLM between which a rule or a key differs: ``dynamo-mpi check --trtllm-version all``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from dynamo_mpi.common.frozen import dataclass, replace
from dynamo_mpi.layout.engine_keys import engine_keys
from dynamo_mpi.layout.finding import Finding, Severity, render
from dynamo_mpi.layout.format import columns
from dynamo_mpi.layout.library import Worker, check
from dynamo_mpi.layout.report import PairReport, Report
from dynamo_mpi.layout.report_text import summary
from dynamo_mpi.layout.trtllm_version import TrtllmVersion, parse_trtllm_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dynamo_mpi.common.errors import ExitCode
    from dynamo_mpi.layout.library import EngineInput, Model

_WORKER = Worker()


@dataclass(frozen=True)
class VersionsReport:
    """What each version of TensorRT-LLM does with a recipe.

    Args:
        results: by version, the oldest first.
    """

    results: tuple[tuple[str, Report | PairReport], ...]

    @property
    def ok(self) -> bool:
        """Whether every version accepts it."""
        return all(result.ok for _, result in self.results)

    @property
    def exit_code(self) -> ExitCode:
        """The worst of all versions: 0 only if every version accepts it, 78 if one refuses the layout, 65 if only keys are refused."""
        return max(result.exit_code for _, result in self.results)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data, in the stable format for scripts."""
        newest = self.results[-1][1]
        workers = [newest] if isinstance(newest, Report) else [newest.prefill, newest.decode]
        return {
            "ok": self.ok,
            "exit_code": int(self.exit_code),
            "model": workers[0].subject.shape.name,
            "workers": [{"role": worker.subject.role, "layout": worker.subject.layout_as_json()} for worker in workers],
            "versions": [
                {
                    "trtllm_version": version,
                    "ok": result.ok,
                    "exit_code": int(result.exit_code),
                    "errors": _count(result, Severity.ERROR),
                    "warnings": _count(result, Severity.WARNING),
                    "findings": [{"of": of, **finding.as_json()} for of, finding in _findings(result)],
                }
                for version, result in self.results
            ],
        }


@cache
def known_versions() -> tuple[str, ...]:
    """Return the versions at which a key of the table begins, ends or is renamed, with the newest that the table knows; ascending."""
    keys = engine_keys()
    texts = {keys.oldest, keys.newest}
    texts |= {text for rows in keys.renamed.values() for row in rows for text in (row.refused, row.since)}
    texts |= {row.refused for row in keys.removed_values.values()}
    minors = {
        minor for section in keys.sections.values() for key in section.values() for minor in (key.since, key.until)
    }
    texts |= {f"{minor[0]}.{minor[1]}" for minor in minors if minor is not None}
    versions = {_release(text) for text in texts if text not in ("", "0")}
    oldest, newest = _release(keys.oldest), _release(keys.newest)
    return tuple(str(version) for version in sorted(versions) if oldest <= version <= newest)


def check_versions(model: Model, engine_config: EngineInput = None, worker: Worker = _WORKER) -> VersionsReport:
    """Apply all rules to one worker, by each known version of TensorRT-LLM.

    Args:
        model: as for `library.check`, likewise what it raises.
        engine_config: likewise.
        worker: likewise; its version doesn't count.
    """
    return over_versions(lambda version: check(model, engine_config, replace(worker, trtllm_version=version)))


def over_versions(judge: Callable[[str], Report | PairReport]) -> VersionsReport:
    """Return what ``judge`` says for each known version."""
    return VersionsReport(tuple((version, judge(version)) for version in known_versions()))


def describe_versions(model: str, report: VersionsReport) -> str:
    """Format a report as a table of versions, and each finding once, with the versions that have it.

    Args:
        model: the user's name of the model.
        report: the results.
    """
    newest = report.results[-1][1]
    workers = [newest] if isinstance(newest, Report) else [newest.prefill, newest.decode]
    what = "; ".join(f"role {of.subject.role}: {of.subject.layout} on {of.subject.cluster}" for of in workers)
    rows = [[version, *_row(result)] for version, result in report.results]
    parts = [f"{model}, {what}\n{columns(['TensorRT-LLM', 'result', 'errors', 'warnings'], rows)}"]
    found: dict[tuple[str, ...], list[tuple[str, Finding]]] = {}
    for version, result in report.results:
        for of, finding in _findings(result):
            if finding.severity is not Severity.INFO:
                found.setdefault((of, finding.rule, finding.severity.value, finding.found), []).append(
                    (version, finding)
                )
    for key, cases in found.items():
        having = dict.fromkeys(version for version, _ in cases)
        versions = "every version" if len(having) == len(report.results) else ", ".join(having)
        of = f", {key[0]}" if len(workers) > 1 else ""
        parts.append(f"{versions}{of}:\n{render([cases[0][1]])}")
    return "\n\n".join(parts)


def _row(result: Report | PairReport) -> list[str]:
    findings = [finding for _, finding in _findings(result)]
    rules = [
        ", ".join(dict.fromkeys(finding.rule for finding in findings if finding.severity is severity))
        for severity in (Severity.ERROR, Severity.WARNING)
    ]
    return [summary(findings), *rules]


def _count(result: Report | PairReport, severity: Severity) -> int:
    return sum(finding.severity is severity for _, finding in _findings(result))


def _findings(result: Report | PairReport) -> Iterator[tuple[str, Finding]]:
    """Yield findings with the role of the worker that they are about, ``pair`` for those between workers."""
    if isinstance(result, Report):
        yield from ((result.subject.role, finding) for finding in result.findings)
        return
    for report in (result.prefill, result.decode):
        yield from _findings(report)
    yield from (("pair", finding) for finding in result.findings)


def _release(text: str) -> TrtllmVersion:
    """Read a version of the table; ``1.2`` is 1.2.0."""
    return parse_trtllm_version(text if text.count(".") > 1 else text + ".0" * (2 - text.count(".")))
