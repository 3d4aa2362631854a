"""Which targets are kept, and are they whole? `python -m neo_ray.targets {build,verify,list,prune}`: the stores of a cache.

Exit codes: 0 done; 1 `verify` found a store that is not whole (also where it was told to delete what is broken), or the teacher
could not go on filling one; 2 a mistake; 130 interrupted. The same `build` again goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from neo_ray import door, ground, inventory, loading
from neo_ray.config import StorageConfig, SweepConfig
from neo_ray.inventory import Stored
from neo_ray.mistakes import guess
from neo_ray.plan import size_text
from neo_ray.settings import ConfigError
from neo_ray.supply import Supply

SECONDS_A_DAY = 24 * 60 * 60
COLUMNS = ("key", "mode", "teacher", "student", "data", "tokens", "size", "last used", "state")
WIDTH_OF_A_LOG = 160
"""Columns where the output is no terminal, which has no width of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neo_ray.targets", description="The stores of targets in a cache.")
    doors = parser.add_subparsers(dest="door", required=True)
    build_door = doors.add_parser("build", help="fill the store that a sweep will use, and run no trial")
    build_door.add_argument("file", metavar="FILE", help="sweep file (YAML)")
    build_door.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.max_length=512")
    verify_door = doors.add_parser("verify", help="read every shard's checksum")
    verify_door.add_argument("keys", nargs="*", metavar="KEY|FILE", help="which stores, or whose sweep file; all by default")
    verify_door.add_argument(
        "--delete", action="store_true", help="remove broken shards, so that the next sweep fills them again"
    )
    list_door = doors.add_parser("list", help="a table of the stores")
    prune_door = doors.add_parser("prune", help="remove stores; one that is being filled stays")
    prune_door.add_argument("--older-than", type=float, metavar="DAYS", help="those that no sweep took for so long")
    prune_door.add_argument("--key", nargs="+", dest="keys", metavar="KEY", default=[], help="these")
    prune_door.add_argument("--dry-run", action="store_true", help="say what would be removed")
    for one in (verify_door, list_door, prune_door):
        one.add_argument("--cache", type=Path, metavar="DIR", default=Path(StorageConfig().cache), help="storage.cache")
    asked = parser.parse_args(argv)
    if asked.door == "prune" and asked.older_than is None and not asked.keys:
        prune_door.error("say which: --older-than DAYS or --key KEY …")
    with door.end() as end:
        end.code = _run(asked)
    return end.code


def _run(asked: argparse.Namespace) -> int:
    if asked.door == "build":
        return build(loading.load(asked.file, asked.overrides))
    found = inventory.stores_in(asked.cache.expanduser())
    if asked.door == "list":
        return show(found)
    if asked.door == "verify":
        files = [word for word in asked.keys if Path(word).is_file()]
        named = [*map(store_of, files), *chosen(found, [word for word in asked.keys if word not in files])]
        return verify(named if asked.keys else found, asked.delete)
    old = [] if asked.older_than is None else [s for s in found if days_unused(s) >= asked.older_than]
    return prune(list(dict.fromkeys(s.folder for s in [*old, *chosen(found, asked.keys)])), asked.dry_run)


def build(config: SweepConfig) -> int:
    """Fill the store of a sweep as the sweep would, also where it would not pay for that sweep alone. Raises ConfigError."""
    ground.check_writable(config)
    _refuse_live(ground.check(config))
    sources, supply = ground.prepared(config, announce)
    from neo_ray.builder import TargetsFailed

    config = ground.with_store(config, supply)
    try:
        with ground.connected(config, sources, supply, announce) as room:
            announce(f"{room.capacity}: room for {room.builders} teachers at a time")
            targets = ground.stand(config, sources, supply, room, announce).targets
    except TargetsFailed as error:
        announce(f"error: {error}")
        return 1
    assert targets is not None
    size = f", {size_text(inventory.bytes_in(targets.place))}" if isinstance(targets.place, Path) else ""
    announce(f"the store is whole: {targets.folder}{size}")
    return 0


def store_of(file: str) -> Stored:
    """The store on this machine's disk that the sweep of a file takes. Raises ConfigError where it takes none."""
    config = loading.load(file)
    _refuse_live(ground.check(config))
    sources, supply = ground.prepared(config, announce)
    from neo_ray.builder import asks_a_worker, source_of
    from neo_ray.data import open_data
    from neo_ray.prepare import make_student

    sources = make_student(config, sources, announce)
    ray = ground.connected(config, sources, supply, announce) if asks_a_worker(config, supply.dtype) else nullcontext()
    with ray:
        folder = source_of(config, supply, sources, open_data(sources.data)).place
    if not isinstance(folder, Path):
        raise ConfigError(f"{file}: targets.path: {folder} is not on this machine; a sweep reads checksums as it brings shards")
    return Stored(folder, inventory.facts_of(folder))


def _refuse_live(supply: Supply) -> None:
    if supply.mode == "live":
        raise ConfigError(f"targets.mode: this sweep takes no store, as the teacher runs in every trial: {supply.why}")


def announce(text: str) -> None:
    print(text, flush=True)


def chosen(found: list[Stored], keys: list[str]) -> list[Stored]:
    """The stores of these keys, of which a beginning suffices where it is one's alone. Raises ConfigError."""
    stores = []
    for key in keys:
        own = [stored for stored in found if stored.folder.name.startswith(key)]
        if len(own) != 1:
            why = "begins the keys of several stores" if own else f"no store has it{guess(key, [s.folder.name for s in found])}"
            raise ConfigError(f"KEY {key}: {why}")
        stores += own
    return stores


def days_unused(stored: Stored) -> float:
    return (time.time() - stored.used) / SECONDS_A_DAY


def show(found: list[Stored]) -> int:
    """A table of the stores."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        grid.add_column(column, overflow="fold")
    for stored in found:
        grid.add_row(*row_of(stored))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_LOG)
    console.print(grid if found else "no stores of targets")
    return 0


def row_of(stored: Stored) -> list[str]:
    """What the table says of a store; no shard is read."""
    facts = stored.facts
    used = time.strftime("%Y-%m-%d", time.localtime(stored.used))
    if not facts:
        return [stored.folder.name, *["?"] * 5, size_text(stored.num_bytes), used, "says nothing of itself"]
    names = [str(facts.get(name) or "") for name in ("teacher", "student", "data")]
    absent = len(stored.absent)
    state = f"{absent} of {len(stored.files)} files missing" if absent else "all there"
    tokens = f"{facts['tokens_seen']:,}"
    return [stored.folder.name, facts["recipe"]["mode"], *names, tokens, size_text(stored.num_bytes), used, state]


def verify(found: list[Stored], delete: bool) -> int:
    """Read every file of the stores; 1 where one is not as it was written."""
    from neo_ray.stores import is_whole

    code = 0
    for stored in found:
        if not stored.facts:
            print(
                f"{stored.folder.name}: has no {inventory.RECIPE_FILE} that can be read; the next sweep that takes it writes one"
            )
            code = 1
            continue
        files = stored.files
        broken = [name for name, rows in files.items() if not is_whole(stored.folder, name, rows)]
        print(f"{stored.folder.name}: {len(files) - len(broken)} of {len(files)} files whole")
        for name in broken:
            print(f"  {name}: {'missing' if name in stored.absent else 'not what was written'}")
        if broken and delete:
            delete_files(stored.folder, broken)
        code = 1 if broken else code
    return code


def delete_files(folder: Path, names: list[str]) -> None:
    with inventory.unless_building(folder) as free:
        if not free:
            print("  nothing was deleted: somebody fills this store")
            return
        for name in names:
            for end in (".json", ".safetensors"):
                (folder / f"{name}{end}").unlink(missing_ok=True)
        print("  deleted; the next sweep fills them again")


def prune(folders: list[Path], dry_run: bool) -> int:
    """Remove stores, and say what that frees."""
    total = 0
    for folder in folders:
        size = inventory.bytes_in(folder)
        if dry_run or inventory.remove(folder):
            total += size
            print(f"{folder.name}: {size_text(size)}")
        else:
            print(f"{folder.name}: stays: somebody fills it")
    print(f"{'would free' if dry_run else 'freed'} {size_text(total)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
