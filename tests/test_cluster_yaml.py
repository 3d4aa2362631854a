"""Would `ray up cluster.yaml` accept this file? Ray's own schema and validator, and a lint of what they let through.

Reference: Ray checks neither `provider` nor `node_config` for typos, and drops a global `min_workers` without a word.
`node_config` is what EC2's RunInstances takes.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from neo_ray.loading import load

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CLUSTER: dict[str, Any] = yaml.safe_load(TEXT)

PROVIDER_KEYS = {
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "use_external_head_ip",
    "key_pair",
    "security_group",
    "cloudwatch",
}
"""What Ray's AWS provider reads, without `aws_credentials`: those do not belong into a file."""
NODE_KEYS: dict[str, Any] = {
    "BlockDeviceMappings": {
        "DeviceName": None,
        "VirtualName": None,
        "Ebs": dict.fromkeys(
            ["VolumeSize", "VolumeType", "Iops", "Throughput", "Encrypted", "KmsKeyId", "SnapshotId", "DeleteOnTermination"], None
        ),
    },
    "IamInstanceProfile": {"Arn": None, "Name": None},
    "ImageId": None,
    "InstanceMarketOptions": {
        "MarketType": None,
        "SpotOptions": dict.fromkeys(["MaxPrice", "SpotInstanceType", "ValidUntil", "InstanceInterruptionBehavior"], None),
    },
    "InstanceType": None,
    "KeyName": None,
    "MetadataOptions": dict.fromkeys(["HttpTokens", "HttpEndpoint", "HttpPutResponseHopLimit", "InstanceMetadataTags"], None),
    "Placement": {"AvailabilityZone": None, "GroupName": None, "Tenancy": None},
    "SecurityGroupIds": None,
    "SubnetIds": None,
    "TagSpecifications": {"ResourceType": None, "Tags": {"Key": None, "Value": None}},
}
"""Parameters of RunInstances that make sense here (SubnetIds is Ray's: one of them is chosen), with those inside them."""
PARTS = ("neo_ray", "sweeps", "pyproject.toml", "constraints.txt", "LICENSE")
"""What a node needs to install the project."""


def problems(config: dict[str, Any]) -> Iterator[str]:
    """What Ray's validator lets through and EC2, or nobody, would tell of."""
    if "min_workers" in config:
        yield "min_workers: Ray drops the global one; it belongs to a node type"
    yield from (f"provider.{key}: not read by Ray's AWS provider" for key in config["provider"] if key not in PROVIDER_KEYS)
    total = config["max_workers"]
    for name, kind in config["available_node_types"].items():
        where = f"available_node_types.{name}"
        yield from _unknown(kind["node_config"], NODE_KEYS, f"{where}.node_config")
        for key in ("InstanceType", "ImageId"):
            if key not in kind["node_config"]:
                yield f"{where}.node_config.{key}: is required"
        low, high = kind.get("min_workers", 0), kind.get("max_workers", 0 if name == config["head_node_type"] else total)
        if not low <= high <= total:
            yield f"{where}: min_workers {low} <= max_workers {high} <= {total} does not hold"


def _unknown(value: Any, known: Any, where: str) -> Iterator[str]:
    if known is None:
        return
    for item in value if isinstance(value, list) else [value]:
        for key, inner in item.items():
            if key not in known:
                yield f"{where}.{key}: not a parameter of RunInstances"
            else:
                yield from _unknown(inner, known[key], f"{where}.{key}")


def accepted_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    """The config as Ray completes it. Raises what `ray up` would raise."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def start_options(command: str) -> list[tuple[str, str]]:
    """(option, value) of the `ray start` in a command; the value is empty for a flag."""
    words = shlex.split(command.rpartition("ray start")[2])
    return [(option, value) for option, _, value in (word.partition("=") for word in words)]


def test_ray_accepts_the_file() -> None:
    prepared = accepted_by_ray(CLUSTER)
    workers = {n: t for n, t in prepared["available_node_types"].items() if n != prepared["head_node_type"]}
    assert prepared["available_node_types"][prepared["head_node_type"]]["max_workers"] == 0
    assert max(t["max_workers"] for t in workers.values()) == prepared["max_workers"]
    assert prepared["worker_setup_commands"][: len(CLUSTER["setup_commands"])] == CLUSTER["setup_commands"]


def test_nothing_is_misspelt() -> None:
    assert list(problems(CLUSTER)) == []


def _broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = copy.deepcopy(CLUSTER)
    change(config)
    return config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(min_workers=2), "min_workers"),
        (lambda c: c["provider"].update(availability_zones="us-west-2a"), "provider.availability_zones"),
        (lambda c: c["provider"].update(aws_credentials={}), "provider.aws_credentials"),
        (lambda c: c["available_node_types"]["gpu"]["node_config"].update(InstanceTyp="x"), "gpu.node_config.InstanceTyp"),
        (lambda c: c["available_node_types"]["gpu"]["node_config"].pop("ImageId"), "gpu.node_config.ImageId"),
        (
            lambda c: c["available_node_types"]["gpu_spot"]["node_config"]["InstanceMarketOptions"].update(Market="spot"),
            "InstanceMarketOptions.Market",
        ),
        (
            lambda c: c["available_node_types"]["gpu"]["node_config"]["BlockDeviceMappings"][0]["Ebs"].update(Size=1),
            "BlockDeviceMappings.Ebs.Size",
        ),
        (lambda c: c["available_node_types"]["gpu"].update(min_workers=9), "available_node_types.gpu: min_workers 9"),
        (lambda c: c["available_node_types"]["gpu"].update(max_workers=9), "max_workers 9 <= 8"),
    ],
)
def test_the_lint_finds_what_ray_does_not(change: Callable[[dict[str, Any]], object], named: str) -> None:
    assert any(named in line for line in problems(_broken(change)))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(idle_timeout=5),
        lambda c: c.update(head_node_type="heads"),
        lambda c: c["auth"].update(user="ubuntu"),
        lambda c: c["available_node_types"]["gpu"].update(max_worker=1),
        lambda c: c["available_node_types"]["gpu"].update(resources={"GPU": 0.5}),
        lambda c: c["available_node_types"]["gpu"].pop("resources"),
        lambda c: c.update(setup_commands="pip install"),
    ],
)
def test_ray_refuses_the_rest(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises((ValueError, TypeError, jsonschema.ValidationError)):
        accepted_by_ray(_broken(change))


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_start_knows_every_option(key: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    options = [option for command in CLUSTER[key] if "ray start" in command for option, _ in start_options(command)]
    assert options and set(options) <= known


def test_the_head_scales_and_serves_the_state_api_on_localhost_only() -> None:
    options = dict(start_options(CLUSTER["head_start_ray_commands"][-1]))
    assert options["--include-dashboard"] == "true"
    assert options["--dashboard-host"] == "127.0.0.1"
    assert options["--autoscaling-config"] == "~/ray_bootstrap_config.yaml"
    port = dict(start_options(CLUSTER["worker_start_ray_commands"][-1]))["--address"].rpartition(":")[2]
    assert port == options["--port"]


def test_nodes_get_the_whole_project_and_install_it_at_its_pins() -> None:
    mounts = CLUSTER["file_mounts"]
    assert {mounts[f"~/neo_ray/{part}"] for part in PARTS} == set(PARTS)
    assert [part for part in PARTS if not (ROOT / part).exists()] == []
    installs = [line for key in ("setup_commands", "head_setup_commands") for line in CLUSTER[key] if "pip install" in line]
    assert any(line.endswith("-e .") for line in installs)
    assert all(line.count("-c constraints.txt") == line.count("pip install") for line in installs)


def test_requests_of_nodes_carry_the_clusters_token_and_no_secret_stands_in_the_file() -> None:
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in line for line in CLUSTER["setup_commands"])
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|BEGIN [A-Z ]*PRIVATE KEY|aws_secret", TEXT)


def test_every_cluster_sweep_fits_on_a_gpu_node() -> None:
    nodes = [kind["resources"] for name, kind in CLUSTER["available_node_types"].items() if name != CLUSTER["head_node_type"]]
    sweeps = [c.resources for c in map(load, sorted((ROOT / "sweeps").rglob("*.yaml"))) if c.resources.address == "auto"]
    assert sweeps
    for asked in sweeps:
        assert all(asked.gpus_per_worker <= node["GPU"] and asked.cpus_per_worker <= node["CPU"] for node in nodes)
