"""Where are the answers? An example as the text that the tokenizer reads, and the character ranges that are labelled in it.

Chat templates need not have `{% generation %}` tags: a range is found by rendering parts of the conversation, and checked
against the whole. A template that defeats this is refused, for a wrong mask trains on prompts without anyone noticing.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2

from neo_ray.settings import ConfigError
from neo_ray.sources import Example

TODAY = datetime.date(2024, 7, 26)
"""Templates that write the current date get this one (Llama 3's own default), so that tokens do not change overnight."""
PINNED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "aAbBdejmyYFHIMSp")
    + " }}{% endmacro %}"
)
"""In front of a template it hides the function of the same name; templates take no functions from outside."""
MARK = "⟦neo_ray⟧"
"""Stands for an answer where its place in a rendered chat is looked for."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as the tokenizer reads it."""

    text: str
    answers: list[Span] | None
    """Character ranges that are labelled; None: every token."""
    is_plain: bool
    """The tokenizer adds its special tokens and eos closes the text; otherwise a chat template wrote them all."""


def render(batch: Sequence[Example], tokenizer: Any) -> list[Rendered]:
    """Texts with their answers, in the tokenizer's chat template where the example has roles.

    Raises:
        ConfigError: a chat and no template, or a template that refuses the messages or hides an answer.
    """
    special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
    end_of_turn = re.compile("|".join(special) or r"(?!)")  # (?!) never matches
    template = _template(tokenizer)
    return [_render(example, tokenizer, template, end_of_turn) for example in batch]


def _template(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(f"data.format: {tokenizer.name_or_path}: {' '.join(str(error).split())}") from None
    return PINNED_DATE + template if "strftime_now" in template else template


def _render(example: Example, tokenizer: Any, template: str | None, end_of_turn: re.Pattern[str]) -> Rendered:
    if example.kind == "text":
        return Rendered(example.parts[0][1], None, is_plain=True)
    if template:
        messages = [{"role": speaker, "content": text} for speaker, text in example.parts]
        return _render_chat(messages, partial(_apply_template, tokenizer, template, example.where), end_of_turn, example.where)
    if example.kind == "chat":
        raise ConfigError(
            f"data.format: chat needs a tokenizer with a chat template, and that of {tokenizer.name_or_path} has none; "
            "use the tokenizer of an instruction-tuned model, or data with `instruction` and `response` columns"
        )
    (_, prompt), (_, response) = example.parts
    text = f"{prompt}\n\n{response}"
    return Rendered(text, [(len(prompt) + 2, len(text))], is_plain=True)


def _render_chat(messages: list[dict[str, str]], apply: Callable[..., str], end_of_turn: re.Pattern[str], where: str) -> Rendered:
    text, answers = apply(messages), []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _answer_by_prefix(text, messages, turn, apply) or _answer_by_mark(text, messages, turn, apply)
            if span is None:
                raise ConfigError(
                    f"data.source: {where}: the chat template rewrites message {turn + 1} so that the answer cannot be found "
                    "in it and prompts cannot be masked; use another template, or end the conversation there"
                )
            answers.append(_without_glue(text, span, message["content"].strip(), end_of_turn))
    return Rendered(text, answers, is_plain=False)


def _answer_by_prefix(text: str, messages: list[dict[str, str]], turn: int, apply: Callable[..., str]) -> Span | None:
    """What the template adds after the prompt for an answer, where rendering a beginning gives the beginning of the whole."""
    before = _prompt(messages[:turn], apply)
    until = text if turn + 1 == len(messages) else apply(messages[: turn + 1])
    return (len(before), len(until)) if before and until.startswith(before) and text.startswith(until) else None


def _answer_by_mark(text: str, messages: list[dict[str, str]], turn: int, apply: Callable[..., str]) -> Span | None:
    """Where the template writes other things around the last turn (Qwen3's thinking, DeepSeek-R1's prompt, Phi-3's eos).

    The answer is what stands in the place of a mark, with what closes the marked turn when it is the last one.
    """
    marked = {"role": "assistant", "content": MARK}
    lead, mark, rest = apply([*messages[:turn], marked, *messages[turn + 1 :]]).partition(MARK)
    _, _, closing = apply([*messages[:turn], marked]).partition(MARK)
    end_of_answer = len(text) - len(rest)
    if not mark or MARK in rest or end_of_answer < len(lead) or not (text.startswith(lead) and text.endswith(rest)):
        return None
    return len(lead), end_of_answer + len(os.path.commonprefix([closing, rest]))


def _prompt(messages: list[dict[str, str]], apply: Callable[..., str]) -> str | None:
    """What a model would be given to answer; None where the template does not say where the answer begins."""
    if not messages:
        return None  # templates refuse an empty conversation
    before = apply(messages, add_generation_prompt=True)
    return before if before != apply(messages) else None


def _without_glue(text: str, span: Span, answer: str, end_of_turn: re.Pattern[str]) -> Span:
    """Up to the first special token after the answer: generation stops there, and no model has to say what follows.

    Without one, up to the last character that is no whitespace; or all of it, where whitespace is all that ends the turn.
    """
    start, end = span
    after = text.rfind(answer, start, end) + len(answer)
    end_token = end_of_turn.search(text, after, end) if after >= start + len(answer) else None
    if end_token:
        return start, end_token.end()
    said = text[start:end].rstrip()
    return span if answer and said.endswith(answer) else (start, start + len(said))


def _apply_template(
    tokenizer: Any, template: str, where: str, messages: list[dict[str, str]], add_generation_prompt: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.source: {where}: the chat template refuses these messages ({' '.join(str(error).split())})"
        ) from None
