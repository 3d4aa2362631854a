"""Do the siblings of cluster.yaml describe the same cluster elsewhere, and would those who read them accept them?

Reference: Ray's own validator, which needs no cloud's library; cluster.yaml itself; the template that Ray's Azure provider fills;
the fields of KubeRay 1.6, of a Kubernetes pod, of Compute Engine's instances and of Ray's providers, as far as they are used.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_cluster_yaml import CLUSTER, ROOT, accepted_by_ray, start_options

from neo_ray.loading import load

FOLDER = ROOT / "deploy"
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
FILES: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
CLOUDS = ("azure", "gcp")
SECRETS = r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|PRIVATE KEY|aws_secret|AccountKey=|ya29\.|client_secret|password *[:=]|stringData"
PROVIDER_KEYS = {
    "gcp": {"type", "region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"},
    "azure": {"type", "location", "resource_group", "subscription_id", "availability_zone", "cache_stopped_nodes", "subnet_mask"},
    "local": {"type", "head_ip", "worker_ips", "external_head_ip"},
}
"""Without those for credentials: these come by the cloud's own chain."""
DISK = {"boot": None, "autoDelete": None, "type": None, "initializeParams": {"diskSizeGb": None, "sourceImage": None}}
SCHEDULING = dict.fromkeys(["onHostMaintenance", "automaticRestart", "provisioningModel", "instanceTerminationAction"])
KUBE = ROOT / "deploy" / "kuberay"
RAY_CLUSTER: Any = {
    "rayVersion": None,
    "authOptions": {"mode": None, "secretName": None},
    "enableInTreeAutoscaling": None,
    "autoscalerOptions": {"version": None, "idleTimeoutSeconds": None},
}
CONTAINER = dict.fromkeys(["name", "image", "env", "volumeMounts", "resources"])
POD = {"restartPolicy": None, "securityContext": {"fsGroup": None}, "volumes": None, "containers": CONTAINER}
HEAD: Any = {"serviceType": None, "rayStartParams": None, "template": {"spec": POD}}
WORKERS: Any = {
    **dict.fromkeys(["groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams"]),
    "template": {"spec": POD},
}
RAY_CLUSTER |= {"headGroupSpec": HEAD, "workerGroupSpecs": WORKERS}
RAY_JOB = {**dict.fromkeys(["entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"]), "rayClusterSpec": RAY_CLUSTER}


def unknown(value: Any, known: Any, where: str) -> Iterator[str]:
    """Paths that `known` does not have; lists are looked into."""
    for item in value if isinstance(value, list) else [value]:
        for key, inner in item.items() if known is not None else ():
            if key in known:
                yield from unknown(inner, known[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"


def node_keys(kind: str) -> Any:
    if kind == "gcp":
        return {"machineType": None, "disks": DISK, "scheduling": SCHEDULING}
    import ray.autoscaler._private as private

    template = json.loads((Path(private.__path__[0]) / "_azure" / "azure-vm-template.json").read_text(encoding="utf-8"))
    return {"azure_arm_parameters": {**dict.fromkeys(template["parameters"]), "availability_zone": None}}


def problems(config: dict[str, Any]) -> list[str]:
    """What Ray's validator lets through and the cloud, or nobody, would tell of."""
    kind = config["provider"]["type"]
    found = [f"provider.{key}" for key in config["provider"] if key not in PROVIDER_KEYS[kind]]
    if kind == "local":
        machines = len(config["provider"]["worker_ips"])
        return found + [key for key in ("min_workers", "max_workers") if config.get(key) != machines]
    for name, node in config["available_node_types"].items():
        found += unknown(node["node_config"], node_keys(kind), name)
    return found


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file_and_nothing_is_misspelt(name: str) -> None:
    prepared = accepted_by_ray(FILES[name])
    assert problems(FILES[name]) == []
    workers = [kind["max_workers"] for kind in prepared["available_node_types"].values()]
    assert max(workers) == prepared["max_workers"] and "EDIT" in TEXTS[name]


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(idle_timeout=5),
        lambda c: c["auth"].update(user="ubuntu"),
        lambda c: c["available_node_types"]["gpu"].update(max_worker=1),
        lambda c: c["provider"].update(region=5, location=5),
    ],
)
def test_ray_refuses_the_rest(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    config = copy.deepcopy(FILES[name])
    change(config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        accepted_by_ray(config)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gcp", lambda c: c["provider"].update(zone="x"), "provider.zone"),
        ("gcp", lambda c: c["provider"].update(gcp_credentials={}), "provider.gcp_credentials"),
        ("gcp", lambda c: c["available_node_types"]["gpu"]["node_config"].update(machine="x"), "gpu.machine"),
        ("azure", lambda c: c["available_node_types"]["gpu"]["node_config"].update(vmSize="x"), "gpu.vmSize"),
        (
            "azure",
            lambda c: c["available_node_types"]["head"]["node_config"]["azure_arm_parameters"].update(size="x"),
            "head.azure_arm_parameters.size",
        ),
        ("local", lambda c: c["provider"]["worker_ips"].append("x"), "min_workers"),
    ],
)
def test_the_lint_finds_what_ray_does_not(name: str, change: Callable[[dict[str, Any]], object], named: str) -> None:
    config = copy.deepcopy(FILES[name])
    change(config)
    assert named in problems(config)


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_matter_of_the_place_is_as_in_cluster_yaml(name: str) -> None:
    config = FILES[name]
    for key in ("cluster_name", "file_mounts", "rsync_exclude"):
        assert config[key] == CLUSTER[key], key
    storage = [" mount -t " in line for line in CLUSTER["setup_commands"]].index(True)
    ours, theirs = ([*found["setup_commands"]] for found in (config, CLUSTER))
    assert " mount -t " in ours.pop(storage) and " mount -t " in theirs.pop(storage) and ours == theirs
    if name in CLOUDS:
        for key in ("head_start_ray_commands", "worker_start_ray_commands", "idle_timeout_minutes", "max_workers"):
            assert config[key] == CLUSTER[key], key
        assert list(config["available_node_types"]) == list(CLUSTER["available_node_types"])
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert name in extras and config["head_setup_commands"][0].endswith(f"-e '.[{name}]'")


@pytest.mark.parametrize("name", FILES)
def test_dashboard_and_job_server_are_on_localhost_and_ray_start_knows_every_option(name: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    commands = (FILES[name][f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    head, worker = (re.sub(r"\$\([^)]*\)", "ADDRESS", command) for command in commands)
    options = dict(start_options(head))
    assert {*options, *dict(start_options(worker))} <= known
    assert (options["--dashboard-host"], options["--include-dashboard"]) == ("127.0.0.1", "true")
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in head


@pytest.mark.parametrize("path", [*FOLDER.glob("*.yaml"), *KUBE.iterdir()], ids=lambda path: path.name)
def test_no_secret_stands_in_a_file(path: Path) -> None:
    assert not re.search(SECRETS, path.read_text(encoding="utf-8"))


def test_every_cluster_sweep_fits_on_every_gpu_node() -> None:
    nodes = [FILES[name]["available_node_types"][kind]["resources"] for name in CLOUDS for kind in ("gpu", "gpu_spot")]
    nodes.append({key.upper(): int(value) for key, value in _limits(kube_cluster()["workerGroupSpecs"][0]).items()})
    for asked in (config.resources for config in map(load, sorted((ROOT / "sweeps").rglob("*.yaml")))):
        if asked.address == "auto":
            assert all(asked.gpus_per_worker <= node["GPU"] and asked.cpus_per_worker <= node["CPU"] for node in nodes)


def kube(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBE / name).read_text(encoding="utf-8")))


def kube_cluster() -> dict[str, Any]:
    spec: dict[str, Any] = kube("raycluster.yaml")[-1]["spec"]
    return spec


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


def _limits(group: dict[str, Any]) -> dict[str, Any]:
    limits = _container(group)["resources"]["limits"]
    return {"cpu": limits["cpu"], "gpu": limits["nvidia.com/gpu"]}


def test_kuberay_knows_every_field_and_the_job_has_the_same_cluster() -> None:
    claim, cluster = kube("raycluster.yaml")
    (job,) = kube("rayjob.yaml")
    assert [(one["apiVersion"], one["kind"]) for one in (cluster, job)] == [("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob")]
    assert list(unknown(cluster["spec"], RAY_CLUSTER, "spec")) + list(unknown(job["spec"], RAY_JOB, "spec")) == []
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert claim["kind"] == "PersistentVolumeClaim" and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = cluster["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert claim["metadata"]["name"] in [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in volumes]
    assert list(unknown({"entrypoints": ""}, RAY_JOB, "spec")) == ["spec.entrypoints"]


def test_pods_run_ray_as_it_is_pinned_and_this_project_at_its_pins() -> None:
    pin = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    recipe = (KUBE / "Dockerfile").read_text(encoding="utf-8")
    assert pin and kube_cluster()["rayVersion"] == pin[1]
    assert f"FROM rayproject/ray:{pin[1]}-py311-gpu" in recipe and recipe.count("-c constraints.txt") == recipe.count(
        "pip install"
    )
    copied = [word for line in recipe.splitlines() if line.startswith("COPY") for word in shlex.split(line)[2:-1]]
    assert [part for part in copied if not (ROOT / part).exists()] == []
    groups = [kube_cluster()["headGroupSpec"], *kube_cluster()["workerGroupSpecs"]]
    assert len({_container(group)["image"] for group in groups}) == 1


def test_pods_have_their_resources_and_share_their_storage() -> None:
    head, (workers,) = kube_cluster()["headGroupSpec"], kube_cluster()["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["serviceType"] == "ClusterIP"
    for group in (head, workers):
        asked = _container(group)["resources"]
        assert asked["requests"] == asked["limits"] and {"cpu", "memory"} <= set(asked["limits"])
        pod = group["template"]["spec"]
        assert {mount["name"] for mount in _container(group)["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["restartPolicy"] == "Never"
    assert int(_limits(workers)["gpu"]) == 1 and workers["minReplicas"] == 0


def test_tokens_are_secrets_by_reference() -> None:
    assert kube_cluster()["authOptions"] == {"mode": "token", "secretName": "neo-ray-auth"}
    for group in (kube_cluster()["headGroupSpec"], *kube_cluster()["workerGroupSpecs"]):
        env = {one["name"]: one for one in _container(group)["env"]}
        secret = [one for one in env if re.search("TOKEN|SECRET|KEY|PASSWORD", one) and not one.endswith("_PATH")]
        assert [one for one in secret if "valueFrom" not in env[one]] == []
        mounts = {mount["mountPath"]: mount["name"] for mount in _container(group)["volumeMounts"]}
        hub = mounts[str(Path(env["HF_TOKEN_PATH"]["value"]).parent)]
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert volumes[hub]["secret"]["optional"] is True


def test_the_job_is_a_sweep_that_waits_for_its_pods() -> None:
    (job,) = kube("rayjob.yaml")
    assert "runtimeEnvYAML" not in job["spec"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "neo_ray.sweep"]
    config = load(ROOT / Path(words[3]).relative_to("$HOME/neo_ray"), words[4:])
    assert config.resources.address == "auto" and config.resources.nodes_on_demand
    assert config.resources.concurrency == kube_cluster()["workerGroupSpecs"][0]["maxReplicas"]
    assert str(config.results).startswith("/mnt/shared/") and str(config.cache).startswith("/mnt/shared/")
