"""What must be on disk before the first worker starts? Downloads, tokens, and the proof of a shared vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neo_ray import quickstart
from neo_ray.assets import is_quickstart
from neo_ray.config import StudentConfig, SweepConfig, TeacherConfig
from neo_ray.local import check_layers, check_suite
from neo_ray.parts import ModelSource, Sources
from neo_ray.searching import ObjectiveConfig
from neo_ray.settings import ConfigError
from neo_ray.space import build_space
from neo_ray.supply import Supply, choose
from neo_ray.uploads import SOURCES_FILE
from neo_ray.weights import identity

Announce = Callable[[str], None]


def prepare(config: SweepConfig, announce: Announce) -> Sources:
    """Check and make everything that needs no accelerator; the student of a pruned teacher follows in `make_student`.

    Raises:
        ConfigError: a missing file, a bad line, another vocabulary, nothing to train on. Nothing is written then.
    """
    from neo_ray import adapters, alignment, data, models

    def local(name: str) -> str:
        return quickstart.fetch(name, config.cache, announce) if is_quickstart(name) else name

    def model_source(section: TeacherConfig | StudentConfig | None) -> ModelSource | None:
        if section is None or section.model is None:
            return None
        return ModelSource(local(section.model), section.revision, section.trust_remote_code, section.quantization)

    teacher, named = model_source(config.teacher), model_source(config.student)
    student, where = (named, "student.model") if named is not None else (teacher, "teacher.model")
    assert student is not None
    tokenizer = models.load_tokenizer(student.path, student.revision, student.trust_remote_code, where)
    for source, at in ((teacher, "teacher.model"), (student, where)):
        if source is not None:
            models.check_weights(source.path, at)
    own = models.read_config(student.path, student.revision, student.trust_remote_code, where)
    check_layers(config, own.get_text_config().num_hidden_layers)
    space = build_space(config)
    if {"lora", "neo"} & set(space.reach("method")):
        outline = models.outline(student.path, own, student.trust_remote_code, where)
        for wanted, saved in itertools.product(space.reach("target_modules"), space.reach("modules_to_save")):
            names = {
                "target_modules": tuple(wanted) if isinstance(wanted, list) else wanted,
                "modules_to_save": tuple(saved or ()),
            }
            adapters.peft_settings(outline, config.lora.model_copy(update=names))
    rows = own.get_text_config().vocab_size
    models.check_context(config.data.max_length, student.path, own, where)
    vocabulary = min(rows, len(tokenizer))
    student_layers = teacher_layers = own.get_text_config().num_hidden_layers
    if teacher is not None and named is not None:
        theirs = models.load_tokenizer(teacher.path, teacher.revision, teacher.trust_remote_code, "teacher.model")
        other = models.read_config(teacher.path, teacher.revision, teacher.trust_remote_code, "teacher.model")
        vocabulary = models.prove_shared_vocabulary(theirs, tokenizer, other.get_text_config().vocab_size, rows)
        models.check_context(config.data.max_length, teacher.path, other, "teacher.model")
        teacher_layers = other.get_text_config().num_hidden_layers
    if config.student.prune is not None:
        student_layers = config.student.prune.num_layers
    alignment.check(config, space, student_layers, teacher_layers)
    folder = data.prepare(config.data, local(config.data.source), tokenizer, config.cache, announce)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    placement = config.teacher.placement if config.teacher is not None else "replicated"
    student = dataclasses.replace(student, quantization=config.student.quantization)  # a pruned one begins as the teacher
    return Sources(student, str(folder.resolve()), teacher, vocabulary, pad or 0, placement, suite=_suite(config, announce))


def for_scoring(config: SweepConfig, suite: str | None = None, limit: int | None = None) -> SweepConfig:
    """The sweep as one process prepares it to score its models again: on this suite of benchmarks, or on none.

    What trials were ranked by plays no part then, and a suite that is not asked need not be had.
    """
    asked = config.evaluation.model_copy(update={"suite": suite, "suite_at": "end", "suite_limit": limit})
    changed: dict[str, Any] = {"evaluation": asked, "objective": ObjectiveConfig()}
    changed["resources"] = config.resources.model_copy(update={"workers_per_trial": 1})
    if config.teacher is not None:
        changed["teacher"] = config.teacher.model_copy(update={"placement": "replicated"})
    return config.model_copy(update=changed)


def _suite(config: SweepConfig, announce: Announce) -> str | None:
    """The folder of the benchmarks, once each of them can be had and states its metric."""
    if config.evaluation.suite is None:
        return None
    from neo_ray import harness, suites

    check_suite(config)
    folder = suites.make_ready(config.evaluation.suite, config.cache, announce)
    limit, workers = config.evaluation.suite_limit, config.resources.workers_per_trial
    harness.open_suite(folder, limit, workers, 3 in build_space(config).reach("zero_stage"))
    return str(folder.resolve())


def supply_of(config: SweepConfig, sources: Sources) -> Supply:
    """Where the teacher's word comes from, now that the student's head is known; a pruned one has the teacher's.

    Raises:
        ConfigError: the mode asked for is not exact here.
    """
    from neo_ray import models

    student, where = sources.student, "student.model"
    own = models.read_config(student.path, student.revision, student.trust_remote_code, where)
    heads = models.head_names(models.outline(student.path, own, student.trust_remote_code, where))
    return choose(config, build_space(config), getattr(own.get_text_config(), "final_logit_softcapping", None), heads)


def identities(config: SweepConfig, sources: Sources) -> dict[str, str]:
    """What the data and the weights are, whatever their path: the same strings mean the same trials."""
    found = {"data.source": Path(sources.data).name}
    if sources.suite is not None:
        found["evaluation.suite"] = Path(sources.suite).name
    if config.teacher is not None and sources.teacher is not None:
        found["teacher.model"] = identity(sources.teacher.path, sources.teacher.revision, config.cache)
    if config.student.model is not None:
        found["student.model"] = identity(sources.student.path, sources.student.revision, config.cache)
    return found


def check_same_sources(results: Path, now: dict[str, str], remedy: str) -> None:
    """The same path may hold other data or weights than when a sweep was begun: its trials say nothing about those.

    Args:
        results: its folder; one without `sources.json` is not looked at.
        now: the `identities` of today.
        remedy: what the user can do, the end of the message.

    Raises:
        ConfigError: at what changed.
    """
    path = results / SOURCES_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    changed = [name for name in before if name in now and before[name] != now[name]]
    if changed:
        was, is_now = before[changed[0]], now[changed[0]]
        alike = was.startswith("sha256:") == is_now.startswith("sha256:")  # else one is a name, or tells less than every byte
        how = "changed since" if alike else "cannot be told to be the same as when"
        raise ConfigError(f"{changed[0]}: {' and '.join(changed)} {how} {results} was begun ({was} → {is_now}); {remedy}")


def make_student(config: SweepConfig, sources: Sources, announce: Announce = lambda _: None) -> Sources:
    """The sources with the pruned student in place (made once, kept in the cache)."""
    from neo_ray import pruning
    from neo_ray.data import collate, open_data

    if config.student.prune is None or sources.teacher is None:
        return sources
    tokens = config.student.prune.calibration_tokens

    def calibration() -> tuple[Any, Any, Any]:
        split = open_data(sources.data).split("train")
        count = max(1, int((split.num_tokens.cumsum() <= tokens).sum()))
        batch = collate(split.examples(range(count)), sources.pad_id)
        return batch.input_ids_BL, batch.attention_mask_BL, batch.labels_BL

    folder = pruning.student_folder(config, sources.teacher.path, calibration, config.cache, announce)
    return dataclasses.replace(sources, student=dataclasses.replace(sources.student, path=folder, revision=None))
