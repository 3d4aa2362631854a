"""How are examples read? Files, folders and hub data sets → validated `Example`s, each of which knows where it stands.

Neither torch nor datasets is imported until a hub data set is asked for, so that a bad file is reported quickly.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from neo_ray.config import DataConfig
from neo_ray.mistakes import guess
from neo_ray.settings import ConfigError

Kind = Literal["chat", "instruction", "text"]
Row = tuple[str, dict[str, Any]]
"""Where it stands (`train.jsonl line 17`) and its columns."""

ROLES: dict[Kind, tuple[str, ...]] = {"chat": ("messages",), "instruction": ("instruction", "response"), "text": ("text",)}
"""What a kind of example is made of, in the order in which `auto` tries them; `instruction` may have an `input` besides."""
SPELLINGS = {
    "messages": ("messages", "conversations"),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input",),
    "response": ("response", "output", "completion", "answer"),
    "text": ("text",),
}
SPEAKERS = {"human": "user", "gpt": "assistant", **{name: name for name in ("system", "user", "assistant", "tool")}}
"""ShareGPT's and the usual names of who speaks → the names that chat templates know."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""Files that describe a data set in its folder and hold no examples."""


@dataclass(frozen=True, slots=True)
class Example:
    kind: Kind
    parts: tuple[tuple[str, str], ...]
    """(speaker, text) of each message; prompt and response; or ("text", text) alone."""
    where: str

    def key(self) -> bytes:
        """16 bytes that depend on the content alone, not on its place, file or spelling of columns."""
        content = json.dumps([self.kind, self.parts], ensure_ascii=False, separators=(",", ":"))
        return hashlib.blake2b(content.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Source:
    content: str
    """Changes with what is in it: hash of the files' bytes, or the hub data set's fingerprint."""
    is_local: bool
    rows: Callable[[], Iterator[Row]]


def open_source(config: DataConfig, source: str) -> Source:
    """A local file, a folder of files of one type, or a hub data set; only the latter is loaded here.

    Raises:
        ConfigError: no such file or data set, an unknown type of file, or the hub cannot be reached.
    """
    files = locate(source)
    if files is None:
        return _hub(config, source)
    digests = sorted(f"{path.suffix.lower()} {_file_hash(path)}" for path in files)
    content = hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()
    return Source(content, True, lambda: itertools.chain.from_iterable(READERS[p.suffix.lower()](p) for p in files))


def locate(source: str) -> list[Path] | None:
    """The files of a local source, or None where `source` can only be the name of a hub data set.

    Raises:
        ConfigError: it is a path, and nothing readable is there.
    """
    path, types = Path(source).expanduser(), ", ".join(READERS)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.name not in DESCRIPTIONS)
        files = [p for p in found if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)]
        suffixes = sorted({p.suffix.lower() for p in files})
        if not files:
            raise ConfigError(f"data.source: {source}: no data file in this folder; readable are {types}")
        if len(suffixes) > 1:
            raise ConfigError(f"data.source: {source}: holds {' and '.join(suffixes)} files; name a folder of one type")
        return files
    if path.exists():
        if path.suffix.lower() not in READERS:
            hint = guess(path.suffix, READERS)
            raise ConfigError(f"data.source: {source}: unknown type of file `{path.suffix}`{hint}; readable are {types}")
        return [path]
    # Of a name without owner, such as `json`, datasets would make a reader of all files in the current folder.
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and path.suffix.lower() not in READERS
    if not is_hub_name:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = guess(path.name, siblings) or ("" if "/" in source else "; a hub data set is named owner/name")
        raise ConfigError(f"data.source: {source}: no such file or folder{hint}")
    return None


def examples(config: DataConfig, rows: Iterator[Row]) -> Iterator[Example]:
    """Validated examples of the rows, in their order. The first row decides which columns are read.

    Raises:
        ConfigError: naming the row and the column that is missing or has the wrong type.
    """
    first = next(rows, None)
    if first is None:
        return
    kind, columns = _layout(config, *first)
    for where, row in itertools.chain([first], rows):
        for column in columns.values():
            if column not in row:
                raise _bad(where, f"no column `{column}`{guess(column, row)}; it has {', '.join(map(str, row)) or 'none'}")
        yield Example(kind, _parts(kind, columns, row, where), where)


def _layout(config: DataConfig, where: str, row: dict[str, Any]) -> tuple[Kind, dict[str, str]]:
    """The kind of the examples, and role → column for every role that each row must have."""
    for role in config.columns:
        if role not in SPELLINGS:
            raise ConfigError(f"data.columns: unknown role `{role}`{guess(role, SPELLINGS)}; allowed: {', '.join(SPELLINGS)}")
    kinds = [kind for kind in ROLES if config.format in ("auto", kind) and set(config.columns) <= {*_roles(kind)}]
    if not kinds:
        what = "no format has all" if config.format == "auto" else f"format {config.format} has not all"
        raise ConfigError(f"data.columns: {what} of the roles {', '.join(config.columns)}")
    for kind in kinds:
        columns = {role: _column(config, role, row) for role in ROLES[kind]}
        if all(column in row for column in columns.values()):
            return kind, columns | config.columns
    wanted = [[_spellings(config, role) for role in ROLES[kind]] for kind in kinds]
    looks_for = ", or ".join(" + ".join(" | ".join(names) for names in roles) for roles in wanted)
    absent = [name for roles in wanted for names in roles for name in names if name not in row]
    near = next(filter(None, (guess(name, absent) for name in row)), "")
    raise ConfigError(
        f"data.format: {config.format} finds no examples in the columns {', '.join(row) or '(none)'}{near} of {where}; "
        f"it looks for {looks_for}; name yours in data.columns, e.g. {{text: body}}"
    )


def _roles(kind: Kind) -> tuple[str, ...]:
    return (*ROLES[kind], "input") if kind == "instruction" else ROLES[kind]


def _spellings(config: DataConfig, role: str) -> tuple[str, ...]:
    return (config.columns[role],) if role in config.columns else SPELLINGS[role]


def _column(config: DataConfig, role: str, row: dict[str, Any]) -> str:
    spellings = _spellings(config, role)
    return next((name for name in spellings if name in row), spellings[0])


def _parts(kind: Kind, columns: dict[str, str], row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    if kind == "text":
        return (("text", _string(row[columns["text"]], f"column `{columns['text']}`", where)),)
    if kind == "chat":
        return tuple(_messages(row[columns["messages"]], columns["messages"], where))
    prompt, response = (_string(row[columns[role]], f"column `{columns[role]}`", where) for role in ("instruction", "response"))
    name = columns.get("input", "input")
    extra = "" if row.get(name) is None else _string(row[name], f"column `{name}`", where)
    return (("user", f"{prompt}\n\n{extra}" if extra.strip() else prompt), ("assistant", response))


def _messages(value: Any, column: str, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise _bad(where, f"column `{column}` holds {_shown(value)}, must be a list of messages")
    for number, message in enumerate(value, 1):
        here = f"column `{column}`, message {number}"
        if not isinstance(message, dict):
            raise _bad(where, f"{here} is {_shown(message)}, must be {{role, content}} or {{from, value}}")
        speaker, text = ("from", "value") if "from" in message else ("role", "content")
        name = message.get(speaker)
        if name not in SPEAKERS:
            raise _bad(where, f"{here}: `{speaker}` is {_shown(name)}{guess(name, SPEAKERS)}; allowed: {', '.join(SPEAKERS)}")
        yield SPEAKERS[name], _string(message.get(text), f"{here}: `{text}`", where)


def _string(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, f"{what} holds {_shown(value)}, must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(where, f"{what} holds half of a surrogate pair, which is not text") from None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing (null)" if value is None else f"{text[:40]}{'…' if len(text) > 40 else ''} ({type(value).__name__})"


def _bad(where: str, what: str) -> ConfigError:
    return ConfigError(f"data.source: {where}: {what}")


def _jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:  # bytes: U+2028 inside a string is no end of a line
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _object(_parse(line.rstrip(), where), where)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or (as often under this name) one object a line."""
    content = path.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    for number, item in enumerate(_parse(content, str(path)), 1):
        where = f"{path} item {number}"
        yield where, _object(item, where)


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise _bad(where, f"not valid JSON (not UTF-8 at byte {error.start})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise _bad(where, f"not valid JSON ({error.msg} at {line}column {error.colno})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(where, f"{_shown(value)} is not an object of columns")
    return value


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # documents are longer than the default of 128 KB
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise _bad(where, f"has another number of fields than the header ({len(reader.fieldnames or [])})")
                yield where, row
    except csv.Error as error:
        raise _bad(f"{path} line {reader.line_num}", f"not valid CSV ({error})") from None
    except UnicodeDecodeError as error:
        raise _bad(str(path), f"not UTF-8 ({error.reason})") from None


def _text(path: Path) -> Iterator[Row]:
    """Paragraphs separated by blank lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(str(path), f"not UTF-8 at byte {error.start}") from None
    paragraphs = filter(None, (part.strip() for part in re.split(r"\n[ \t]*\n", text)))
    return ((f"{path} paragraph {number}", {"text": part}) for number, part in enumerate(paragraphs, 1))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for number, row in enumerate(itertools.chain.from_iterable(batches), 1):
                yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise _bad(str(path), f"not valid Parquet ({_first_line(error)})") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _text,
}


def _file_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"data.source: {path}: cannot be read ({error.strerror})") from None


def _hub(config: DataConfig, name: str) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config.subset, split=config.split, revision=config.revision)
    except Exception as error:  # the hub's client raises a dozen unrelated types; every one means that there is no data
        raise ConfigError(_hub_mistake(config, name, error)) from error
    table = loaded.with_format("arrow")

    def rows() -> Iterator[Row]:
        batches: Iterator[Sequence[dict[str, Any]]] = (batch.to_pylist() for batch in table.iter(batch_size=1024))
        return ((f"{name} row {number}", row) for number, row in enumerate(itertools.chain.from_iterable(batches), 1))

    # The fingerprint hashes builder, commit, subset and split; it is how datasets itself names its cache.
    return Source(f"{name} {loaded._fingerprint}", False, rows)


def _hub_mistake(config: DataConfig, name: str, error: Exception) -> str:
    """What the user can do about it, in one line. The client's messages never hold the token."""
    text = _first_line(error)
    if "gated" in text:
        return f"data.source: {name}: a gated data set; ask for access on its page and set HF_TOKEN in the environment ({text})"
    if isinstance(error, ConnectionError) or "Offline" in type(error).__name__ or "httpx" in type(error).__module__:
        return f"data.source: {name}: no such file or folder, and the hub cannot be reached for a data set of this name ({text})"
    if isinstance(error, FileNotFoundError):
        return f"data.source: {name}: neither a file, a folder nor a hub data set (a private one needs HF_TOKEN; {text})"
    if "onfig" in text:  # "Config name is missing", "BuilderConfig 'x' not found"
        return f"data.subset: {config.subset or 'not given'}: {name}: {' '.join(str(error).split())}"
    if "split" in text:
        return f"data.split: {config.split}: {name}: {text}"
    return f"data.source: {name}: {type(error).__name__}: {text}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
