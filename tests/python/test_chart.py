"""The Helm chart: what it renders is valid, complete and closed to mistakes."""

import os
import subprocess

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

CHART = ROOT / "helm/avatar"
STAGES = ["audio-encoder", "text-encoder", "image-encoder", "diffusion", "vae-decode"]
COMPONENTS = [*STAGES, "gateway"]
KUBERNETES = ["1.27", "1.37"]

VARIANTS = {
    "defaults": [],
    "host folder": ["models.existingClaim=", "models.hostPath=/srv/models", "models.subPath=tiny"],
    "all options": [
        "networkPolicy.enabled=true",
        "networkPolicy.gatewayFrom[0].namespaceSelector.matchLabels.team=video",
        "podDisruptionBudget.enabled=true",
        "gateway.data.existingClaim=videos",
        "gateway.replicas=3",
        "gateway.database.url=postgres://avatar@db:5432/avatar",
        "gateway.database.passwordSecret.name=db",
        "gateway.artifacts.url=s3://films/avatar",
        "gateway.artifacts.endpoint=http://store:9000",
        "gateway.artifacts.plainHttp=true",
        "gateway.artifacts.credentialsSecret.name=bucket",
        "gateway.webhooks.secret.name=hooks",
        "gateway.webhooks.allow[0]=hooks.example:8080",
        "gateway.webhooks.allow[1]=other",
        "gateway.service.type=LoadBalancer",
        "gateway.service.annotations.a=b",
        "image.pullSecrets[0].name=registry",
        "stages.diffusion.nodeSelector.disk=fast",
        "stages.diffusion.tolerations[0].operator=Exists",
        "podAnnotations.a=b",
        "podLabels.c=d",
        "serviceAccount.annotations.e=f",
    ],
    "own names": ["fullnameOverride=talk", "serviceAccount.create=false", "serviceAccount.name=other", "image.tag=9.9.9"],
}  # fmt: skip


@pytest.fixture
def render(helm: str):
    """Renders the chart with settings."""

    def template(*settings: str) -> subprocess.CompletedProcess[str]:
        flags = [part for setting in settings for part in ("--set", setting)]
        return subprocess.run([helm, "template", "rel", CHART, *flags], capture_output=True, text=True, timeout=60)

    return template


def objects(rendered: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict]:
    """What was rendered, by kind and name."""
    assert rendered.returncode == 0, rendered.stderr
    documents = [document for document in yaml.safe_load_all(rendered.stdout) if document]
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    assert len(found) == len(documents), "two objects have the same name"
    return found


def container(deployment: dict) -> dict:
    """The one container of a Deployment."""
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def flag(deployment: dict, name: str) -> str:
    """Value of a flag of the container."""
    args = container(deployment)["args"]
    return args[args.index(name) + 1]


def test_helm_lint_finds_nothing(helm: str) -> None:
    linted = subprocess.run([helm, "lint", "--strict", CHART], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_rendered_objects_are_valid(render, settings: list[str], version: str) -> None:
    for rendered in objects(render(*settings)).values():
        kubernetes_validate.validate(rendered, version, strict=True)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_component_is_there_and_locked_down(render, settings: list[str]) -> None:
    found = objects(render(*settings))
    prefix = "talk" if "fullnameOverride=talk" in settings else "rel-avatar"
    assert {name for kind, name in found if kind == "Deployment"} == {f"{prefix}-{name}" for name in COMPONENTS}
    assert {name for kind, name in found if kind == "Service"} == {f"{prefix}-{name}" for name in COMPONENTS}
    for component in COMPONENTS:
        deployment, service = found["Deployment", f"{prefix}-{component}"], found["Service", f"{prefix}-{component}"]
        pod, only = deployment["spec"]["template"]["spec"], container(deployment)
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert only["image"].split(":")[0] == f"avatar/{component}"
        assert pod["securityContext"]["runAsNonRoot"] and only["securityContext"]["readOnlyRootFilesystem"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["terminationGracePeriodSeconds"] > int(flag(deployment, "--drain-timeout").removesuffix("s"))
        ports = {port["name"]: port["containerPort"] for port in only["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert only[probe]["grpc"]["port"] == ports["grpc"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports
        assert {mount["name"] for mount in only["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_gateway_finds_every_stage(render) -> None:
    found = objects(render("stages.diffusion.port=6000"))
    gateway = found["Deployment", "rel-avatar-gateway"]
    for stage in STAGES:
        (port,) = found["Service", f"rel-avatar-{stage}"]["spec"]["ports"]
        assert flag(gateway, f"--{stage}") == f"http://rel-avatar-{stage}:{port['port']}"
        assert flag(found["Deployment", f"rel-avatar-{stage}"], "--listen") == f"0.0.0.0:{port['port']}"


def test_the_form_of_the_weights_reaches_the_diffusion_stage_alone(render) -> None:
    found = objects(render("models.weights=fp8"))
    assert flag(found["Deployment", "rel-avatar-diffusion"], "--weights") == "fp8"
    for stage in set(STAGES) - {"diffusion"}:
        assert "--weights" not in container(found["Deployment", f"rel-avatar-{stage}"])["args"]


def test_the_image_is_the_charts_version_and_never_latest(render) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    rendered = render()
    for (kind, _), found in objects(rendered).items():
        if kind == "Deployment":
            assert container(found)["image"].endswith(f":{version}")
    assert "latest" not in rendered.stdout


def test_the_chart_has_the_workspaces_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    workspace = next(line for line in (ROOT / "Cargo.toml").read_text().splitlines() if line.startswith("version = "))
    assert workspace == f'version = "{chart["appVersion"]}"'


def test_several_gateways_share_a_database_and_secrets_come_as_files(render) -> None:
    gateway = objects(render(*VARIANTS["all options"]))["Deployment", "rel-avatar-gateway"]
    assert gateway["spec"]["replicas"] == 3 and gateway["spec"]["strategy"]["type"] == "RollingUpdate"
    assert flag(gateway, "--database") == "postgres://avatar@db:5432/avatar"
    assert flag(gateway, "--webhook-allow") == "hooks.example:8080,other"
    volumes = {volume["name"]: volume for volume in gateway["spec"]["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount for mount in container(gateway)["volumeMounts"]}
    for name, secret, used in [
        ("database", ("db", "password"), "--database-password-file"),
        ("artifacts", ("bucket", "credentials"), "--artifacts-credentials-file"),
        ("webhooks", ("hooks", "secret"), "--webhook-secret-file"),
    ]:
        (item,) = volumes[name]["secret"]["items"]
        assert (volumes[name]["secret"]["secretName"], item["key"]) == secret
        assert flag(gateway, used) == f"{mounts[name]['mountPath']}/{item['path']}" and mounts[name]["readOnly"]
    bucket = ["gateway.artifacts.url=gs://films", "gateway.database.url=postgres://me@db/avatar", "gateway.replicas=2"]
    claimless = objects(render(*bucket))["Deployment", "rel-avatar-gateway"]
    assert flag(claimless, "--artifacts") == "gs://films"
    assert not any("persistentVolumeClaim" in volume for volume in claimless["spec"]["template"]["spec"]["volumes"])
    alone = objects(render())["Deployment", "rel-avatar-gateway"]
    assert alone["spec"]["replicas"] == 1 and alone["spec"]["strategy"]["type"] == "Recreate"
    assert not {"--database", "--artifacts"} & set(container(alone)["args"])


@pytest.mark.parametrize("settings", [VARIANTS["defaults"], VARIANTS["all options"]], ids=["defaults", "all options"])
def test_flags_are_those_of_the_programs(render, settings: list[str]) -> None:
    deployments = [found for (kind, _), found in objects(render(*settings)).items() if kind == "Deployment"]
    for found in deployments:
        program = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "debug" / container(found)["name"]
        assert program.exists(), f"{program} is not built: run `make build` first"
        told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
        known = told.split()
        for used in (argument for argument in container(found)["args"] if argument.startswith("--")):
            assert used in known, f"{program.name} has no {used}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["nonsense=1"], ["nonsense"]),
        (["stages.difusion.port=1"], ["difusion"]),
        (["stages.diffusion=null"], ["diffusion"]),
        (["stages.diffusion.replicas=2"], ["replicas"]),
        (["stages.diffusion.port=0"], ["port", "1024"]),
        (["stages.diffusion.queue=many"], ["queue"]),
        (["stages.diffusion.device=cuda:0"], ["device", "cpu"]),
        (["gateway.maxAudioSeconds=601"], ["maxAudioSeconds", "600"]),
        (["gateway.service.type=Ingress"], ["type"]),
        (["image.tag=latest"], ["image.tag", "name the version to run"]),
        (["log.format=xml"], ["format"]),
        (["models.weights=q8_0"], ["weights", "fp8"]),
        (["models.existingClaim="], ["both empty", "set one of them"]),
        (["models.hostPath=/srv"], ["both set", "one place"]),
        (["models.existingClaim=", "models.hostPath=srv"], ["hostPath"]),
        (["gateway.httpPort=50050"], ["grpcPort", "httpPort", "50050"]),
        (["gateway.replicas=2"], ["gateway.replicas is 2", "database.url", "artifacts.url", "existingClaim"]),
        (["gateway.artifacts.credentialsSecret.name=b"], ["no bucket"]),
        (["gateway.artifacts.url=ftp://films"], ["url"]),
        (["gateway.artifacts.url=s3://films", "gateway.artifacts.plainHttp=true"], ["plainHttp", "no effect"]),
        (["gateway.database.passwordSecret.name=db"], ["database.url is empty"]),
        (["gateway.database.url=postgres://me:word@db/avatar"], ["url"]),
        (["gateway.webhooks.allow[0]=hooks"], ["nobody would be called"]),
        (["networkPolicy.gatewayFrom[0].podSelector.matchLabels.a=b"], ["gatewayFrom", "no effect"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_wrong_values_are_refused_in_words(render, settings: list[str], words: list[str]) -> None:
    refused = render(*settings)
    assert refused.returncode != 0
    for word in words:
        assert word in refused.stderr
