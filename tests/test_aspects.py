"""Reference: made-up trials whose region, bounds, luck and curves are planted. A sentence goes where its data go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import draw, flat, planted, sweep, trial
from test_analyze import folder_with

from neo_ray.analyze import analyse, guidelines_json
from neo_ray.aspects import ASPECTS
from neo_ray.choosing import region_lines, region_of
from neo_ray.evidence import gather
from neo_ray.knee import knee_lines, knee_of
from neo_ray.luck import expected_best, luck_lines, luck_of
from neo_ray.records import TrialRecord
from neo_ray.rungs import rung_lines, rungs_of
from neo_ray.stability import stability_lines, stability_of


def runs(values: dict[tuple[int, float], tuple[float, ...]], **costs: Any) -> list[TrialRecord]:
    """(rank, learning rate) → values by seed."""
    return [
        trial(f"r{rank}-{rate}-{seed}", {"rank": rank, "learning_rate": rate}, ce, seed=seed, **costs)
        for (rank, rate), ces in values.items()
        for seed, ce in enumerate(ces)
    ]


def with_costs(records: list[TrialRecord], gigabytes: dict[int, float], seconds: dict[int, float]) -> list[TrialRecord]:
    return [
        r.model_copy(update={"peak_memory_bytes": int(1e9 * gigabytes[r.params["rank"]]), "seconds": seconds[r.params["rank"]]})
        for r in records
    ]


SPREAD = (-0.01, 0.0, 0.01)
"""Standard deviation 0.01; standard error of three runs 0.0058."""


def levels(**means: float) -> dict[tuple[int, float], tuple[float, ...]]:
    return {(int(name[1:]), 1e-3): tuple(mean + s for s in SPREAD) for name, mean in means.items()}


def test_the_region_is_within_one_standard_error_and_the_cheapest_goes_by_memory_then_seconds() -> None:
    records = runs(levels(r4=4.53, r8=4.505, r16=4.503, r64=4.5, r128=4.507))
    gigabytes = {4: 1.0, 8: 2.0, 16: 2.02, 64: 4.0, 128: 8.0}
    told = region_of(gather(with_costs(records, gigabytes, {4: 1, 8: 20, 16: 10, 64: 40, 128: 80}), None))
    assert told is not None and told.standard_error == pytest.approx(0.01 / 3**0.5)
    assert (told.num_settings, told.num_of, told.spans) == (3, 5, {"rank": (8.0, 64.0)})
    assert told.cheapest.params["rank"] == 16, "2.02 GB are as little as 2.00, and it takes half the time"
    assert told.saves and "4.503 against 4.5 of the best, 2.02 GB against 4, 10 s against 40" in region_lines(told)[1]
    assert "rank 8 to 64" in region_lines(told)[0]


def test_a_region_of_one_and_a_best_that_is_the_cheapest_are_said() -> None:
    alone = region_of(gather(runs(levels(r4=4.5, r8=4.6)), None))
    assert region_lines(alone) == ["No other of 2 settings is within one standard error (5.8e-3 nats per token) of the best"]
    records = with_costs(runs(levels(r4=4.5, r8=4.502)), {4: 1, 8: 2}, {4: 1, 8: 1})
    assert region_lines(region_of(gather(records, None)))[1].startswith("The best itself is the cheapest")


def test_without_a_second_seed_there_is_no_region() -> None:
    assert region_of(gather(planted(draw(20, 0), flat), None)) is None and region_lines(None) == []


def test_bounds_on_the_learning_rate_by_rank() -> None:
    records = runs({(r, x): (4.5,) for r in (4, 16, 64) for x in (1e-4, 1e-3, 3e-3)})
    lost = [(4, 1e-2, "a"), (16, 1e-2, "b"), (16, 2e-3, "c")]
    records += [trial(i, {"rank": r, "learning_rate": x}, None, state="FAILED", cause="diverged", metrics={}) for r, x, i in lost]
    records.append(trial("d", {"rank": 32, "learning_rate": 1e-2}, 9.0))  # complete, and worse than the untrained student
    records.append(trial("e", {"rank": 64, "learning_rate": 1e-2}, None, state="FAILED", cause="out_of_memory", metrics={}))
    told = stability_of(gather(records, None))
    assert told is not None and (told.num_diverged, told.num_trials) == (4, 13)
    assert [(b.rank, b.largest_stable, b.smallest_diverged, b.overlap) for b in told.bounds] == [
        (4, 3e-3, 1e-2, False),
        (16, 3e-3, 2e-3, True),
        (32, None, 1e-2, False),
        (64, 3e-3, None, False),
    ]
    lines = stability_lines(told)
    assert lines[0] == "4 of 13 trials diverged (NaN, or worse than the untrained student)"
    assert "Rank 4: the smallest learning rate that diverged is 0.01, the largest that did not is 3e-3 (1 of 4 trials)" in lines
    assert lines[-1] == "No trial diverged at rank 64 (up to 3e-3)" and "other settings decide" in lines[2]


def test_where_none_diverged_nothing_is_said() -> None:
    assert stability_of(gather(runs(levels(r4=4.5, r8=4.6)), None)) is None and stability_lines(None) == []


@pytest.mark.parametrize(("num", "excess"), [(1, 0.0), (2, 0.5642), (16, 1.766), (64, 2.344), (200, 2.746)])
def test_the_best_of_n_is_expected_above_the_mean_by_what_tables_say(num: int, excess: float) -> None:
    assert expected_best(num) == pytest.approx(excess, abs=1e-3)


def noisy(truth: dict[int, float], seed: int, sd: float = 0.02) -> list[TrialRecord]:
    """One run a setting, and a far worse setting with 20 seeds that tells the noise."""
    rng = np.random.default_rng(seed)
    records = [trial(f"t{k}", {"rank": k}, value + sd * rng.standard_normal()) for k, value in truth.items()]
    return records + [trial(f"n{s}", {"rank": 999}, 4.9 + sd * rng.standard_normal(), seed=s) for s in range(20)]


def test_the_best_of_equal_settings_is_corrected_to_their_mean() -> None:
    """Over 10 sweeps its shrunk value takes back at least 70 % of the 2.25 standard deviations that it looks too good."""
    told = [luck_of(gather(noisy(dict.fromkeys(range(1, 51), 4.5), seed), None)) for seed in range(10)]
    looks, shrunk = (np.mean([getattr(luck, name) for luck in told]) for name in ("value", "shrunk"))
    assert looks == pytest.approx(4.5 - 2.25 * 0.02, abs=0.01) and 4.5 - shrunk < 0.3 * (4.5 - looks)
    assert told[0] is not None and told[0].excess_sds == pytest.approx(expected_best(51))


def test_a_setting_that_is_far_better_is_not_drawn_towards_the_others() -> None:
    told = luck_of(gather(noisy({**dict.fromkeys(range(1, 51), 4.7), 60: 4.4}, 0), None))
    assert told is not None and told.trial == "t60" and told.shrunk == pytest.approx(told.value, abs=0.01)


def test_fresh_seeds_of_confirm_tell_instead_of_shrinkage() -> None:
    records = noisy(dict.fromkeys(range(1, 51), 4.5), 1)
    best = min((r for r in records if r.seed == 0), key=lambda r: r.metrics["select_ce"] or 0.0)
    alone = luck_lines(luck_of(gather(records, None)))
    again = [trial(f"c{s}", best.params, 4.51, seed=s, phase="confirm") for s in (7, 8)]
    told = luck_of(gather([*records, *again], None))
    assert told is not None and (told.fresh, told.num_fresh, told.shrunk) == (pytest.approx(4.51), 2, None)
    assert "is expected at" in alone[1] and "fresh seeds would tell" in alone[1]
    assert "the mean of 2 fresh seeds is 4.51 nats per token" in luck_lines(told)[1]


def test_without_a_noise_or_with_few_settings_there_is_no_luck() -> None:
    assert luck_of(gather(planted(draw(20, 0), flat), None)) is None
    assert luck_of(gather(noisy(dict.fromkeys(range(1, 5), 4.5), 0), None)) is None and luck_lines(None) == []


def curved(ends: list[float], early: list[float]) -> list[TrialRecord]:
    lines = zip(early, ends, strict=True)
    curves = [[{"rung": k, "tokens": 500 * k, "select_ce": value} for k, value in enumerate(line, 1)] for line in lines]
    return [trial(f"k{i}", {"rank": i + 1}, ends[i], curve=curve) for i, curve in enumerate(curves)]


def test_the_correlation_of_a_rung_with_the_end_and_what_pruning_there_would_have_kept() -> None:
    ends = [4.0 + 0.1 * i for i in range(10)]
    same = rungs_of(gather(curved(ends, ends), None))
    assert same is not None and len(same.rungs) == 1
    (rung,) = same.rungs
    assert (rung.rho, rung.place, rung.tokens, rung.num_trials) == (pytest.approx(1), 1, 500, 10)
    assert rung_lines(same)[-1] == "Keeping the better half would have kept the best of these trials"
    turned = rungs_of(gather(curved(ends, ends[::-1]), sweep(search={"rank": {"int_uniform": [1, 10]}})))
    assert turned is not None and turned.keeps == pytest.approx(1 / 3)
    assert turned.rungs[0].rho == pytest.approx(-1) and turned.rungs[0].place == 10
    assert "would have lost the best trial at rung 1" in rung_lines(turned)[-1]


def test_where_too_few_ran_past_it_cannot_be_said_whether_pruning_was_safe() -> None:
    records = curved([4.0, 4.1], [4.2, 4.3]) + [trial("p", {"rank": 50}, 4.9, state="PRUNED")]
    (line,) = rung_lines(rungs_of(gather(records, None)))
    assert line.startswith("Whether it was safe to stop 1 trials early cannot be said")
    assert rungs_of(gather(records[:2], None)) is None and rung_lines(None) == []


def test_every_aspect_is_in_the_data_and_none_without_its_trials(tmp_path: Path) -> None:
    from planted import everything

    analysis = analyse(folder_with(tmp_path / "a", everything()))
    assert set(analysis.aspects) == {row[0] for row in ASPECTS}
    data = json.loads(guidelines_json(analysis))["aspects"]
    assert data["stability"]["num_diverged"] == 2 and set(data) == set(analysis.aspects)
    bare = analyse(folder_with(tmp_path / "b", [trial("a", {"rank": 4}, 4.5)]))
    assert bare.aspects == {}


def test_the_knee_is_the_member_of_the_front_that_is_nearest_to_the_ideal() -> None:
    """Each step of rank costs a GB; from rank 16 on it gains little."""
    means = levels(r1=4.9, r4=4.7, r16=4.5, r64=4.49, r128=4.48, r2=4.95)
    costs = {1: 1.0, 4: 2.0, 16: 3.0, 64: 4.0, 128: 5.0, 2: 1.5}
    evidence = gather(with_costs(runs(means), costs, dict.fromkeys(costs, 10)), None)
    told = knee_of(evidence)
    assert told is not None and told.params["rank"] == 16 and (told.num_front, told.num_settings) == (5, 6)
    share = (4.5 - 4.48) / (4.9 - 4.48)
    assert told.distance == pytest.approx((1 - share - 0.5) / 3**0.5), "time is the same all over the front"
    assert told.frequency is not None and told.frequency > 0.98
    (line,) = knee_lines(told)
    assert "the knee is rank 16" in line and "peak_memory_bytes 3 GB" in line and f"{told.frequency:.0%} of the draws" in line
    rough = runs({key: tuple(values[1] + 20 * spread for spread in SPREAD) for key, values in means.items()})
    unsure = knee_of(gather(with_costs(rough, costs, dict.fromkeys(costs, 10)), None))
    assert unsure is not None and unsure.params["rank"] == 16, "the means are the same"
    assert unsure.frequency is not None and unsure.frequency < 0.8


def test_without_a_second_seed_the_knee_has_no_frequency_and_without_costs_there_is_none() -> None:
    single = {key: values[:1] for key, values in levels(r1=4.9, r4=4.7, r16=4.5).items()}
    costs = {1: 1.0, 4: 2.0, 16: 3.0}
    told = knee_of(gather(with_costs(runs(single), costs, costs), None))
    assert told is not None and told.frequency is None and "draws" not in knee_lines(told)[0]
    assert knee_of(gather(runs(dict.fromkeys(single, (4.5,))), None)) is None, "all are the same"
    assert knee_of(gather(runs(single, peak_memory_bytes=0, seconds=0.0), None)) is None and knee_lines(None) == []


def test_the_memory_of_a_cpu_makes_no_setting_cheap() -> None:
    """Rank 8 took least memory, rank 16 the fewest accelerator-seconds."""
    gigabytes = {1: 1.0, 4: 1.0, 8: 2.0, 16: 9.0, 64: 4.0}
    records = runs(levels(r4=4.53, r8=4.505, r16=4.503, r64=4.5, r1=4.9))
    records = with_costs(records, gigabytes, dict.fromkeys(gigabytes, 30))
    time = {1: 5.0, 4: 10.0, 8: 30.0, 16: 10.0, 64: 40.0}
    records = [r.model_copy(update={"accelerator_seconds": time[r.params["rank"]]}) for r in records]
    on_cpu = [r.model_copy(update={"details": {**r.details, "device": "CPU Xeon"}}) for r in records]
    gpu, cpu = region_of(gather(records, None)), region_of(gather(on_cpu, None))
    assert gpu is not None and gpu.cheapest.params["rank"] == 8
    assert cpu is not None and cpu.cheapest.params["rank"] == 16
    line = region_lines(cpu)[1]
    assert "by accelerator-seconds" in line and "10 s × devices against 40" in line and " GB " not in line
    assert "to which trials before have added" in line and "to which trials" not in region_lines(gpu)[1]
    knee = knee_of(gather(on_cpu, None))
    assert knee is not None and "peak_memory_bytes" not in knee.values and "trials before" in knee_lines(knee)[0]


def test_the_best_is_expected_somewhere_also_among_settings_that_are_far_away() -> None:
    records = [r.model_copy(update={"details": {}}) for r in noisy({**dict.fromkeys(range(1, 51), 4.5), 60: 1e6}, 0)]
    told = luck_of(gather(records, None))
    assert told is not None and told.shrunk is not None and told.shrunk == pytest.approx(4.5, abs=0.03)
