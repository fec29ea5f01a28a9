# SPDX-License-Identifier: Apache-2.0
"""What comes before the workers: the check of the layouts, the KV check, and the services, which run until the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import ExitCode
from dynamo_mpi.common.waiting import ReminderSchedule
from dynamo_mpi.deploy.check_results import require_check, require_container, require_kv_check
from dynamo_mpi.deploy.head_node import CHECKED
from dynamo_mpi.deploy.services import StepFailed
from dynamo_mpi.deploy.step_commands import Command, nodes_of
from dynamo_mpi.deploy.steps import Step, start

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.deploy.nodes import Worker
    from dynamo_mpi.deploy.run_dir import RunDir
    from dynamo_mpi.deploy.run_files import ServiceAccess
    from dynamo_mpi.deploy.step_commands import CommandBuilder

REMINDER_SECONDS = (15.0, 300.0)
# longer than a network file system hides a new file
UNSEEN_SECONDS = 90.0


class FirstSteps:
    """The steps that run before the workers, and beside them. Use it from the main thread.

    Args:
        builder: builds their commands.
        environment: their environment.
        run_dir: the deployment's folder.
        pause: waits a moment; raises if the end is requested.
        say: prints one line.
    """

    def __init__(
        self,
        builder: CommandBuilder,
        environment: Mapping[str, str],
        run_dir: RunDir,
        pause: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._builder, self._environment, self._run_dir, self._pause, self._say = (
            builder,
            environment,
            run_dir,
            pause,
            say,
        )
        self.services: Step | None = None
        """The services' step, once it was started."""
        self.running: dict[str, Step] = {}
        """All steps that may still run."""

    def check(self) -> None:
        """Run the check of the layouts, which may be the first part of the services' step.

        Raises:
            StepFailed: it refused them, or could not run.
        """
        in_services = self._builder.checks_in_services
        code, words = self._check_in_services() if in_services else self._run_to_end(self._builder.check())
        require_check(code, words)
        self._say("check: passed")

    def check_kv(self, workers: Sequence[Worker], *, is_needed: bool) -> None:
        """Run the KV check.

        Args:
            workers: the workers.
            is_needed: whether a failure refuses the deployment.

        Raises:
            StepFailed: it does.
        """
        code, words = self._run_to_end(self._builder.kv_check(workers))
        if warning := require_kv_check(code, words, nodes_of(workers, "prefill", "decode"), is_needed=is_needed):
            self._say(warning)

    def _run_to_end(self, command: Command) -> tuple[int, str]:
        """Run a step that ends by itself; return its exit code, and the end of its output."""
        step = self._start(command)
        code = self._wait_for_exit(step) or ExitCode.OK
        self.running.pop(step.name)
        return code, step.last_words(200)

    def _wait_for_exit(self, step: Step, is_through: Callable[[], bool] = lambda: False) -> int | None:
        """Wait until a step ends, or is through with its first part; return its exit code, if it ended."""
        reminders = ReminderSchedule(*REMINDER_SECONDS)
        while (code := step.child.exit_code()) is None and not is_through():
            if seconds := reminders.due():
                self._say(f"waiting for the {step.name}, {seconds:.0f} s; an image's import may take minutes")
            self._pause()
        return code

    def _check_in_services(self) -> tuple[int, str]:
        """Start the services' step, and wait until its check is through; return the check's exit code, and the end of its output."""
        self.services = step = self._start(self._builder.services())
        code = self._wait_for_exit(step, lambda: CHECKED in step.last_words(200))
        if code is None or CHECKED in (words := step.last_words(200)):
            return ExitCode.OK, ""
        self.services = None
        self.running.pop(step.name)
        return code or ExitCode.UNAVAILABLE, words

    def start_services(self, seconds: float, look: Callable[[], None]) -> ServiceAccess:
        """Start the services; return their addresses and credentials.

        Args:
            seconds: the longest time until they answer.
            look: called again and again meanwhile; raises if they have ended.

        Raises:
            StepFailed: they don't answer in time, or where this host can see it.
        """
        self.services = step = self.services or self._start(self._builder.services())
        deadline, seen = time.monotonic() + seconds, 0.0
        reminders = ReminderSchedule(*REMINDER_SECONDS)
        while (access := self._run_dir.services()) is None:
            look()
            if time.monotonic() > deadline:
                raise StepFailed(
                    f"the services don't answer after {seconds:g} s",
                    status=ExitCode.DEADLINE,
                    log=step.last_words(),
                    expected="etcd, NATS and the frontend answer within --start-timeout",
                    fix="a longer --start-timeout if the image's import takes long",
                )
            if waited := reminders.due():
                self._say(f"waiting for the services, {waited:.0f} s")
            if any("ready: " in line and "services.json" in line for line in step.child.last_lines(20)):
                seen = seen or time.monotonic()
                if time.monotonic() > seen + UNSEEN_SECONDS:
                    raise StepFailed(
                        f"the services are ready, but {self._run_dir.path}/services.json can't be seen from here",
                        status=ExitCode.USAGE,
                        log=step.last_words(),
                        expected="a run folder that the nodes and this host share",
                        fix="--run-dir on a file system that the nodes and this host share",
                    )
            self._pause()
        frontend = f"frontend at {access.url}" if access.url else "no frontend"
        self._say(f"services on {sanitize(access.host)}: etcd, NATS, {frontend}")
        return access

    def _start(self, command: Command) -> Step:
        step = start(command, self._environment, self._run_dir.log(command.name))
        self.running[command.name] = step
        return step

    def require_services(self) -> None:
        """Check that the services run, if they were started.

        Raises:
            StepFailed: they have ended.
        """
        step = self.services
        code = step.child.exit_code() if step is not None else None
        if step is not None and code is not None:
            require_container("services", step.last_words(200))
            found = f"the services ended with exit code {code}" + (
                "" if code else ": another process has ended their step"
            )
            raise StepFailed(
                found,
                status=code or ExitCode.UNAVAILABLE,
                log=step.last_words(),
                expected="services that run as long as the deployment",
                fix=f"correct the cause in the log, {step.child.log}, and start it again",
            )
