"""What strikes single trials on a cluster, a bucket being all that its nodes share: none is lost, and no step is done twice but
those since a checkpoint. And where do the workers of one trial sit, on nodes of several kinds?"""

from __future__ import annotations

import sqlite3
from typing import Any

import optuna
import psutil
import pytest
from doors import finish, start, wait_for
from intact import begun, intact, watched_steps
from sites import LONG, Site, names_in
from test_access import GATED, TOKEN, hub  # noqa: F401  (a fixture)
from test_faults import FAULT, RELAY, workers_of
from tiny import World

from neo_ray import access
from neo_ray.config import ResourcesConfig
from neo_ray.settings import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HANGS, SHORT_OF_MEMORY, KILLS, FILLS_THE_DISK, WELL = RATES = (1e-2, 2e-2, 3e-2, 4e-2, 5e-2)
"""Learning rates, by which trials are told apart."""
ILL = f"""
watch = inject

def inject(train):
    import errno, os, pathlib, signal, time
    from neo_ray import checkpoints
    here, plain, loss, save_file = pathlib.Path(__file__).parent, train.optimizer_step, train.Student.loss, checkpoints.save_file
    now = {{"rate": 0.0, "step": 0, "in_step": False}}

    def first(mark):
        new = not (here / mark).exists()
        (here / mark).touch()
        return new

    def step(engine, trial, parts, split, plan, number, rate):
        now.update(rate=trial.training.learning_rate, step=number, in_step=True)
        if now["rate"] == {HANGS} and number == 10 and first("hung"):
            time.sleep(600)
        if now["rate"] == {KILLS} and number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return plain(engine, trial, parts, split, plan, number, rate)
        finally:
            now["in_step"] = False

    def small(student, output_BLH, *rest):
        if now["in_step"] and now["rate"] == {SHORT_OF_MEMORY} and len(output_BLH) > 2:
            raise sys.modules["torch"].OutOfMemoryError("more than two sequences at a time")
        return loss(student, output_BLH, *rest)

    def full(tensors, path):
        if now["rate"] == {FILLS_THE_DISK} and now["step"] == 11 and first("full"):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    train.optimizer_step, train.Student.loss, checkpoints.save_file = step, small, full
    watch(train)
"""


def test_each_trial_has_its_own_fault_and_the_study_is_locked(site: Site, tiny_world: World) -> None:
    """One hangs, one is short of memory, one kills its worker each time, one finds the disk full, and relays are killed."""
    (site.folder / "sitecustomize.py").write_text(FAULT + watched_steps(0.1) + ILL)
    training = {**LONG["training"], "steps": 24, "micro_batch_size": "auto"}
    search = {"learning_rate": {"grid": list(RATES)}}
    resources = {"silence_minutes": 0.75, "max_failures": 1}
    file = site.file(tiny_world, search=search, sampler={"name": "grid"}, training=training, resources=resources)
    site.come()
    site.come()
    process = start(file, also_import=site.folder)

    def databases() -> list[Any]:
        return list((site.folder / "driver").rglob("study.db"))

    wait_for(lambda: begun(site.folder) and databases(), process)
    (database,) = databases()
    lock = sqlite3.connect(database, isolation_level=None, timeout=60)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        wait_for(lambda: any(site.rungs()), process)
        killed = workers_of(psutil.Process(), RELAY)  # the nodes are children of this process
        assert killed
        for relay in killed:
            relay.kill()
        wait_for(lambda: sum(record.finished for record in site.records()) >= 3, process)
    finally:
        lock.execute("ROLLBACK")
    text = finish(process)
    assert process.returncode == 0, text

    lost = {"0000": ["hung"], "0001": ["out_of_memory"], "0002": ["error"], "0003": ["storage"]}
    records = intact(site.results, lost, failed={"0002": "error"}, watched=site.folder)
    assert tuple(record.params["learning_rate"] for record in records) == RATES
    assert records[1].details["micro_batch_size"] == 2
    assert "the study's database cannot be written" in text and "database is locked" in text
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{database}")
    states = {trial.user_attrs["trial"]: trial.state.name for trial in study.trials}
    assert states == {record.id: {"FAILED": "FAIL"}.get(record.state, record.state) for record in records}, "it caught up"


def test_the_workers_of_a_trial_sit_on_two_nodes_of_the_kind_that_is_named(site: Site, tiny_world: World) -> None:
    """A third node is of another kind. One of the two dies, and another of its kind comes."""
    kind = {"accelerator_type:H100": 1.0}
    other, first, second = site.come(), site.come(kind), site.come(kind)
    resources = {"workers_per_trial": 2, "accelerator_type": "H100", "placement_strategy": "SPREAD"}
    search = {"learning_rate": {"grid": [1e-2]}}
    training = {**LONG["training"], "steps": 200}
    file = site.file(tiny_world, search=search, sampler={"name": "grid"}, training=training, resources=resources)
    process = start(file)
    wait_for(lambda: any(site.rungs()), process)
    for node in (first, second):
        assert {"train.arrow", "model.safetensors"} <= names_in(site.scratch[node]), "it trains there"
    site.go(first)
    third = site.come(kind)
    text = finish(process)
    assert process.returncode == 0 and "Traceback" not in text, text
    (record,) = intact(site.results, {"0000": ["preempted"]})
    assert record.details["workers"] == 2 and record.details["resumed_from_step"] >= 50
    assert names_in(site.scratch[third]) and "model.safetensors" not in names_in(site.scratch[other]), "another kind takes none"


def test_a_gated_model_is_asked_for_on_each_node(
    site: Site,
    hub: str,  # noqa: F811
) -> None:
    """Two have the token and one has another's: only where each may read it do trials begin."""
    import ray

    online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    for token in (TOKEN, TOKEN):
        site.come(None, **online, HF_TOKEN=token)
    ray.init(address=site.cluster.address, namespace="asks", log_to_driver=False)
    try:
        access.check([GATED], ResourcesConfig(), print)
        site.come(None, **online, HF_TOKEN="hf_another")
        with pytest.raises(ConfigError, match=r"^teacher.model: org/gated is gated: .* node [\d.]+, which has a hub token"):
            access.check([GATED], ResourcesConfig(), print)
    finally:
        ray.shutdown()
