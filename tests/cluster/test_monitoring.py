"""Dashboard and scrape configuration: they ask for metrics that exist, under keys that exist."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cria_dist.runtime import metrics

TEXT = {"type": "string", "minLength": 1}


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Schema of an object with these keys and no others."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


DATASOURCE = closed({"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}})
PLACE = {"x": {"enum": [0, 12]}, "y": {"type": "integer", "minimum": 0}, "w": {"const": 12}, "h": {"const": 8}}
PANEL = closed(
    {
        "id": {"type": "integer"},
        "type": {"enum": ["timeseries", "stat"]},
        "title": TEXT,
        "description": TEXT,
        "datasource": DATASOURCE,
        "gridPos": closed(PLACE),
        "fieldConfig": closed(
            {
                "defaults": closed({"unit": {"enum": ["short", "bytes", "Bps"]}, "min": {"const": 0}}),
                "overrides": {"type": "array"},
            }
        ),
        "targets": {
            "type": "array",
            "minItems": 1,
            "items": closed({"refId": TEXT, "datasource": DATASOURCE, "expr": TEXT, "legendFormat": TEXT}),
        },
    }
)
RELABELLING = closed(
    {"source_labels": {"type": "array"}}, regex=TEXT, target_label=TEXT, action={"enum": ["keep", "drop"]}
)
SCRAPE = closed(
    {
        "global": closed({"scrape_interval": TEXT, "scrape_timeout": TEXT}),
        "scrape_configs": {
            "type": "array",
            "items": closed(
                {"job_name": TEXT},
                file_sd_configs={"type": "array", "items": closed({"files": {"type": "array", "items": TEXT}})},
                kubernetes_sd_configs={
                    "type": "array",
                    "items": closed({"role": {"const": "pod"}, "namespaces": closed({"names": {"type": "array"}})}),
                },
                relabel_configs={"type": "array", "items": RELABELLING},
            ),
        },
    }
)
"""The part of Prometheus' configuration that is used, after its documentation; promtool is not at hand."""


@pytest.fixture
def dashboard(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "cluster" / "grafana.json").read_text())


@pytest.fixture
def scrape(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster" / "prometheus.yml").read_text())


@pytest.fixture
def our_metrics(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names as Prometheus sees them, taken from what the code registers."""
    names: set[str] = set()

    class Silent:
        def inc(self, amount: float = 1.0) -> None: ...
        def set(self, value: float) -> None: ...

    class Everything:
        def counts(self) -> dict[str, float]:
            return dict.fromkeys([*metrics.SUMS, *metrics.PEAKS], 1.0)

    def counter(name: str, description: str) -> Silent:
        names.add(f"ray_{name}_total")
        return Silent()

    def gauge(name: str, description: str) -> Silent:
        names.add(f"ray_{name}")
        return Silent()

    monkeypatch.setattr(metrics, "_counter", lambda name, text: counter(f"cria_{name}", text))
    monkeypatch.setattr(metrics, "_gauge", lambda name, text: gauge(f"cria_{name}", text))
    meter = metrics.Meter()
    meter.depth(1)
    meter.lost()
    meter.done(Everything())
    return names


def asked(dashboard: dict[str, Any]) -> set[str]:
    """Metrics in the dashboard's queries."""
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def test_the_dashboard_shows_all_our_metrics_and_no_others(dashboard: dict[str, Any], our_metrics: set[str]) -> None:
    assert len(our_metrics) == 6
    assert asked(dashboard) == our_metrics


def test_counters_are_shown_as_rates(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"\bray_\w+_total", target["expr"]):
                assert re.search(rf"(rate|increase)\({name}\[\d+[mh]\]\)", target["expr"])


def test_panels_have_what_grafana_needs_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        jsonschema.validate(panel, PANEL)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    [variable] = dashboard["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")


def test_the_scrape_finds_the_metrics_port_of_ray(scrape: dict[str, Any], repository: Path) -> None:
    jsonschema.validate(scrape, SCRAPE)
    machines, pods = scrape["scrape_configs"]
    assert machines["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    kept = {one["source_labels"][0].rpartition("_pod_")[2]: one["regex"] for one in pods["relabel_configs"][:2]}
    assert kept == {"label_ray_io_is_ray_node": "yes", "container_port_name": "metrics"}
    cluster = yaml.safe_load((repository / "cluster" / "raycluster.yaml").read_text())["spec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert {"name": "metrics", "containerPort": 8080} in ports


def test_typing_errors_are_found(dashboard: dict[str, Any], scrape: dict[str, Any], our_metrics: set[str]) -> None:
    broken = copy.deepcopy(dashboard)
    broken["panels"][0]["targets"][0]["expr"] = "rate(ray_cria_token_total[1m])"
    assert not asked(broken) <= our_metrics
    broken["panels"][1]["gridpos"] = broken["panels"][1].pop("gridPos")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken["panels"][1], PANEL)
    for key, value in (("file_sd_config", []), ("relabel_configs", [{"source_label": ["x"]}])):
        wrong = copy.deepcopy(scrape)
        wrong["scrape_configs"][0][key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCRAPE)
