"""What is deployed is what the checkers of its own field accept, and what the server really is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from winnow.engine.models.tokenizer import load_tokenizer
from winnow.server.metrics import Metrics
from winnow.server.settings import Settings, load

from ..server.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def manifests(name: str) -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / name).read_text())}


kubernetes = pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes.cuda.yaml"])


def test_the_dockerfile_is_clean() -> None:
    run(BIN / "hadolint", "Dockerfile")


def test_the_image_has_what_it_copies() -> None:
    """What the Dockerfile copies exists, and .dockerignore lets it in."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_images_are_pinned_unprivileged_and_pass_signals_on() -> None:
    stages = re.split(r"^(?=FROM )", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", stages[0], re.MULTILINE))
    final = {stage.split()[3]: stage for stage in stages[1:] if "ENTRYPOINT" in stage}
    assert set(final) == {"cpu", "cuda"}
    assert "AS cpu" in stages[-1], "the last one is built when none is named"
    for stage in stages[1:]:
        _, tag = re.sub(r"\${(\w+)}", lambda match: defaults[match[1]], stage.split()[1]).split(":")
        assert re.match(r"\d+\.\d+\.\d+-", tag), "a version to the last digit"
    for name, stage in final.items():
        assert re.search(r"^USER [1-9]\d*$", stage, re.MULTILINE), name
        assert re.search(r'^ENTRYPOINT \["winnow", "serve"\]$', stage, re.MULTILINE), name
        assert "/ready" in stage and "VOLUME /models" in stage, name
    assert "WINNOW_DEVICE=cuda" in final["cuda"]


def test_compose_is_valid() -> None:
    for name in ("compose.yaml", "compose.cuda.yaml"):
        run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", f"deploy/{name}")
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source


def test_compose_on_a_gpu() -> None:
    """The second file names the image's target for GPUs, a GPU, and nothing else that the first does not have."""
    first, second = (
        yaml.safe_load((DEPLOY / name).read_text())["services"] for name in ("compose.yaml", "compose.cuda.yaml")
    )
    assert second.keys() <= first.keys()
    winnow = second["winnow"]
    assert winnow["build"]["target"] == "cuda"
    assert winnow["environment"]["WINNOW_DEVICE"] == "cuda"
    (device,) = winnow["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_compose_has_a_second_model_where_the_first_leaves_room() -> None:
    files = [yaml.safe_load((DEPLOY / name).read_text()) for name in ("compose.yaml", "compose.cuda.yaml")]
    said = [file["services"]["winnow"]["environment"]["WINNOW_VISION_MODEL"] for file in files]
    assert said == ["${WINNOW_VISION_MODEL-mosaic}", "${WINNOW_VISION_MODEL:-}"]
    assert len(load(vision_model="mosaic").of_models) == 2
    assert len(load(vision_model="").of_models) == 1


@kubernetes
def test_the_kubernetes_manifest_is_valid(name: str) -> None:
    run(BIN / "kubernetes-validate", "--strict", f"deploy/{name}")


def test_a_pod_on_a_gpu_asks_for_one(tmp_path: Path) -> None:
    parts = manifests("kubernetes.cuda.yaml")
    (container,) = parts["Deployment"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "server.yaml").write_text(parts["ConfigMap"]["data"]["server.yaml"])
    assert load(tmp_path / "server.yaml").device == "cuda"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-cuda")


@kubernetes
def test_the_pod_asks_for_probes_that_exist_and_waits_for_the_drain(tmp_path: Path, name: str) -> None:
    parts = manifests(name)
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    (tmp_path / "server.yaml").write_text(parts["ConfigMap"]["data"]["server.yaml"])
    settings = load(tmp_path / "server.yaml")
    assert pod["terminationGracePeriodSeconds"] > settings.drain_s
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["ports"][0]["containerPort"] == settings.port
    grace = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["winnow"]["stop_grace_period"]
    assert int(grace.rstrip("s")) > Settings().drain_s


@kubernetes
def test_requests_reach_the_pods(name: str, series: set[str]) -> None:
    """By the service, and by a router of the Gateway API's inference extension."""
    parts = manifests(name)
    template = parts["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (parts["Deployment"]["spec"]["selector"]["matchLabels"], parts["Service"]["spec"]["selector"]):
        assert selector.items() <= labels.items()
    assert {port["targetPort"] for port in parts["Service"]["spec"]["ports"]} == {
        port["name"] for port in template["spec"]["containers"][0]["ports"]
    }
    assert labels["inference.networking.k8s.io/engine-type"] == "winnow"
    told = set(re.findall(r"winnow:[a-z]\w+", (DEPLOY / name).read_text()))
    assert len(told) == 3 and told <= series


@pytest.fixture(scope="module")
def series() -> set[str]:
    """Names of the server's time series."""
    metrics = Metrics()
    metrics.of("model", FakeEngine(load_tokenizer("default")))
    metrics.http_started()
    text = generate_latest(metrics.registry).decode()
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_the_dashboard_shows_metrics_that_exist(series: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"winnow:\w+", text)}
    assert len(asked) > 15
    known = series | {f"{name}_bucket" for name in series} | {f"{name}_total" for name in series}
    assert asked <= known, asked - known
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_asks_the_service_that_compose_starts() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    targets = [target for config in job["static_configs"] for target in config["targets"]]
    assert targets == ["winnow:8000"]
    assert "winnow" in services
