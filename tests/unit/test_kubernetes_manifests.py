# SPDX-License-Identifier: Apache-2.0
"""docs/guides/kubernetes/*.yaml: what a cluster would take, as far as schemas say it, and what our own programs take."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dynamo_mpi.common.credentials import CLIENT_VARIABLES, variables_in
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import load_settings
from dynamo_mpi.deploy.kubernetes.settings import load_join, load_lead
from tests.conftest import ROOT

MANIFESTS = ROOT / "docs" / "guides" / "kubernetes"
SCHEMAS = ROOT / "tests" / "data" / "kubernetes"
KINDS = {"mpijob": "mpijob-v2beta1.json", "leaderworkerset": "leaderworkerset-v1.json"}
KUBERNETES = "1.33"
# longer than what a pod may wait for the others, the load and the first completion may take by default
LONGEST_START_SECONDS = 1800 + 3600 + 60


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8")))


def templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pod templates by ``lead`` and ``join``."""
    spec = document["spec"]
    if document["kind"] == "MPIJob":
        return {
            "lead": spec["mpiReplicaSpecs"]["Launcher"]["template"],
            "join": spec["mpiReplicaSpecs"]["Worker"]["template"],
        }
    inner = spec["leaderWorkerTemplate"]
    return {"lead": inner["leaderTemplate"], "join": inner["workerTemplate"]}


def all_templates() -> list[Any]:
    return [
        pytest.param(name, part, template, id=f"{name}-{part}")
        for name in KINDS
        for part, template in templates(documents(name)[0]).items()
    ]


def validate_template(template: dict[str, Any]) -> None:
    document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", KINDS)
def test_the_resource_is_as_its_schema_has_it(name: str) -> None:
    schema = json.loads((SCHEMAS / KINDS[name]).read_text(encoding="utf-8"))
    document, policy = documents(name)
    jsonschema.validate(document, schema)
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    wrong = copy.deepcopy(document)
    wrong["spec"]["podFailurePolicy"] = {}
    with pytest.raises(jsonschema.ValidationError, match="podFailurePolicy"):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(("name", "part", "template"), all_templates())
def test_the_pods_are_as_kubernetes_has_them(name: str, part: str, template: dict[str, Any]) -> None:
    validate_template(template)
    wrong = copy.deepcopy(template)
    wrong["spec"]["containers"][0]["startupProbe"]["httpGet"]["host_port"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="host_port"):
        validate_template(wrong)


@pytest.mark.parametrize(("name", "part", "template"), all_templates())
def test_our_programs_take_what_the_pods_say(name: str, part: str, template: dict[str, Any], tmp_path: Any) -> None:
    (container,) = template["spec"]["containers"]
    environ = {variable["name"]: variable.get("value", "1") for variable in container["env"]}
    assert any(mount["mountPath"] == "/run/secrets/dynamo-mpi-pods" for mount in container["volumeMounts"])
    (tmp_path / "secret").write_text("0" * 32)
    environ["DYN_MPI_PODS_SECRET_FILE"] = str(tmp_path / "secret")
    if name == "leaderworkerset":  # it sets them in every container
        environ |= {
            "LWS_GROUP_SIZE": "2",
            "LWS_WORKER_INDEX": "1",
            "LWS_LEADER_ADDRESS": "dynamo-decode-0.dynamo-decode.ns",
        }
    assert container["command"][:4] == ["python3", "-m", "dynamo_mpi.pods", part]
    words = container["command"][4:]
    if part == "join":
        joining = load_join(words, environ, "dynamo-decode-worker-0")
        assert joining.leader.startswith("dynamo-decode")
        assert joining.index == 1
        return
    leading = load_lead(words, environ)
    assert (leading.pods, leading.ranks_per_pod) == (2, int(container["resources"]["limits"]["nvidia.com/gpu"]))
    assert leading.port in [port["containerPort"] for port in container["ports"]]
    assert leading.command[:3] == ("python3", "-m", "dynamo_mpi.worker")
    worker = load_settings(WorkerSources(leading.command[3:], environ))
    assert template["spec"]["terminationGracePeriodSeconds"] > worker.drain_timeout + 60
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > LONGEST_START_SECONDS
    assert worker.load_timeout + leading.timeout < LONGEST_START_SECONDS


def test_the_guides_services_file_is_one() -> None:
    guide = (MANIFESTS.parent / "kubernetes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^cat > services.json <<'END'.*?\n(.*?)^END$", guide, re.DOTALL | re.MULTILINE)
    content = json.loads(text)
    assert variables_in(content) == content["environment"]


def test_the_guides_commands_make_the_file_its_owners_and_name_no_secret(tmp_path: Path) -> None:
    guide = (MANIFESTS.parent / "kubernetes.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^(openssl rand .*?)^kubectl create configmap", guide, re.DOTALL | re.MULTILINE)
    # instead of kubectl: its words, what it reads, and the rights of the file
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@"\nfor word; do file=${word#--from-file=*=}; done\ncat "$file" | wc -c\n')
    kubectl.chmod(0o755)
    script = script.replace("&& rm services.json", "&& stat -c %a services.json")
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", "-ec", f"umask 022; {script}"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "create secret generic dynamo-mpi-pods --from-file=secret=/dev/stdin",
        "65",
        "create secret generic dynamo-services --from-file=services.json=services.json",
        str((tmp_path / "services.json").stat().st_size),
        "600",
    ]


@pytest.mark.parametrize(("name", "part", "template"), all_templates())
def test_what_every_pod_has(name: str, part: str, template: dict[str, Any]) -> None:
    spec = template["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert spec["automountServiceAccountToken"] is False
    environ = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert not set(environ) & set(CLIENT_VARIABLES), "the services file would replace them, and secrets belong there"
    assert not any("secretKeyRef" in variable.get("valueFrom", {}) for variable in container["env"])
    folder, _, key = str(environ["DYN_MPI_SERVICES_FILE"]).rpartition("/")
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == folder]
    assert mount["readOnly"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mount["name"]]
    assert (volume["secret"]["defaultMode"], spec["securityContext"]["fsGroup"]) == (0o440, 1000)
    guide = (MANIFESTS.parent / "kubernetes.md").read_text(encoding="utf-8")
    assert f"kubectl create secret generic {volume['secret']['secretName']} --from-file={key}=" in guide
    assert [name for name in environ if not re.fullmatch("[A-Z_]+", name)] == []
    assert next(volume for volume in spec["volumes"] if volume["name"] == "shm")["emptyDir"]["medium"] == "Memory"
    port = next(port for port in container["ports"] if port["name"] == "system")["containerPort"]
    assert {"name": "DYN_SYSTEM_PORT", "value": str(port)} in container["env"]
    paths = {
        probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"startupProbe": "/health", "readinessProbe": "/health", "livenessProbe": "/live"}
    assert not any("ssh" in word for word in container["command"])
