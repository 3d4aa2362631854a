"""Are the right tokens labelled, split and stored, and is every bad input refused by name?"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tiny import World, make_tokenizer, write_lines
from transformers import AutoTokenizer

from neo_ray.config import DataConfig
from neo_ray.data import IGNORED, SPLITS, Split, TokenData, collate, fingerprint, open_data, prepare
from neo_ray.settings import ConfigError

TEXTS = [f"The {animal} of number {number} sleeps." for number in range(20) for animal in ("cat", "dog", "größte Bär 🐻")]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# What published templates do around the last turn: Qwen3 writes an empty thought there, and drops earlier ones;
# DeepSeek-R1's prompt opens a thought that no answer has; Phi-3 closes the whole with another token; Mistral has no prompt.
THINKING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' and '</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].strip() }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OPENED_THOUGHT = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}")
CLOSED_WHOLE = CHATML.replace("assistant\n{% endif %}", "assistant\n{% else %}<|pad|>{% endif %}")
NO_PROMPT = "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "How are you, cat?"},
    {"role": "assistant", "content": "Very well! 🐻"},
    {"role": "user", "content": "assistant\nAnd the dog<|x|>"},
    {"role": "assistant", "content": "Asleep,\n\nas always."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_world: World) -> Any:
    return AutoTokenizer.from_pretrained(tiny_world.teacher)


@pytest.fixture
def run(tmp_path: Path, tokenizer: Any) -> Callable[..., TokenData]:
    """Write rows (or take a path), prepare, open."""

    def _run(rows: Any, **settings: Any) -> TokenData:
        settings = {"select_fraction": 0.3, "report_fraction": 0.3, "max_length": 200, **settings}
        chosen = settings.pop("tokenizer", tokenizer)
        path = rows if isinstance(rows, Path) else lines(tmp_path / "rows.jsonl", rows)
        config = DataConfig(source=str(path), **settings)
        return open_data(prepare(config, str(path), chosen, tmp_path / "cache", lambda message: None))

    return _run


def lines(path: Path, rows: list[Any]) -> Path:
    write_lines(path, rows)
    return path


def with_template(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def everything(data: TokenData) -> list[tuple[np.ndarray, np.ndarray]]:
    return [pair for name in SPLITS for pair in data.split(name).examples(range(len(data.split(name))))]


def answers(pair: tuple[np.ndarray, np.ndarray], tokenizer: Any) -> list[str]:
    """The text of each run of labelled tokens, special tokens included."""
    ids, labels = pair
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(labels != IGNORED)) + 1)
    assert all(np.array_equal(ids[run], labels[run]) for run in runs if labels[run[0]] != IGNORED)
    return [tokenizer.decode(ids[run]) for run in runs if labels[run[0]] != IGNORED]


def keys(data: TokenData) -> dict[str, list[str]]:
    return {name: list(data.split(name).rows["key"]) for name in SPLITS}


def chats(messages: list[dict[str, str]], times: int = 12) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "system", "content": f"Number {n}"}, *messages]} for n in range(times)]


def asked(number: int, **columns: str) -> dict[str, str]:
    return {"instruction": f"Say {number}.", "response": f"It is {number}!", **columns}


# Labels


def test_text_is_labelled_whole_and_closed_by_eos(run: Callable[..., TokenData], tokenizer: Any) -> None:
    pairs = everything(run([{"text": text} for text in TEXTS]))
    assert {tokenizer.decode(ids) for ids, _ in pairs} == {text + "<|end|>" for text in TEXTS}
    assert all(np.array_equal(ids, labels) for ids, labels in pairs)


def test_only_the_answer_and_its_end_of_turn_are_labelled(run: Callable[..., TokenData]) -> None:
    tokenizer = with_template(CHATML)
    pairs = everything(run([asked(n, input="Loud.") for n in range(12)], tokenizer=tokenizer))
    assert sorted(answers(pair, tokenizer) for pair in pairs) == sorted([f"It is {n}!<|end|>"] for n in range(12))
    assert all("Be kind." in tokenizer.decode(ids) and ".\n\nLoud.<|end|>" in tokenizer.decode(ids) for ids, _ in pairs)


@pytest.mark.parametrize("template", [CHATML, THINKING, OPENED_THOUGHT, CLOSED_WHOLE, NO_PROMPT])
def test_every_assistant_turn_is_labelled_under_templates_of_all_kinds(run: Callable[..., TokenData], template: str) -> None:
    tokenizer = with_template(template)
    for pair in everything(run(chats(CONVERSATION), tokenizer=tokenizer)):
        first, second = answers(pair, tokenizer)
        assert first == "Very well! 🐻<|end|>"
        assert second.removeprefix("<think>\n\n</think>\n\n") == "Asleep,\n\nas always.<|end|>"


def test_a_thought_is_learned_in_the_last_turn_and_cut_from_earlier_ones(run: Callable[..., TokenData]) -> None:
    tokenizer, thought = with_template(THINKING), "<think>\nhm\n</think>\n\n"
    thoughtful = [{**m, "content": thought + m["content"]} if m["role"] == "assistant" else m for m in CONVERSATION]
    for pair in everything(run(chats(thoughtful), tokenizer=tokenizer)):
        assert answers(pair, tokenizer) == ["Very well! 🐻<|end|>", f"{thought}Asleep,\n\nas always.<|end|>"]


def test_whitespace_is_labelled_where_nothing_else_ends_a_turn(run: Callable[..., TokenData]) -> None:
    tokenizer = with_template(NO_END)
    for pair in everything(run(chats(CONVERSATION), tokenizer=tokenizer)):
        assert [a.lstrip() for a in answers(pair, tokenizer)] == ["Very well! 🐻\n\n", "Asleep,\n\nas always.\n\n"]


def test_a_conversation_may_begin_with_the_assistant(run: Callable[..., TokenData]) -> None:
    tokenizer = with_template(CHATML)
    rows = [{"messages": [{"role": "assistant", "content": f"Hello {n}"}, CONVERSATION[0]]} for n in range(12)]
    found = sorted(answers(pair, tokenizer)[0] for pair in everything(run(rows, tokenizer=tokenizer)))
    assert found == sorted(f"Hello {n}<|end|>" for n in range(12))


def test_sharegpt_gives_the_tokens_of_messages(run: Callable[..., TokenData]) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
        for row in chats(CONVERSATION)
    ]
    for ours, theirs in zip(everything(run(chats(CONVERSATION))), everything(run(shared)), strict=True):
        assert np.array_equal(ours, theirs)


def test_without_a_template_an_instruction_stands_above_its_answer(run: Callable[..., TokenData]) -> None:
    tokenizer = with_template(None)
    for ids, labels in everything(run([asked(n) for n in range(12)], tokenizer=tokenizer)):
        prompt, answer = tokenizer.decode(ids).split("\n\n")
        assert (
            prompt.startswith("Say ") and answers((ids, labels), tokenizer)[0].lstrip() == answer and answer.endswith("!<|end|>")
        )


def test_pad_equal_to_eos_takes_no_label_away(run: Callable[..., TokenData]) -> None:
    tokenizer = with_template(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    pairs = everything(run([asked(n, input="x" * n) for n in range(12)], tokenizer=tokenizer))
    batch = collate(pairs, pad_id=tokenizer.pad_token_id)
    last = batch.attention_mask_BL.sum(1) - 2  # a line break follows the end of the turn
    assert (batch.labels_BL[torch.arange(len(pairs)), last] == tokenizer.eos_token_id).all()


def test_dates_in_templates_stand_still(run: Callable[..., TokenData]) -> None:
    tokenizer = with_template(
        "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}{{ today }}\n" + CHATML
    )
    assert tokenizer.decode(everything(run(chats(CONVERSATION), tokenizer=tokenizer))[0][0]).startswith("26 Jul 2024\n")


def test_bos_stands_in_front_only_where_the_tokenizer_puts_it(run: Callable[..., TokenData]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 0)])
    rows = [{"text": text} for text in TEXTS]
    assert all(ids[0] == 0 and ids[1] != 0 for ids, _ in everything(run(rows, tokenizer=tokenizer)))
    chat = everything(run(chats(CONVERSATION), tokenizer=tokenizer))
    assert all(0 not in ids for ids, _ in chat)


# Lengths and counts


def test_long_examples_are_cut_on_the_right_and_counted(run: Callable[..., TokenData], tokenizer: Any) -> None:
    data = run([{"text": text} for text in TEXTS], max_length=8)
    for ids, _ in everything(data):
        assert len(ids) <= 8 and tokenizer.decode(ids[:3]).startswith("The ")
    whole = sum(len(tokenizer(text)["input_ids"]) + 1 > 8 for text in TEXTS)
    assert sum(data.summary[name]["truncated"] for name in SPLITS) == whole > 0


def test_examples_without_a_label_are_dropped_and_counted(run: Callable[..., TokenData], tokenizer: Any) -> None:
    rows = [asked(n) for n in range(12)] + [asked(n, input="word " * 100) for n in range(5)]
    data = run(rows, max_length=50)
    assert sum(len(data.split(name)) for name in SPLITS) == sum(data.summary[name]["examples"] for name in SPLITS) == 12
    assert sum(data.summary[name]["dropped"] for name in SPLITS) == 5


def test_counts_are_those_of_what_a_causal_model_scores(run: Callable[..., TokenData], tokenizer: Any) -> None:
    for rows in ([{"text": text} for text in TEXTS], chats(CONVERSATION)):
        data = run(rows)
        for name in SPLITS:
            split = data.split(name)
            for index, (ids, labels) in enumerate(split.examples(range(len(split)))):
                scored = labels[1:][labels[1:] != IGNORED]
                assert split.num_tokens[index] == len(ids) == len(labels)
                assert split.num_labels[index] == len(scored)
                assert split.num_bytes[index] == len(tokenizer.decode(scored, skip_special_tokens=True).encode())
            assert data.summary[name]["tokens"] == split.num_tokens.sum()
            assert data.summary[name]["labels"] == split.num_labels.sum()
            assert data.summary[name]["bytes"] == split.num_bytes.sum()


def test_bytes_are_those_of_the_answer(run: Callable[..., TokenData]) -> None:
    data = run(chats(CONVERSATION), tokenizer=with_template(CHATML))
    assert set(data.split("train").num_bytes) == {len(("Very well! 🐻" + "Asleep,\n\nas always.").encode())}


def test_examples_come_in_the_order_asked(run: Callable[..., TokenData]) -> None:
    split = run([{"text": text} for text in TEXTS]).split("train")
    one_by_one = [split.examples([index])[0][0] for index in (3, 0, 3, len(split) - 1)]
    together = [ids for ids, _ in split.examples(np.array([3, 0, 3, len(split) - 1]))]
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    assert not np.array_equal(together[0], together[1])


# Splits


def test_order_of_the_source_changes_nothing(run: Callable[..., TokenData]) -> None:
    rows = [{"text": text} for text in TEXTS]
    shuffled = random.Random(0).sample(rows, len(rows))
    ours, theirs = run(rows), run(shuffled)
    assert ours.fingerprint != theirs.fingerprint and keys(ours) == keys(theirs)
    for name in SPLITS:
        assert (ours.folder / f"{name}.arrow").read_bytes() == (theirs.folder / f"{name}.arrow").read_bytes()


def test_examples_keep_their_split_when_others_are_added(run: Callable[..., TokenData]) -> None:
    before = keys(run([{"text": text} for text in TEXTS[:40]]))
    after = keys(run([{"text": text} for text in TEXTS]))
    assert all(set(before[name]) <= set(after[name]) for name in SPLITS)


def test_splits_share_no_example_and_copies_stay_together(run: Callable[..., TokenData]) -> None:
    found = keys(run([{"text": text} for text in TEXTS * 2]))
    assert sum(len(set(found[name])) for name in SPLITS) == len(set().union(*found.values())) == len(TEXTS)
    assert all(sorted(found[name]) == sorted([*set(found[name])] * 2) for name in SPLITS)


def test_shares_are_those_asked_for(run: Callable[..., TokenData]) -> None:
    rows = [{"text": f"{n} sheep"} for n in range(2000)]
    for limit in (None, 1000):
        found = run(rows, select_fraction=0.2, report_fraction=0.1, limit=limit)
        total, sizes = limit or 2000, {name: len(found.split(name)) for name in SPLITS}
        assert sum(sizes.values()) == total
        # four standard deviations of a binomial share
        assert abs(sizes["select"] / total - 0.2) < 4 * (0.2 * 0.8 / total) ** 0.5
        assert abs(sizes["report"] / total - 0.1) < 4 * (0.1 * 0.9 / total) ** 0.5


def test_limits_keep_the_first_in_hash_order(run: Callable[..., TokenData]) -> None:
    rows = [{"text": text} for text in TEXTS]
    whole, limited, short = keys(run(rows)), keys(run(rows[::-1], limit=30)), keys(run(rows, train_limit=5))
    assert sum(map(len, limited.values())) == 30
    assert all(whole[name][: len(limited[name])] == limited[name] for name in SPLITS)
    assert short == {**whole, "train": whole["train"][:5]}


# Sources


def test_all_kinds_of_files_give_the_same_tokens(run: Callable[..., TokenData], tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines(tmp_path / "b.json", rows)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "e.txt").write_text("\n \n\n".join(TEXTS), encoding="utf-8")
    lines(tmp_path / "folder" / "f.jsonl", rows[:20])
    lines(tmp_path / "folder" / "deeper" / "g.jsonl", rows[20:])
    expected = keys(run(rows))
    for name in ("a.json", "b.json", "c.parquet", "d.csv", "e.txt", "folder"):
        assert keys(run(tmp_path / name)) == expected, name


def test_byte_order_marks_and_descriptions_of_a_data_set_are_no_data(run: Callable[..., TokenData], tmp_path: Path) -> None:
    expected = keys(run([{"text": text} for text in TEXTS]))
    body = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    contents = {
        "a.jsonl": body,
        "b.json": json.dumps([{"text": t} for t in TEXTS]),
        "c.csv": "text\n" + "\n".join(TEXTS),
        "d.txt": "\n\n".join(TEXTS),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert keys(run(tmp_path / name)) == expected, name
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.json").write_text(body)
    (tmp_path / "folder" / "dataset_info.json").write_text('{"features": {}}')
    assert keys(run(tmp_path / "folder")) == expected


def test_parquet_holds_chats(run: Callable[..., TokenData], tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(chats(CONVERSATION)), tmp_path / "chats.parquet")
    assert keys(run(tmp_path / "chats.parquet")) == keys(run(chats(CONVERSATION)))


def test_columns_of_other_names_are_mapped(run: Callable[..., TokenData]) -> None:
    rows = [asked(n, input="x") for n in range(12)]
    renamed = [{"ask": row["instruction"], "context": row["input"], "say": row["response"]} for row in rows]
    mapped = run(renamed, columns={"instruction": "ask", "input": "context", "response": "say"})
    usual = run([{"question": row["instruction"], "input": row["input"], "answer": row["response"]} for row in rows])
    assert keys(mapped) == keys(usual) == keys(run(rows, format="instruction"))


def test_format_decides_between_columns(run: Callable[..., TokenData]) -> None:
    rows = [{"text": f"text {n}", **asked(n)} for n in range(12)]
    assert keys(run(rows)) == keys(run([asked(n) for n in range(12)]))
    assert keys(run(rows, format="text")) == keys(run([{"text": f"text {n}"} for n in range(12)]))


# Reuse


def test_what_only_a_hub_data_set_has_is_said_to_be_ignored_where_it_was_asked_for(
    tiny_world: World, tokenizer: Any, tmp_path: Path
) -> None:
    resolved = DataConfig.model_validate(DataConfig(source=str(tiny_world.data)).model_dump())
    said: list[str] = []
    for config in (resolved, DataConfig(source=str(tiny_world.data), subset="0625")):
        prepare(config, str(tiny_world.data), tokenizer, tmp_path, said.append)
    assert [line for line in said if "ignored" in line] == [f"data.subset: ignored, since {tiny_world.data} is no hub data set"]


def test_data_are_tokenised_once(tmp_path: Path, tiny_world: World, tokenizer: Any) -> None:
    config, said = DataConfig(source=str(tiny_world.data)), list[str]()
    folder = prepare(config, str(tiny_world.data), tokenizer, tmp_path, said.append)
    stamp = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(config, str(tiny_world.data), tokenizer, tmp_path, said.append) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamp
    assert sum("tokenising 200 examples" in message for message in said) == 1 and "reused" in said[-1]
    assert [path.name for path in folder.parent.iterdir() if path.name != f"{folder.name}.lock"] == [folder.name]
    assert open_data(folder).fingerprint == folder.name


def test_what_a_killed_process_left_is_removed(tmp_path: Path, tiny_world: World, tokenizer: Any) -> None:
    config = DataConfig(source=str(tiny_world.data))
    folder = prepare(config, str(tiny_world.data), tokenizer, tmp_path, lambda message: None)
    abandoned = folder.with_name(f".{folder.name}.abc123")
    folder.rename(abandoned)
    assert prepare(config, str(tiny_world.data), tokenizer, tmp_path, lambda message: None) == folder
    assert not abandoned.exists()


def test_processes_at_the_same_time_tokenise_once(tmp_path: Path, tiny_world: World) -> None:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        said = pool.map(_prepare_apart, [(tiny_world, tmp_path)] * 4, chunksize=1)
    assert sum(any("tokenising" in message for message in messages) for messages in said) == 1


def _prepare_apart(job: tuple[World, Path]) -> list[str]:
    world, cache = job
    said: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    prepare(DataConfig(source=str(world.data)), str(world.data), tokenizer, cache, said.append)
    return said


def test_fingerprint_follows_what_determines_the_tokens(tokenizer: Any) -> None:
    base = DataConfig(source="a")
    changes: list[dict[str, Any]] = [
        {"format": "text"},
        {"columns": {"text": "body"}},
        {"max_length": 7},
        {"limit": 9},
        {"train_limit": 9},
        {"select_fraction": 0.1},
        {"report_fraction": 0.1},
    ]
    prints = [fingerprint(base.model_copy(update=change), "content", tokenizer) for change in [{}, *changes]]
    prints += [fingerprint(base, "other content", tokenizer)]
    prints += [fingerprint(base, "content", with_template(template)) for template in (None, CHATML)]
    other = make_tokenizer()
    other.eos_token = "<|pad|>"
    prints += [fingerprint(base, "content", other)]
    assert len(set(prints)) == len(prints)


def test_fingerprint_ignores_what_does_not(tokenizer: Any) -> None:
    base = fingerprint(DataConfig(source="a"), "content", tokenizer)
    assert fingerprint(DataConfig(source="b", subset="c", split="d"), "content", tokenizer) == base
    assert fingerprint(DataConfig(source="b", split="d"), "content", tokenizer, is_local=False) != base
    other = make_tokenizer()
    other.pad_token = "<|end|>"
    other(["a", "b c"], padding=True, truncation=True, max_length=9)
    assert fingerprint(DataConfig(source="a"), "content", other) == base


def test_a_moved_file_is_reused_and_a_changed_one_is_not(tmp_path: Path, run: Callable[..., TokenData]) -> None:
    rows = [{"text": text} for text in TEXTS]
    one, moved = run(lines(tmp_path / "one.jsonl", rows)), run(lines(tmp_path / "elsewhere" / "two.jsonl", rows))
    changed = run(lines(tmp_path / "one.jsonl", rows[1:]))
    assert one.folder == moved.folder != changed.folder


# Batches


PAIRS = [
    (np.array([5, 6, 7], np.int32), np.array([-100, 6, 7], np.int32)),
    (np.array([8, 9], np.int32), np.array([8, 9], np.int32)),
]


@pytest.mark.parametrize(
    ("side", "ids", "labels", "mask", "positions"),
    [
        ("right", [8, 9, 7], [-100, 9, -100], [1, 1, 0], [0, 1, 0]),
        ("left", [7, 8, 9], [-100, -100, 9], [0, 1, 1], [0, 0, 1]),
    ],
)
def test_padding_on_either_side_is_masked_and_unlabelled(
    side: Any, ids: list[int], labels: list[int], mask: list[int], positions: list[int]
) -> None:
    batch = collate(PAIRS, pad_id=7, side=side)
    assert batch.input_ids_BL.tolist() == [[5, 6, 7], ids]
    assert batch.labels_BL.tolist() == [[-100, 6, 7], labels]
    assert batch.attention_mask_BL is not None and batch.attention_mask_BL.tolist() == [[1, 1, 1], mask]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2], positions]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}


def test_packed_sequences_lie_end_to_end_and_no_label_crosses_over() -> None:
    batch = collate(PAIRS, pad_id=7, packing=True)
    assert batch.input_ids_BL.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels_BL.tolist() == [[-100, 6, 7, -100, 9]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_mask_BL is None


def test_stored_arrays_are_int32_and_counts_int64(run: Callable[..., TokenData]) -> None:
    split: Split = run([{"text": text} for text in TEXTS]).split("train")
    assert {array.dtype for pair in split.examples([0, 1]) for array in pair} == {np.dtype(np.int32)}
    assert {array.dtype for array in (split.num_tokens, split.num_labels, split.num_bytes)} == {np.dtype(np.int64)}


# Mistakes

GOOD = {"text": "a good line of text"}
BAD_LINES: list[tuple[str, str]] = [
    ('{"text": "x"', "line 17: not valid JSON (Expecting ',' delimiter at column 13)"),
    ('["x"]', "line 17: ['x'] (list) is not an object of columns"),
    ('{"txet": "x"}', "line 17: no column `text` (did you mean `txet`?); it has txet"),
    ('{"text": 5}', "line 17: column `text` holds 5 (int), must be a string"),
    ('{"text": null}', "line 17: column `text` holds nothing (null), must be a string"),
    ('{"text": "\\ud800"}', "line 17: column `text` holds half of a surrogate pair, which is not text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_with_its_number(run: Callable[..., TokenData], tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n" * 8 + line + f"\n{json.dumps(GOOD)}\n")
    with pytest.raises(ConfigError) as error:
        run(path)
    assert str(error.value) == f"data.source: {path} {message}"
    assert not (tmp_path / "cache").exists()


def test_bytes_that_are_not_utf8_are_named_with_their_line(run: Callable[..., TokenData], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (tmp_path / "bad.txt").write_bytes(b"a\n\n\xff")
    (tmp_path / "bad.csv").write_bytes(b"text\n\xff\n")
    for name, message in (
        ("bad.jsonl", "line 2: not valid JSON (not UTF-8 at byte 10)"),
        ("bad.txt", "not UTF-8"),
        ("bad.csv", "not UTF-8"),
    ):
        with pytest.raises(ConfigError) as error:
            run(tmp_path / name)
        assert name in str(error.value) and message in str(error.value)


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("hello", "column `messages` holds 'hello' (str), must be a list of messages"),
    ([], "column `messages` holds [] (list), must be a list of messages"),
    (["hello"], "column `messages`, message 1 is 'hello' (str), must be {role, content} or {from, value}"),
    (
        [CONVERSATION[0], {"role": "asistant", "content": "x"}],
        "message 2: `role` is 'asistant' (str) (did you mean `assistant`?)",
    ),
    ([{"from": "human", "value": None}], "message 1: `value` holds nothing (null), must be a string"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_messages_are_named(run: Callable[..., TokenData], messages: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run([*chats(CONVERSATION, 2), {"messages": messages}])
    assert "rows.jsonl line 3: " in str(error.value) and message in str(error.value)


def test_bad_rows_of_other_files_are_named(run: Callable[..., TokenData], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,other\n"two\nlines",x\nz\n')
    (tmp_path / "b.json").write_text('[{"text": "x"}, 3]')
    pa.parquet.write_table(pa.Table.from_pylist([GOOD, {"text": None}]), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_text("not parquet at all")
    for name, message in (
        ("a.csv", "line 4: has another number of fields than the header (2)"),
        ("b.json", "item 2: 3 (int) is not an object of columns"),
        ("c.parquet", "row 2: column `text` holds nothing (null), must be a string"),
        ("d.parquet", "not valid Parquet"),
    ):
        with pytest.raises(ConfigError) as error:
            run(tmp_path / name)
        assert name in str(error.value) and message in str(error.value)


BAD_SETTINGS: list[tuple[dict[str, Any], list[dict[str, Any]], str]] = [
    (
        {},
        [],
        "data.source: ",
    ),
    ({}, [{"txet": "x"}], "data.format: auto finds no examples in the columns txet (did you mean `text`?) of "),
    (
        {"format": "instruction"},
        [GOOD],
        "it looks for instruction | prompt | question + response | output | completion | answer; ",
    ),
    ({"columns": {"text": "body"}}, [{"bodi": "x"}], "(did you mean `body`?)"),
    (
        {"columns": {"txt": "x"}},
        [GOOD],
        "data.columns: unknown role `txt` (did you mean `text`?); allowed: messages, instruction,",
    ),
    ({"columns": {"text": "a", "messages": "b"}}, [GOOD], "data.columns: no format has all of the roles text, messages"),
    ({"format": "chat", "columns": {"text": "a"}}, [GOOD], "data.columns: format chat has not all of the roles text"),
    (
        {"select_fraction": 1e-6},
        [GOOD],
        "data.select_fraction 1e-06 of 1 examples leave the select split empty; raise it or give more examples",
    ),
    ({"limit": 1, "report_fraction": 1e-6}, [GOOD, {"text": "b"}], "(or data.limit 1)"),
    (
        {"select_fraction": 0.5, "report_fraction": 0.4999},
        [{"text": f"{n} x"} for n in range(20)],
        "leave the train split empty; lower it",
    ),
]


@pytest.mark.parametrize(("settings", "rows", "message"), BAD_SETTINGS)
def test_settings_that_leave_no_data_are_refused(
    run: Callable[..., TokenData], tmp_path: Path, settings: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run(rows, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_an_empty_source_is_refused(run: Callable[..., TokenData], tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.txt", "empty.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(ConfigError, match=f"data.source: .*{name}: holds no examples"):
            run(tmp_path / name)


def test_data_without_any_label_are_refused(run: Callable[..., TokenData], tmp_path: Path) -> None:
    message = "all tokens are masked: none of 12 examples has a labelled token within data.max_length 4"
    with pytest.raises(ConfigError, match=message):
        run([asked(n) for n in range(12)], max_length=4)
    with pytest.raises(ConfigError, match="all tokens are masked: none of 3 examples"):
        run(chats(CONVERSATION[:1], 3))
    assert not (tmp_path / "cache").exists()


def test_missing_and_unreadable_files_are_named(run: Callable[..., TokenData], tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", [GOOD])
    lines(tmp_path / "mixed" / "a.jsonl", [GOOD])
    (tmp_path / "mixed" / "b.txt").write_text("x")
    (tmp_path / "none").mkdir()
    (tmp_path / "a.jsn").write_text("x")
    for name, message in (
        ("trian.jsonl", "no such file or folder (did you mean `train.jsonl`?)"),
        ("mixed", "holds .jsonl and .txt files; name a folder of one type"),
        ("none", "no data file in this folder; readable are .jsonl, .ndjson, .json, .parquet, .csv, .txt"),
        ("a.jsn", "unknown type of file `.jsn` (did you mean `.json`?); readable are"),
    ):
        with pytest.raises(ConfigError) as error:
            run(tmp_path / name)
        assert str(error.value).startswith(f"data.source: {tmp_path / name}: {message}")


def test_a_name_without_owner_is_no_hub_name(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="data.source: json: no such file or folder; a hub data set is named owner/name"):
        prepare(DataConfig(source="json"), "json", tokenizer, tmp_path / "cache")


def test_a_hub_name_offline_says_so(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(DataConfig(source="nobody/nothing"), "nobody/nothing", tokenizer, tmp_path / "cache")
    assert str(error.value).startswith("data.source: nobody/nothing: no such file or folder, and the hub cannot be reached")
    assert not (tmp_path / "cache").exists()


def test_a_chat_without_a_template_is_refused(run: Callable[..., TokenData]) -> None:
    with pytest.raises(ConfigError, match="data.format: chat needs a tokenizer with a chat template"):
        run(chats(CONVERSATION), tokenizer=with_template(None))


def test_a_template_that_refuses_or_hides_an_answer_is_named(run: Callable[..., TokenData]) -> None:
    refusing = with_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system, please') }}{% endif %}" + CHATML
    )
    with pytest.raises(ConfigError, match=r"rows.jsonl line \d+: the chat template refuses these messages \(No system, please\)"):
        run(chats(CONVERSATION), tokenizer=refusing)
    for template in (
        "{% for m in messages %}{{ m['content'] | length }}{% endfor %}",
        "{{ messages | map(attribute='content') | join | length }}\n" + NO_PROMPT,  # what an answer is changes what precedes it
    ):
        with pytest.raises(ConfigError, match="the chat template rewrites message 3 so that the answer cannot be found"):
            run(chats(CONVERSATION), tokenizer=with_template(template))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, tiny_world: World, tokenizer: Any) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ConfigError, match="storage.cache: .*cache/data: cannot be written"):
        prepare(DataConfig(source=str(tiny_world.data)), str(tiny_world.data), tokenizer, tmp_path / "cache")
