"""deploy/kubernetes: valid by the schemas of Kubernetes and KEDA, and in agreement with the program."""

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from streamworker import settings
from streamworker.settings import Settings
from streamworker.worker import HAND_BACK, UNWIND
from streamworker.worker.metrics import WANTED
from tests.deploy.tools import jsonschema_complaints

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
FILES = sorted(KUBERNETES.glob("*/*.yaml"))
SECRET = "/run/secrets/streamworker/"


def documents():
    """(file, document) of every manifest, kustomizations left out."""
    for file in FILES:
        if file.name != "kustomization.yaml":
            for document in yaml.safe_load_all(file.read_text()):
                yield pytest.param(document, id=f"{file.parent.name}/{file.name}:{document['kind']}")


ALL = [param.values[0] for param in documents()]
OURS = {"ScaledObject", "TriggerAuthentication"}


def of_kind(kind):
    return {each["metadata"]["name"]: each for each in ALL if each["kind"] == kind}


DEPLOYMENTS = of_kind("Deployment")
PODS = {
    **{name: each["spec"]["template"] for name, each in DEPLOYMENTS.items()},
    **{name: each["spec"]["template"] for name, each in of_kind("Job").items()},
}
CONTAINERS = [
    pytest.param(container, id=f"{name}/{container['name']}")
    for name, pod in PODS.items()
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("document", [param for param in documents() if param.values[0]["kind"] not in OURS])
def test_kubernetes_takes_it(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_a_mistake_is_found():
    worker = DEPLOYMENTS["streamworker-worker"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**worker, "spec": {**worker["spec"], "replica": 2}}, "1.37", strict=True)


def test_keda_takes_it(tmp_path):
    schema = Path(__file__).with_name("keda.schema.json")
    files = []
    for number, document in enumerate(each for each in ALL if each["kind"] in OURS):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(document))
    assert len(files) == 1
    assert jsonschema_complaints(["--schemafile", schema], *files) == ""
    files[0].write_text(files[0].read_text().replace("targetValue: '100'", "targetValue: 100"))
    assert "is not valid under any of the given schemas" in jsonschema_complaints(["--schemafile", schema], *files)


# The manifests themselves are checked above.
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl: kubernetes.io/docs/tasks/tools")
@pytest.mark.parametrize("overlay", ["base", "keda", "hpa"])
def test_kustomize_puts_it_together(overlay):
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / overlay], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    for document in built:
        if document["kind"] not in OURS:
            kubernetes_validate.validate(document, "1.37", strict=True)
    (worker,) = (
        each for each in built if each["metadata"]["name"] == "streamworker-worker" and each["kind"] == "Deployment"
    )
    assert ("replicas" in worker["spec"]) == (overlay == "base")
    (settings_map,) = (each["metadata"]["name"] for each in built if each["kind"] == "ConfigMap")
    container = worker["spec"]["template"]["spec"]["containers"][0]
    assert container["envFrom"] == [{"configMapRef": {"name": settings_map}}]
    assert container["image"] == "streamworker:example"
    relays = [
        each for each in built if each["metadata"]["name"] == "streamworker-relay" and each["kind"] == "Deployment"
    ]
    assert len(relays) == (overlay != "base")
    for relay in relays:
        (container,) = relay["spec"]["template"]["spec"]["containers"]
        assert (container["image"], container["envFrom"]) == (
            "streamworker:example", [{"configMapRef": {"name": settings_map}}]
        )  # fmt: skip


@pytest.mark.parametrize("folder", ["base", "keda", "hpa", "relay"])
def test_every_file_is_used(folder):
    kustomization = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())
    assert {name for name in kustomization["resources"] if not name.startswith("..")} == {
        file.name for file in FILES if file.parent.name == folder and file.name != "kustomization.yaml"
    }


def test_every_setting_is_one():
    names = [container["name"] for param in CONTAINERS for container in param.values[0].get("env", [])]
    for folder in ("base", "keda", "hpa"):
        (made,) = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())["configMapGenerator"]
        values = dict(line.split("=", 1) for line in made["literals"])
        names += values
        Settings.load({**values, "DATABASE_URL": "postgresql://h/d"}, tty=False)
    assert {name.removesuffix("_FILE") for name in names} <= set(settings._KNOWN)


@pytest.mark.parametrize("container", CONTAINERS)
def test_passwords_are_files_of_the_secret(container):
    for each in container.get("env", []):
        if "URL" in each["name"]:
            assert each["name"].endswith("_URL_FILE")
            key = each["name"].removesuffix("_FILE").lower().replace("_", "-")
            assert each["value"] == SECRET + key
    assert {"name": "secrets", "mountPath": SECRET.rstrip("/"), "readOnly": True} in container["volumeMounts"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_have_no_rights(container):
    assert container["image"] == "streamworker"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("pod", list(PODS.values()), ids=list(PODS))
def test_pods_have_no_rights(pod):
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert (
        f"USER {spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
        in (ROOT / "Dockerfile").read_text()
    )


def test_the_kubelet_waits_longer_than_a_drain_takes():
    spec = PODS["streamworker-worker"]["spec"]
    _, before = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert spec["terminationGracePeriodSeconds"] > float(before) + Settings().grace + HAND_BACK + UNWIND


def test_probes_ask_where_health_answers():
    container = PODS["streamworker-worker"]["spec"]["containers"][0]
    (made,) = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())["configMapGenerator"]
    port = container["ports"][0]
    assert f"STREAMWORKER_HTTP=0.0.0.0:{port['containerPort']}" in made["literals"]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert {container[name]["httpGet"]["port"] for name in paths} == {port["name"]}


def test_selectors_meet_their_pods():
    for each in DEPLOYMENTS.values():
        assert each["spec"]["selector"]["matchLabels"] == each["spec"]["template"]["metadata"]["labels"]
    (budget,) = of_kind("PodDisruptionBudget").values()
    assert budget["spec"]["selector"]["matchLabels"] == PODS["streamworker-worker"]["metadata"]["labels"]


def test_keda_reads_our_relay_and_scales_our_workers():
    (scaled,) = of_kind("ScaledObject").values()
    assert scaled["spec"]["scaleTargetRef"]["name"] in DEPLOYMENTS
    (trigger,) = scaled["spec"]["triggers"]
    service = of_kind("Service")["streamworker-relay"]
    (port,) = service["spec"]["ports"]
    assert trigger["metadata"]["url"] == f"http://{service['metadata']['name']}:{port['port']}/scale"
    assert service["spec"]["selector"] == PODS["streamworker-relay"]["metadata"]["labels"]
    (container,) = PODS["streamworker-relay"]["spec"]["containers"]
    assert {"name": port["targetPort"], "containerPort": 8080} in container["ports"]
    assert trigger["metadata"]["valueLocation"] == "queues.mail.slots"
    assert trigger["metadata"]["targetValue"] == str(Settings().concurrency)


def test_the_autoscaler_reads_a_metric_of_our_relay_and_scales_our_workers():
    (scaled,) = of_kind("HorizontalPodAutoscaler").values()
    assert scaled["spec"]["scaleTargetRef"]["name"] in DEPLOYMENTS
    (metric,) = scaled["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] == WANTED.name
    assert list(metric["external"]["metric"]["selector"]["matchLabels"]) == list(WANTED.labels)
    assert metric["external"]["target"]["averageValue"] == str(Settings().concurrency)
