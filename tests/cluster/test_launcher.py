"""The launcher's YAML against Ray's own checks and EC2's own shapes, with no network."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config


@pytest.fixture
def launcher(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster" / "aws.yaml").read_text())


def complaints(config: dict[str, Any]) -> list[str]:
    """What Ray would refuse, then what EC2 would."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    found = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config)]
    if not found:
        try:
            validate_config(prepare_config(copy.deepcopy(config)))
        except (ValueError, jsonschema.ValidationError) as error:
            found.append(str(error))
    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    for node in config["available_node_types"].values():
        launch = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        report = ParamValidator().validate(launch, shape)
        found += [report.generate_report()] if report.has_errors() else []
    return found


def test_ray_and_ec2_would_take_it(launcher: dict[str, Any]) -> None:
    assert complaints(launcher) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("head_node_typ", "head"),
        ("max_worker", 8),
        ("head_node_type", "heat"),
        ("docker.head_imag", "x"),
        ("available_node_types.head.resource", {}),
        ("available_node_types.gpu_spot.resources", {"GPU": "1"}),
        ("available_node_types.gpu_spot.label", {}),
        ("available_node_types.gpu_spot.node_config.InstanceMarketOption", {"MarketType": "spot"}),
        ("available_node_types.gpu_spot.node_config.InstanceMarketOptions", {"MarketTyp": "spot"}),
        ("available_node_types.head.node_config.MetadataOptions", {"HttpToken": "required"}),
    ],
)
def test_a_typing_error_is_found(launcher: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    place = launcher
    for parent in parents:
        place = place[parent]
    place[leaf] = value
    assert complaints(launcher)


def test_the_head_takes_no_work_and_listens_to_itself(launcher: dict[str, Any]) -> None:
    types = launcher["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {name: node["labels"]["ray.io/market-type"] for name, node in types.items()} == {
        "head": "on-demand",
        "gpu_spot": "spot",
        "gpu_on_demand": "on-demand",
    }
    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
    head, worker = launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head[-1]
    for command in (head[-1], worker[-1]):
        assert command.startswith("RAY_AUTH_MODE=token ray start ")
    assert list(launcher["file_mounts"]) == ["/home/ray/.ray/auth_token"]
    assert "chmod 600 /home/ray/.ray/auth_token" in launcher["setup_commands"]


def test_images_are_those_of_this_version(launcher: dict[str, Any], package_version: str) -> None:
    assert launcher["docker"]["head_image"].endswith(f":{package_version}-cpu")
    assert launcher["docker"]["worker_image"].endswith(f":{package_version}-gpu")
