"""The Kubernetes manifests against KubeRay's own schema and that of the core kinds; typing errors are found."""

import copy
import gzip
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants

from cria_dist import config_file
from cria_dist.runtime import session

SCHEMAS = Path(__file__).parent / "schemas"
RAY_FILES = ("rayjob.yaml", "rayjob-kueue.yaml", "raycluster.yaml")
KUBERNETES = "1.34"


def strict(schema: Any) -> Any:
    """A structural schema as JSON schema: unknown keys are errors, as the API server prunes them silently."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


def schema_of(kind: str) -> dict[str, Any]:
    schema = strict(json.loads(gzip.decompress((SCHEMAS / f"{kind.lower()}-v1.json.gz").read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def complaints(document: dict[str, Any]) -> list[str]:
    """What the API server would not take, or drop."""
    if document["apiVersion"] == "ray.io/v1":
        validator = jsonschema.Draft7Validator(schema_of(document["kind"]))
        return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


@pytest.fixture
def load(repository: Path) -> Callable[[str], list[dict[str, Any]]]:
    return lambda name: list(yaml.safe_load_all((repository / "cluster" / name).read_text()))


@pytest.mark.parametrize("name", [*RAY_FILES, "storage.yaml", "network.yaml"])
def test_manifests_are_what_the_api_server_takes(load: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    for document in load(name):
        assert complaints(document) == []


TYPING_ERRORS: list[tuple[str, str, Any]] = [
    ("rayjob.yaml", "spec.entryPoint", "x"),
    ("rayjob.yaml", "spec.backoffLimit", "3"),
    ("rayjob.yaml", "spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
    ("rayjob.yaml", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.imagePullPolizy", "Always"),
    ("rayjob-kueue.yaml", "spec.suspended", True),
    ("rayjob-kueue.yaml", "spec.rayClusterSpec.authOptions.mode", "tokens"),
    ("raycluster.yaml", "spec.networkPolicy", {"mode": "DenyIngress"}),
    ("network.yaml", "spec.ingres", []),
    ("network.yaml", "spec.ingress.1.ports.0.protocol", ["TCP"]),
    ("raycluster.yaml", "spec.autoscalerOptions.version", "v3"),
    ("raycluster.yaml", "spec.workerGroupSpecs.1.template.spec.toleration", []),
    ("storage.yaml", "spec.accessMode", ["ReadWriteMany"]),
    ("storage.yaml", "spec.resources.requests.storage", ["2Ti"]),
]


@pytest.mark.parametrize(("name", "path", "value"), TYPING_ERRORS)
def test_a_typing_error_is_found(load: Callable[[str], list[dict[str, Any]]], name: str, path: str, value: Any) -> None:
    document = copy.deepcopy(load(name)[0])
    *parents, leaf = path.split(".")
    place: Any = document
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[leaf] = value
    found = complaints(document)
    assert found
    assert any(leaf in one or str(value) in one for one in found)


UNPRIVILEGED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pod specs of a cluster, and of what submits to it: (group, spec)."""
    if "rayClusterSpec" in document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]["spec"]
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("name", RAY_FILES)
def test_clusters_ask_for_a_token_and_run_without_privileges(
    load: Callable[[str], list[dict[str, Any]]], name: str
) -> None:
    [document] = load(name)
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    if "autoscalerOptions" in spec:
        assert spec["autoscalerOptions"]["securityContext"] == UNPRIVILEGED, "a container of the head's pod"
    for group, pod in pods(document):
        context = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        assert pod["securityContext"] == {**context, "seccompProfile": {"type": "RuntimeDefault"}}, group
        [container] = pod["containers"]
        assert container["securityContext"] == UNPRIVILEGED
        assert "env" not in container, "credentials come from the workload's identity"
        assert group == "head" or pod["automountServiceAccountToken"] is False


def test_only_pods_of_the_cluster_reach_all_its_ports(load: Callable[[str], list[dict[str, Any]]]) -> None:
    [policy] = load("network.yaml")
    ours = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["spec"]["podSelector"] == ours
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    open_to = [rule["from"] for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert open_to == [[{"podSelector": ours}]]
    [job, operator] = policy["spec"]["ingress"][1]["from"]
    assert job == {"podSelector": {"matchExpressions": [{"key": "batch.kubernetes.io/job-name", "operator": "Exists"}]}}
    assert operator["podSelector"] == {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    ports = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert ports == {8265, 8080}


@pytest.mark.parametrize("name", RAY_FILES)
def test_versions_storage_and_shared_memory(
    load: Callable[[str], list[dict[str, Any]]], name: str, ray_version: str, package_version: str
) -> None:
    [document] = load(name)
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["rayVersion"] == ray_version
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group, pod in pods(document):
        [container] = pod["containers"]
        kind = "cpu" if group in ("head", "submitter") else "gpu"
        assert container["image"].endswith(f":{package_version}-{kind}")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (kind == "gpu")
        if group == "submitter":
            continue
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert (mounts["runs"], mounts["shm"]) == ("/mnt/cria", "/dev/shm")


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", RAY_FILES)
def test_shared_memory_holds_the_object_store(load: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    """Where it does not, Ray puts its objects into /tmp."""
    [document] = load(name)
    groups = {group: pod for group, pod in pods(document) if group != "submitter"}
    assert len(groups) > 1
    for group, pod in groups.items():
        [limit] = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm"]
        memory = gibibytes(pod["containers"][0]["resources"]["limits"]["memory"])
        assert gibibytes(limit) >= ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory, group


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayjob-kueue.yaml"])
def test_a_run_waits_for_the_nodes_it_may_have(
    load: Callable[[str], list[dict[str, Any]]], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A retry finds a fresh cluster of one GPU, and may have a recovery of several workers left to do."""
    [document], [_, settings] = load(name), load("storage.yaml")
    path = tmp_path / "run.toml"
    path.write_text(settings["data"]["run.toml"])
    overrides = document["spec"]["entrypoint"].partition(" /etc/cria/run.toml")[2].split()
    config = config_file.load(str(path), overrides)
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    most = sum(group["maxReplicas"] for group in document["spec"]["rayClusterSpec"]["workerGroupSpecs"])
    assert session.grows(config)
    assert session.gpus_per_worker(config) == 1
    assert config.training_workers <= session._workers(config) <= most
    assert session._workers(config) > 1


def test_jobs_run_the_configuration_beside_them_and_try_again(load: Callable[[str], list[dict[str, Any]]]) -> None:
    claim, map_ = load("storage.yaml")
    config = config_file.parse(tomllib.loads(map_["data"]["run.toml"]))
    assert config.run.root == "/mnt/cria/runs"
    for name, overrides in (("rayjob.yaml", ""), ("rayjob-kueue.yaml", " run.workers=4 recover.workers=4")):
        [document] = load(name)
        spec = document["spec"]
        assert spec["backoffLimit"] == 3
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["entrypoint"] == f"python -m cria_dist prune /etc/cria/run.toml{overrides}"
        volumes = {one["name"]: one for one in dict(pods(document))["head"]["volumes"]}
        assert volumes["run"]["configMap"]["name"] == map_["metadata"]["name"]
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    [queued] = load("rayjob-kueue.yaml")
    assert queued["spec"]["suspend"] is True
    assert "enableInTreeAutoscaling" not in queued["spec"]["rayClusterSpec"]
    assert queued["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "cria"}


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_spot_comes_before_on_demand(load: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    [document] = load(name)
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    spot, on_demand = spec["workerGroupSpecs"]
    assert [one["labels"]["ray.io/market-type"] for one in (spot, on_demand)] == ["spot", "on-demand"]
    assert spot["priority"] > on_demand["priority"]
    assert (spot["minReplicas"], on_demand["minReplicas"]) == (0, 1)
