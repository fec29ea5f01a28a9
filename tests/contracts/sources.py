# SPDX-License-Identifier: Apache-2.0
# mypy: implicit-reexport
# ruff: noqa: F401
"""What of the package the contracts are made of: the one place here that imports it.

A contract doesn't depend on where a thing stands, or on its class's name. Where one has moved, correct this file alone; no golden file
may differ afterwards.
"""

from __future__ import annotations

from dynamo_mpi import __version__ as VERSION
from dynamo_mpi.checks.fabric import figures_of as fabric_figures
from dynamo_mpi.checks.fabric_steps import FabricAnswer, Measured, Step
from dynamo_mpi.checks.gpu_check import figures_of as gpu_figures
from dynamo_mpi.checks.gpu_facts import GpuFacts
from dynamo_mpi.checks.gpu_health import GpuHealth
from dynamo_mpi.checks.host_facts import HostFacts
from dynamo_mpi.checks.rank_report import ComparedFile, RankReport, ReportRequest
from dynamo_mpi.cli import check as check_verb
from dynamo_mpi.cli import doctor as doctor_verb
from dynamo_mpi.cli import down as down_verb
from dynamo_mpi.cli import plan as plan_verb
from dynamo_mpi.cli import replace as replace_verb
from dynamo_mpi.cli import stage as stage_verb
from dynamo_mpi.cli import status as status_verb
from dynamo_mpi.cli import timeline as timeline_verb
from dynamo_mpi.cli import wait as wait_verb
from dynamo_mpi.cli.local import failure as local_failure
from dynamo_mpi.cli.local import success as local_success
from dynamo_mpi.cli.main import VERBS
from dynamo_mpi.cli.main import main as dynamo_mpi_main
from dynamo_mpi.common.errors import MISTAKES, DynamoMpiError, ExitCode, PhaseTimeoutError, UsageError, of_signal
from dynamo_mpi.common.failure import DetectedBy, Failure
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.log_record import Level, Line
from dynamo_mpi.common.phases import PHASES, PhaseTracker, RankTimings, Span
from dynamo_mpi.common.phases import PhaseProgress as Progress
from dynamo_mpi.common.signals import Interrupts
from dynamo_mpi.config.options import Option
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.config.worker_options import OPTIONS as WORKER_OPTIONS
from dynamo_mpi.deploy.controller import DeploymentController, LaunchContext
from dynamo_mpi.deploy.head_node import main as head_node_main
from dynamo_mpi.deploy.head_node import services as services_json
from dynamo_mpi.deploy.head_node_settings import OPTIONS as HEAD_NODE_OPTIONS
from dynamo_mpi.deploy.kubernetes.__main__ import main as pods_main
from dynamo_mpi.deploy.kubernetes.settings import JOIN_OPTIONS, LEAD_OPTIONS
from dynamo_mpi.deploy.local.ask import Answer
from dynamo_mpi.deploy.local.stack import Ready, StackSettings
from dynamo_mpi.deploy.local.workers import WorkerSpec
from dynamo_mpi.deploy.nodes import Placement
from dynamo_mpi.deploy.nodes import Worker as LaunchedWorker
from dynamo_mpi.deploy.run_dir import RunDir
from dynamo_mpi.deploy.services import ServiceError, StepFailed
from dynamo_mpi.deploy.settings import OPTIONS as LAUNCH_OPTIONS
from dynamo_mpi.deploy.settings import read_settings as read_launch_settings
from dynamo_mpi.deploy.step_commands import Command
from dynamo_mpi.deploy.steps import MpirunStepController
from dynamo_mpi.discovery.etcd import KeyValue
from dynamo_mpi.discovery.failure_records import (
    FailureRecord,
    WorkerIdentity,
    failure_key,
    failure_record,
    list_failures,
)
from dynamo_mpi.discovery.lifecycle_events import EVENTS, LifecycleEvent, event_of
from dynamo_mpi.discovery.records import LAUNCH_VARIABLE, WorkerRecord, list_workers, record_key
from dynamo_mpi.discovery.records import Progress as RecordedProgress
from dynamo_mpi.discovery.schema import json_schema
from dynamo_mpi.engines.reference.convert_gguf import main as model_files_main
from dynamo_mpi.layout.finding import Finding, Severity
from dynamo_mpi.layout.finding import render as render_findings
from dynamo_mpi.ops.deployment import Deployment, DeploymentEnd, ExpectedWorker, NodeNote, RunningLaunch
from dynamo_mpi.ops.doctor.check import Status, error, ok, skipped, warning
from dynamo_mpi.ops.doctor.runner import SECTIONS as DOCTOR_SECTIONS
from dynamo_mpi.ops.doctor.runner import Report as DoctorReport
from dynamo_mpi.ops.doctor.runner import SectionReport
from dynamo_mpi.ops.readiness import MissingItem
from dynamo_mpi.ops.status import DeploymentStatus, Service
from dynamo_mpi.ops.status_output import as_json as status_json
from dynamo_mpi.ops.status_output import error_as_json
from dynamo_mpi.ops.wait import WaitResult
from dynamo_mpi.runtime.main import main as worker_main
from dynamo_mpi.runtime.worker_hooks import LeaderHooks
from dynamo_mpi.runtime.worker_record import ReadyFile
from dynamo_mpi.supervisor.agent_failures import ObservedFailure, compose_report
from dynamo_mpi.supervisor.agent_writer import ReportWriter
from dynamo_mpi.supervisor.fault_injection import ACTIONS
from dynamo_mpi.supervisor.rendezvous import Rendezvous
from dynamo_mpi.telemetry.health_state import HealthState, health, live, metrics_of
from dynamo_mpi.telemetry.metrics import WorldNumbers, metrics_of_world
from dynamo_mpi.telemetry.metrics import render as render_metrics
from dynamo_mpi.telemetry.progress import facts as progress_facts
from dynamo_mpi.telemetry.sd_notify import SystemdNotifier
from dynamo_mpi.telemetry.startup_trace import ENDED, FAILED, READY, STOPPED
from dynamo_mpi.telemetry.startup_trace import encode_traces as pack_starts
from dynamo_mpi.telemetry.timeline_text import perfetto_trace as trace
from tools.gen_docs.environment import VARIABLES
from tools.gen_docs.markdown import member_notes
from tools.gen_docs.rules import render as rules_page
