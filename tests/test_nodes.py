"""Nodes come and go while a sweep runs: what is lost with one goes on elsewhere, and what comes is put to work."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, defaultdict
from typing import Any

import pytest
from doors import finish, start, wait_for
from intact import begun, intact, watched_steps
from sites import LONG, STEPS, Site, names_in
from test_faults import FAULT
from tiny import World

pytestmark = [pytest.mark.cluster]

FLIPPED = """
target = "neo_ray.storage"

def inject(storage):
    import pathlib
    upload = storage.Remote.upload

    def harmful(place, file):
        upload(place, file)
        mark = pathlib.Path(__file__).with_name("flipped")
        if place.name == "train.arrow" and not mark.exists():
            mark.touch()
            content = bytearray(file.read_bytes())
            content[-9] ^= 1
            place._ask("pipe_file", bytes(content))

    storage.Remote.upload = harmful
"""


HELD = """
target = "neo_ray.stores"

def inject(stores):
    import os, pathlib, time
    here, write_shard, stores.SHARD_BYTES = pathlib.Path(__file__).parent, stores.write_shard, 2**15
    written = []

    def write(folder, shard, *rest):
        with open(here / "begun", "a") as file:
            print(os.environ["NODE_SCRATCH"], shard.name, len(written), os.getpid(), file=file)
        while written and (here / "hold").exists():
            time.sleep(0.05)
        write_shard(folder, shard, *rest)
        written.append(shard.name)
        with open(here / "written", "a") as file:
            print(shard.name, file=file)

    stores.write_shard = write
"""
"""A builder's second shard is held while there is a file `hold`."""


def test_a_node_that_dies_takes_no_trial_with_it_and_one_that_comes_gets_a_slot(site: Site, tiny_world: World) -> None:
    """The driver's data arrive in the bucket with a flipped byte, and are uploaded again."""
    (site.folder / "sitecustomize.py").write_text(FAULT + FLIPPED)
    first = site.come()
    process = start(site.file(tiny_world), also_import=site.folder)
    wait_for(lambda: any(n >= 1 for n in site.rungs()), process)
    second = site.come()
    wait_for(lambda: sum(not r.finished for r in site.records()) == 2, process)
    site.go(first)
    text = finish(process)
    assert process.returncode == 0, text
    records = site.records()
    assert [r.state for r in records] == ["COMPLETE"] * 2, text
    lost = [r for r in records if r.lost_attempts]
    assert len(lost) == 1 and lost[0].lost_attempts[0]["cause"] == "preempted" and lost[0].attempts == 2, text
    assert lost[0].details["resumed_from_step"] >= STEPS // 4
    assert "holds 2 trials at a time now (1 before)" in text and "holds 1 trials at a time now (2 before)" in text
    assert "1 preempted (trials" in (site.results / "report.md").read_text()
    assert text.count("uploading") == 4 and "/train.arrow is not what was written: once more" in text
    brought = {"train.arrow", "model.safetensors", "train-00000.safetensors"}
    assert brought <= names_in(site.scratch[second]), "and not read from the driver's disk, nor rows from the store's place"
    intact(site.results, {lost[0].id: ["preempted"]})


def test_a_killed_worker_a_killed_driver_and_nodes_that_all_die_cost_no_more_than_an_interval_each(
    site: Site, tiny_world: World
) -> None:
    """Three faults of one sweep, one after the other, and a trial that diverges; two trials run at a time."""
    (site.folder / "sitecustomize.py").write_text(FAULT + watched_steps(0.2))
    hold, training = site.folder / "hold", {**LONG["training"], "steps": 24}
    search = {"learning_rate": {"grid": [1e30, 1e-2, 2e-2, 3e-2, 4e-2]}}
    file = site.file(tiny_world, search=search, sampler={"name": "grid"}, training=training)
    lost, dead = defaultdict[str, list[str]](list), set[int]()

    def running() -> dict[str, int]:
        """Trials that have not ended: each with the living process that began its last step."""
        last = {step.rate: step.pid for step in begun(site.folder)}
        of_trials = {r.id: last.get(r.params["learning_rate"], 0) for r in site.records() if not r.finished}
        return {trial: pid for trial, pid in of_trials.items() if pid and pid not in dead}

    def two_are_held() -> bool:
        hold.touch()
        before = begun(site.folder)
        time.sleep(2)  # one that was in its last step ends, and the next one begins
        return len(running()) == 2 and begun(site.folder) == before

    nodes = [site.come(), site.come()]
    process = start(file, also_import=site.folder)
    wait_for(lambda: any(step.number == 8 for step in begun(site.folder)), process)
    struck = next(step for step in begun(site.folder) if step.number == 8)
    os.kill(struck.pid, signal.SIGKILL)
    dead.add(struck.pid)
    lost[next(r.id for r in site.records() if r.params["learning_rate"] == struck.rate)].append("error")
    wait_for(lambda: any(r.state == "COMPLETE" for r in site.records()), process)
    wait_for(two_are_held, process)

    before, alive = site.records(), running()
    process.kill()
    process.wait()
    dead |= set(alive.values())
    for trial in alive:
        lost[trial].append("interrupted")
    hold.unlink()
    process = start(file, also_import=site.folder)
    wait_for(running, process)
    wait_for(two_are_held, process)

    for node in nodes:  # all at once, before anything can be said of the first
        node.kill_raylet(check_alive=False)
    for trial, pid in running().items():
        os.kill(pid, signal.SIGKILL)
        lost[trial].append("preempted")
    for node in nodes:
        site.go(node)
    hold.unlink()
    nodes = [site.come(), site.come()]
    text = finish(process)
    assert process.returncode == 0, text
    records = intact(site.results, lost, failed={"0000": "diverged"}, watched=site.folder)
    assert sum(len(causes) for causes in lost.values()) == 5, "each fault struck all that ran"
    ended = [r for r in before if r.finished]
    assert [r for r in records if r.id in {e.id for e in ended}] == ended and {r.state for r in ended} == {"COMPLETE", "FAILED"}
    assert not [name for name in site.results.names() if name.startswith("lease")]


def test_a_node_that_is_told_to_leave_loses_no_step_though_it_was_the_last(site: Site, tiny_world: World) -> None:
    import ray
    from ray.core.generated import autoscaler_pb2

    spot = site.come()
    longer = {"training": {**LONG["training"], "steps": 800}, "evaluation": {"points": 2}}
    process = start(site.file(tiny_world, **longer))
    wait_for(lambda: site.rungs() == [1], process)
    notice = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + 60))
    accepted, why = ray._raylet.GcsClient(address=site.cluster.address).drain_node(spot.node_id, notice, "spot", deadline_ms)
    assert accepted, why
    wait_for(lambda: any(r.lost_attempts for r in site.records()), process)
    site.come()
    text = finish(process)
    assert process.returncode == 0, text
    first, other = site.records()
    assert (first.state, other.state) == ("COMPLETE", "COMPLETE"), text
    assert [lost["cause"] for lost in first.lost_attempts] == ["preempted"] and not other.lost_attempts
    assert 400 < first.details["resumed_from_step"] < 800, "from the step it was in, and not from an evaluation"
    assert "slot 0 ends: its node is about to leave" in text and "slot 0 lost its workers" not in text


@pytest.mark.slow
def test_nodes_that_fill_a_store_die_one_after_another_and_each_shard_is_filled_once(site: Site, tiny_world: World) -> None:
    """Three, and `max_failures` is 2; each dies in its second shard, while another node is there or comes."""
    (site.folder / "sitecustomize.py").write_text(FAULT + HELD)
    hold = site.folder / "hold"
    hold.touch()

    def rows(name: str) -> list[list[str]]:
        path = site.folder / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def builder() -> Any:
        """A node whose builder is held in a shard, and that builder's process."""
        held = {scratch: int(pid) for scratch, _, before, pid in rows("begun") if before == "1"}
        found = ((node, held.get(str(site.scratch[node]))) for node in nodes)
        return next(((node, pid) for node, pid in found if pid is not None), None)

    nodes = [site.come()]
    process = start(site.file(tiny_world, targets={"mode": "projection"}), also_import=site.folder, door="neo_ray.targets build")
    for _ in range(3):
        wait_for(builder, process)
        dying, pid = builder()
        nodes = [node for node in nodes if node is not dying] + [site.come()]
        dying.kill_raylet(check_alive=False)
        os.kill(pid, signal.SIGKILL)  # a process outlives its node here, and would write its shard yet
        site.go(dying)
    hold.unlink()
    text = finish(process)
    assert process.returncode == 0, text
    assert "the store is whole: " in text and text.count("a teacher's node is gone: another goes on with ") == 3, text
    written, begun_of = Counter(name for (name,) in rows("written")), Counter(row[1] for row in rows("begun"))
    assert set(written.values()) == {1} and set(written) == set(begun_of), text
    assert sum(begun_of.values()) == len(written) + 3, "what the dead had in hand, and no more"
