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
from neo_ray.storage import Folder, at
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
    prune_door = doors.add_parser("prune", help="remove stores; one that is being filled or read stays")
    prune_door.add_argument("--older-than", type=float, metavar="DAYS", help="those that no sweep took for so long")
    prune_door.add_argument("--key", nargs="+", dest="keys", metavar="KEY", default=[], help="these")
    prune_door.add_argument("--dry-run", action="store_true", help="say what would be removed")
    for one in (verify_door, list_door, prune_door):
        place = one.add_mutually_exclusive_group()
        place.add_argument("--cache", metavar="DIR|URL", default=StorageConfig().cache, help="storage.cache")
        place.add_argument("--path", metavar="DIR|URL", help="targets.path, where the sweep file names one")
    asked = parser.parse_args(argv)
    if asked.door == "prune" and asked.older_than is None and not asked.keys:
        prune_door.error("say which: --older-than DAYS or --key KEY …")
    with door.end() as end:
        end.code = _run(asked)
    return end.code


def _run(asked: argparse.Namespace) -> int:
    if asked.door == "build":
        return build(loading.load(asked.file, asked.overrides))
    found = stores_at(at(asked.path or asked.cache), is_cache=asked.path is None)
    if asked.door == "list":
        return show(found)
    if asked.door == "verify":
        files = [word for word in asked.keys if Path(word).is_file()]
        named = [*map(store_of, files), *chosen(found, [word for word in asked.keys if word not in files])]
        return verify(named if asked.keys else found, asked.delete)
    told = [stored for stored in found if stored.facts]  # what says nothing of itself may be anything: by its key alone
    old = [] if asked.older_than is None else [s for s in told if days_unused(s) >= asked.older_than]
    return prune(list(dict.fromkeys(s.folder for s in [*old, *chosen(found, asked.keys)])), asked.dry_run)


def stores_at(given: Folder, is_cache: bool) -> list[Stored]:
    """The stores of a cache, or of a folder of stores. Raises ConfigError where `given` is another kind of place."""
    found = inventory.stores_within(inventory.folder_of(given) if is_cache else given)
    if not any(stored.facts for stored in found):
        inventory.check_place(given, is_cache)
    return found


def build(config: SweepConfig) -> int:
    """Fill the store of a sweep as the sweep would, also where it would not pay for that sweep alone. Raises ConfigError."""
    ground.check_writable(config)
    _refuse_live(ground.check(config))
    sources, supply = ground.prepared(config, announce)
    from neo_ray.crew import TargetsFailed
    from neo_ray.lease import LeaseLost

    config = ground.with_store(config, supply)
    try:
        with ground.connected(config, sources, supply, announce) as room:
            announce(f"{room.capacity}: room for {room.builders} teachers at a time")
            targets = ground.stand(config, sources, supply, room, announce).targets
    except (TargetsFailed, LeaseLost) as error:
        announce(f"error: {error}")
        return 1
    assert targets is not None
    announce(f"the store is whole: {targets.folder}, {size_text(inventory.bytes_in(targets.place))}")
    return 0


def store_of(file: str) -> Stored:
    """The store that the sweep of a file takes. Raises ConfigError where it takes none."""
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
    """Read every file of the stores (those in an object store are brought one by one); 1 where one is not as it was written."""
    from neo_ray.stores import is_as_written

    code = 0
    for stored in found:
        if not stored.facts:
            print(
                f"{stored.folder.name}: has no {inventory.RECIPE_FILE} that can be read; the next sweep that takes it writes one"
            )
            code = 1
            continue
        files = stored.files
        broken = [name for name, rows in files.items() if not is_as_written(stored.folder, name, rows)]
        print(f"{stored.folder.name}: {len(files) - len(broken)} of {len(files)} files whole")
        for name in broken:
            print(f"  {name}: {'missing' if name in stored.absent else 'not what was written'}")
        if broken and delete:
            delete_files(stored.folder, broken)
        code = 1 if broken else code
    return code


def delete_files(folder: Folder, names: list[str]) -> None:
    from neo_ray.storehouse import unless_building

    with unless_building(folder) as free:
        if not free:
            print("  nothing was deleted: somebody fills this store")
            return
        for file in (folder / f"{name}{end}" for name in names for end in (".json", ".safetensors")):
            if isinstance(file, Path):
                file.unlink(missing_ok=True)
            else:
                file.remove()
        print("  deleted; the next sweep fills them again")


def prune(folders: list[Folder], dry_run: bool) -> int:
    """Remove stores, and say what that frees."""
    total = 0
    for folder in folders:
        size = inventory.bytes_in(folder)
        stays = why_not(folder) if dry_run else remove(folder)
        total += 0 if stays else size
        print(f"{folder.name}: {f'stays: {stays}' if stays else size_text(size)}")
    print(f"{'would free' if dry_run else 'freed'} {size_text(total)}")
    return 0


def why_not(folder: Folder) -> str:
    """Why a store must not go, where it must not."""
    minutes = inventory.IN_USE_SECONDS / 60
    return f"a sweep reads it (one that was killed counts for {minutes:.0f} minutes)" if inventory.is_read(folder) else ""


def remove(folder: Folder) -> str:
    """Take a store away. Where somebody fills or reads it, it stays: returns why."""
    from neo_ray.storehouse import storehouse, unless_building

    with unless_building(folder) as free:
        stays = why_not(folder) if free else "somebody fills it"
        if not stays:
            storehouse(folder).remove()
    return stays


if __name__ == "__main__":
    sys.exit(main())
