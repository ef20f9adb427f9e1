"""Crashes: each verb that writes is killed anywhere, runs beside another, and meets a full disk.

Afterwards the old is there or the new, whole; nothing of anyone else's is gone; and the same
command then succeeds, or says that it is done already. A verb runs in a process that was forked
after the imports. It is killed before its n-th change of the disk, counted by an audit hook of
Python and at ``os.fsync``, or after some time, for what libraries write in C++ and Rust.

``ci/crash --write docs/writing-safely.md`` puts the table there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from pages import written

import lora_edge
import lora_edge.capture
import lora_edge.cli
import lora_edge.exporting.add
import lora_edge.exporting.export
import lora_edge.graph
import lora_edge.parity.reference
import lora_edge.training.loop
import lora_edge.training.prepare
from lora_edge.bundle.bundle import load_bundle
from lora_edge.parity.record.golden import is_report
from tests.support.saving import make_llama

BEGIN, END = "<!-- crash: made by ci/crash -->", "<!-- crash: end -->"
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
OUT = "out"
MINE = (".out.4711-0a.partial/keep", ".out.²-aa.partial/keep", ".out.mine", "notes")
_FORK = multiprocessing.get_context("fork")


class BrokenError(Exception):
    """Something is neither the old nor the new, or the command does not succeed afterwards."""


# --- a command in a process of its own -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """How a command ended: its exit code (negative: killed), what it said, changes of the disk."""

    code: int
    said: str
    changes: int


class _Changes:
    """Counts changes of the disk below a folder, and kills the process before one of them."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count = 0
        self._folder, self._last = str(folder), last

    def listen(self) -> None:
        sys.addaudithook(self._hear)
        sync = os.fsync

        def counted(file: int) -> None:
            self.add()
            sync(file)

        os.fsync = counted

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            wanted = isinstance(flags, int) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
        else:
            wanted, path = event in EVENTS, arguments[0] if arguments else ""
        if not wanted or not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.fsdecode(path)
        if name.startswith(self._folder) or not os.path.isabs(name):
            self.add()

    def add(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def _child(
    arguments: Sequence[str],
    folder: Path,
    last: int | None,
    largest: int | None,
    pipe: Any,
    log: IO[bytes],
) -> None:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.chdir(folder)
    changes = _Changes(folder, last)
    code = 3
    try:
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        # What an export writes does not depend on how long its proof is.
        lora_edge.parity.validate = partial(lora_edge.parity.validate, steps=1)
        changes.listen()
        lora_edge.cli.main(arguments)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        pipe.send(changes.count)
        os._exit(code)


def start(
    arguments: Sequence[str], folder: Path, last: int | None = None, largest: int | None = None
) -> Callable[..., Run]:
    """Start a command; what is returned waits for it, and kills it after so many seconds."""
    reader, writer = _FORK.Pipe(duplex=False)
    log = TemporaryFile()  # noqa: SIM115  elsewhere, where there is room
    process = _FORK.Process(target=_child, args=(arguments, folder, last, largest, writer, log))
    process.start()
    writer.close()

    def wait(seconds: float | None = None) -> Run:
        process.join(seconds)
        if process.is_alive():
            process.kill()
        process.join()
        count = 0
        with contextlib.suppress(EOFError):  # it was killed
            count = reader.recv()
        with log:
            log.seek(0)
            said = log.read().decode(errors="replace")
        return Run(process.exitcode or 0, said, count)

    return wait


# --- the commands --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verb:
    """A command, what it starts from, and what it comes to.

    Attributes:
        name: for the table.
        arguments: of the command line.
        start: the world's folder to begin with; ``None``: nothing. ``empty``: an empty folder.
        has: whether what is there is what the command makes.
    """

    name: str
    arguments: tuple[str, ...]
    start: str | None
    has: Callable[[Path], bool]


def _holds(*names: str, given: int = 0, proved: bool | None = None) -> Callable[[Path], bool]:
    def has(folder: Path) -> bool:
        manifest = load_bundle(folder / OUT).manifest
        prompts = sum(name.startswith("parity/given-") for name in manifest.files)
        marks = {entry.proved for name, entry in manifest.adapters.items() if name != "none"}
        right = proved is None or marks == {proved}
        return set(manifest.adapters) == {"none", *names} and prompts == given and right

    return has


def _trained(folder: Path) -> bool:
    lora_edge.load_adapter(folder / OUT)
    record = json.loads((folder / OUT / "training.json").read_text())
    return bool(record["result"]["steps"] == 6)


class World:
    """A tiny base, adapters, and bundles to begin with, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "start").mkdir()
        self.base, self.data, self.prompts = root / "base", root / "data.jsonl", root / "prompts"
        maker = _FORK.Process(target=self._make)
        maker.start()
        maker.join()
        if maker.exitcode:
            raise BrokenError("the base cannot be made")
        three = self.given("a", "b", "c")
        self._bundle("three", None, "export", str(self.base), *three, "-o", OUT)
        self._bundle("two", "three", "remove", OUT, "c")
        self._bundle("unproved", "two", "add", OUT, *self.given("c"))
        export = ("export", str(self.base), *self.given("a", "b"), "-o", OUT)
        train = ["train", str(self.base), str(self.data), "--max-steps", "6", "--save-every", "2"]
        train += ["--batch-size", "2", "--rank", "2", "--device", "cpu", "-o", OUT]
        ab, abc = _holds("a", "b", proved=True), _holds("a", "b", "c")
        reference = ("--reference", str(self.base))
        self.verbs = [
            Verb("export", export, None, ab),
            Verb("export into an empty folder", export, "empty", ab),
            Verb("export --force", (*export, "--force"), "three", ab),
            Verb("add", ("add", OUT, *self.given("c")), "two", abc),
            Verb("remove", ("remove", OUT, "b"), "three", _holds("a", "c")),
            Verb(
                "golden",
                ("golden", OUT, "--prompts", str(self.prompts), "--steps", "1", *reference),
                "two",
                _holds("a", "b", given=3),
            ),
            Verb(
                "validate",
                ("validate", OUT, *reference, "--steps", "1", "--json", "report.json"),
                "unproved",
                _holds("a", "b", "c", proved=True),
            ),
            Verb("train", tuple(train), None, _trained),
        ]

    def _make(self) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        sizes = {"num_hidden_layers": 1, "max_position_embeddings": 96}
        make_llama(self.base, **sizes, initializer_range=0.2)
        for number, name in enumerate(("a", "b", "c", "d")):
            torch.manual_seed(number)
            model = LlamaForCausalLM.from_pretrained(self.base)
            lora = LoraConfig(r=2 + number, init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(model, lora).save_pretrained(self.root / name)
        rows = [{"prompt": f"say {x}:", "completion": f" {x}!"} for x in ("one", "two", "six")]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.prompts.write_text("one prompt\nanother prompt\n")

    def given(self, *names: str) -> tuple[str, ...]:
        return tuple(x for name in names for x in ("-a", f"{name}={self.root / name}"))

    def _bundle(self, name: str, begin: str | None, *arguments: str) -> None:
        folder = self._copy(begin, self.root / f"making-{name}")
        run = start(arguments, folder)()
        if run.code:
            raise BrokenError(f"{' '.join(arguments)}: {run.said}")
        shutil.move(folder / OUT, self.root / "start" / name)

    def _copy(self, name: str | None, folder: Path) -> Path:
        """A folder with what a verb begins with, and with files of others beside it."""
        folder.mkdir()
        for mine in MINE:
            (folder / mine).parent.mkdir(exist_ok=True)
            (folder / mine).write_text("mine")
        if name == "empty":
            (folder / OUT).mkdir()
        elif name is not None:
            shutil.copytree(self.root / "start" / name, folder / OUT)
        return folder

    @contextlib.contextmanager
    def place(self, verb: Verb, parent: Path | None = None) -> Iterator[Path]:
        """A folder to run a verb in."""
        with TemporaryDirectory(dir=parent or self.root) as folder:
            yield self._copy(verb.start, Path(folder) / "work")


# --- what is there afterwards --------------------------------------------------------------------


def state(verb: Verb, folder: Path, world: World) -> str:
    """``old`` or ``new``.

    Raises:
        BrokenError: neither, or something of someone else's is gone.
    """
    for mine in MINE:
        if not (folder / mine).is_file() or (folder / mine).read_text() != "mine":
            raise BrokenError(f"{mine}, which is someone else's, is gone")
    report = folder / "report.json"
    if report.exists():
        json.loads(report.read_text())
    out = folder / OUT
    if verb.start in {None, "empty"}:
        mark = "adapter_config.json" if verb.name == "train" else "lora_edge.json"
        if not (out / mark).exists():
            return "old"
    else:
        load_bundle(out).verify_all()
        kept = world.root / "start" / str(verb.start) / "lora_edge.json"
        if (out / "lora_edge.json").read_bytes() == kept.read_bytes():
            return "old"
    if verb.name != "train":
        load_bundle(out).verify_all()
    if not verb.has(folder):
        raise BrokenError("neither the old nor the new is there")
    return "new"


def stray(folder: Path) -> list[str]:
    """What the verbs have left that belongs to nothing."""
    out = folder / OUT
    known = {Path(mine).parts[0] for mine in MINE} | {OUT, "report.json"}
    found = [path.name for path in folder.iterdir() if path.name not in known]
    if (out / "lora_edge.json").is_file():
        files = load_bundle(out).manifest.files
        names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        found += sorted(names - set(files) - {"lora_edge.json"})
        empty = [path for path in out.rglob("*") if path.is_dir() and not any(path.iterdir())]
        found += [path.relative_to(out).as_posix() for path in empty]
    return found


def again(verb: Verb, folder: Path, world: World, before: str) -> None:
    """Run the same command again: it succeeds, or what it makes was there already.

    Raises:
        BrokenError: it does not, or leaves something behind.
    """
    run = start(verb.arguments, folder)()
    if run.code == 2 and "holds an interrupted run" in run.said:
        run = start((*verb.arguments, "--resume"), folder)()
    done = before == "new" and run.code == 2 and "error: " in run.said
    if run.code and not done:
        raise BrokenError(f"again, exit code {run.code}: {run.said[-500:]}")
    # The prompts are kept a second time where the kill came after they were kept.
    twice = verb.name == "golden" and before == "new"
    if not twice and state(verb, folder, world) != "new":
        raise BrokenError("it succeeded, and the old is there")
    left = [name for name in stray(folder) if not (done and name == f"{OUT}.run")]
    if left:
        raise BrokenError(f"left behind: {left}")


# --- kills ---------------------------------------------------------------------------------------


def killed(verb: Verb, world: World, points: int, seed: int) -> Counter[str]:
    """Kill a verb before ``points`` of its changes of the disk, or at some moment of its time."""
    with world.place(verb) as folder:
        started = time.monotonic()
        whole = start(verb.arguments, folder)()
        seconds = time.monotonic() - started
        if whole.code or state(verb, folder, world) != "new":
            raise BrokenError(f"{verb.name}: {whole.said}")
    chance = random.Random(seed)
    timed = points // 5 if verb.name.startswith(("export", "train")) else 0
    counts = points - timed
    # Half of them over all, half where it is published.
    close = max(1, whole.changes - 50)
    numbers = [1 + index * whole.changes // (counts // 2 or 1) for index in range(counts // 2)]
    numbers += sorted(chance.choices(range(close, whole.changes + 1), k=counts - len(numbers)))
    moments = [chance.uniform(0.1, 1.0) * seconds for _ in range(timed)]
    found: Counter[str] = Counter()
    for last, after in [*((n, None) for n in numbers), *((None, s) for s in moments)]:
        with world.place(verb) as folder:
            run = start(verb.arguments, folder, last)(after)
            if run.code != -signal.SIGKILL and after is None:
                # Fewer changes than last time (names are random): it ended by itself.
                found["ended"] += 1
            where = f"{verb.name}, change {last} of {whole.changes}" if last else f"{after:.2f} s"
            try:
                before = state(verb, folder, world)
                found[before] += 1
                again(verb, folder, world, before)
            except (BrokenError, lora_edge.LoraEdgeError, OSError, ValueError) as error:
                found["BROKEN"] += 1
                print(f"broken: {where}: {error}", file=sys.stderr)
    return found


# --- two at once ---------------------------------------------------------------------------------


def _both(world: World) -> list[tuple[str, str | None, tuple[str, ...], tuple[str, ...], Any]]:
    """Pairs: name, what they begin with, the two commands, and what is right afterwards."""
    export = world.verbs[0].arguments
    validate = world.verbs[6].arguments[:-2]
    golden = world.verbs[5].arguments

    def one_of(codes: list[int], _: Any) -> bool:
        return codes == [0, 2]

    def names(*wanted: str) -> Callable[[list[int], Any], bool]:
        return lambda codes, manifest: (
            codes == [0, 0] and set(manifest.adapters) - {"none"} == set(wanted)
        )

    def kept(codes: list[int], manifest: Any) -> bool:
        given = sum(name.startswith("parity/given-") for name in manifest.files)
        return codes == [0, 0] and given == 3 and "c" in manifest.adapters

    def proved(codes: list[int], manifest: Any) -> bool:
        marks = {name for name, entry in manifest.adapters.items() if entry.proved}
        return codes == [0, 0] and marks >= {"a", "b", "c"} and "d" in manifest.adapters

    def reported(codes: list[int], manifest: Any) -> bool:
        return codes == [0, 0] and sum(map(is_report, manifest.files)) == 1

    c, d, other = world.given("c"), world.given("d"), ("-a", f"c={world.root / 'd'}")
    return [
        ("export, export", None, export, export, one_of),
        ("the same into an empty folder", "empty", export, export, one_of),
        ("add c, add d", "two", ("add", OUT, *c), ("add", OUT, *d), names("a", "b", "c", "d")),
        ("add c, add another c", "two", ("add", OUT, *c), ("add", OUT, *other), one_of),
        ("add c, remove b", "two", ("add", OUT, *c), ("remove", OUT, "b"), names("a", "c")),
        ("add c, golden", "two", ("add", OUT, *c), golden, kept),
        ("add d, validate --reference", "unproved", ("add", OUT, *d), validate, proved),
        ("validate --reference, twice", "unproved", validate, validate, reported),
    ]  # fmt: skip


def raced(world: World, races: int) -> dict[str, Counter[str]]:
    """Run two commands at once, so many times in all."""
    found: dict[str, Counter[str]] = {}
    pairs = _both(world)
    for number in range(races):
        name, begin, one, other, is_right = pairs[number % len(pairs)]
        verb = dataclasses.replace(world.verbs[0], start=begin)
        tally = found.setdefault(name, Counter())
        with world.place(verb) as folder:
            waits = [start(one, folder), start(other, folder)]
            runs = [wait() for wait in waits]
            codes = sorted(run.code for run in runs)
            try:
                bundle = load_bundle(folder / OUT)
                bundle.verify_all()
                if not is_right(codes, bundle.manifest) or stray(folder):
                    raise BrokenError(f"exit codes {codes}, left {stray(folder)}")
                tally["right"] += 1
            except (BrokenError, lora_edge.LoraEdgeError, OSError) as error:
                tally["BROKEN"] += 1
                said = " / ".join(run.said[-300:] for run in runs)
                print(f"broken: {name}: {error}: {said}", file=sys.stderr)
    return found


# --- a full disk ---------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(world: World) -> Iterator[Path | None]:
    """A file system of 8 MB; ``None`` where nothing can be mounted."""
    folder = world.root / "disk"
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled(verb: Verb, world: World, disk: Path | None, rooms: Sequence[int]) -> Counter[str]:
    """Run a verb with so many bytes of room, or files of that size at most; then with enough."""
    found: Counter[str] = Counter()
    for room in rooms:
        with world.place(verb, disk) as folder:
            if disk is not None:
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "filler").write_bytes(bytes(max(0, free - room)))
            run = start(verb.arguments, folder, None, room if disk is None else None)()
            if disk is not None:
                (disk / "filler").unlink()
            try:
                before = state(verb, folder, world)
                if run.code == 0 and before == "old":
                    raise BrokenError("exit code 0, and the old is there")
                if run.code not in {0, 2} or (run.code and "error: " not in run.said):
                    raise BrokenError(f"exit code {run.code}: {run.said[-500:]}")
                if run.code:
                    found["refused"] += 1
                    if before == "old" and stray(folder) and verb.name != "train":
                        raise BrokenError(f"left behind: {stray(folder)}")
                else:
                    found["had room"] += 1
                again(verb, folder, world, before)
            except (BrokenError, lora_edge.LoraEdgeError, OSError, ValueError) as error:
                found["BROKEN"] += 1
                print(f"broken: {verb.name} with {room} bytes: {error}", file=sys.stderr)
    return found


# --- the table -----------------------------------------------------------------------------------


def table(
    kills: dict[str, Counter[str]],
    races: dict[str, Counter[str]],
    disks: dict[str, Counter[str]],
    disk: str,
) -> str:
    """Markdown of everything."""
    lines = ["| killed (`kill -9`) | times | old | new | broken |", "|---|---|---|---|---|"]
    for name, found in kills.items():
        times = found["old"] + found["new"] + found["BROKEN"]
        lines.append(f"| {name} | {times} | {found['old']} | {found['new']} | {found['BROKEN']} |")
    lines += ["", "| two at once | times | right | broken |", "|---|---|---|---|"]
    for name, found in races.items():
        times = found["right"] + found["BROKEN"]
        lines.append(f"| {name} | {times} | {found['right']} | {found['BROKEN']} |")
    lines += ["", f"| {disk} | times | refused | had room | broken |", "|---|---|---|---|---|"]
    for name, found in disks.items():
        times = found["refused"] + found["had room"]
        row = f"{times} | {found['refused']} | {found['had room']} | {found['BROKEN']}"
        lines.append(f"| {name} | {row} |")
    libraries = ("torch", "transformers", "peft", "onnxruntime")
    with_versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    day = time.strftime("%Y-%m-%d")
    lines += ["", f"Last run: {day}, Python {platform.python_version()}, {with_versions}."]
    return "\n".join(lines)


def main() -> int:
    """Run everything; 0 if nothing is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100, help="kills in all (default 100)")
    parser.add_argument("--races", type=int, default=50, help="pairs of commands (default 50)")
    parser.add_argument("--rooms", type=int, default=6, help="sizes of a full disk for each verb")
    parser.add_argument("--only", default="", help="verbs whose name begins so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's comments")
    given = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory(prefix="lora-edge-crash-") as folder:
        world = World(Path(folder))
        verbs = [verb for verb in world.verbs if verb.name.startswith(given.only)]
        kills: dict[str, Counter[str]] = {}
        for index, verb in enumerate(verbs):
            points = len(range(index, given.points, len(verbs)))
            print(f"killing {verb.name}", file=sys.stderr)
            if points:
                kills[verb.name] = killed(verb, world, points, given.seed)
        print("two at once", file=sys.stderr)
        races = raced(world, given.races)
        disks: dict[str, Counter[str]] = {}
        sizes = [0, 4 << 10, 24 << 10, 64 << 10, 160 << 10, 400 << 10, 1 << 20, 2 << 20]
        with small_disk(world) as disk:
            for verb in verbs if given.rooms else []:
                print(f"a full disk: {verb.name}", file=sys.stderr)
                disks[verb.name] = filled(verb, world, disk, sizes[: given.rooms])
        what = "a full disk (tmpfs)" if disk is not None else "files that may not grow"
        print(table(kills, races, disks, what))
        if given.write:
            text = given.write.read_text(encoding="utf-8")
            made = table(kills, races, disks, what)
            given.write.write_text(written(text, made, BEGIN, END), encoding="utf-8")
    broken = sum(x["BROKEN"] for part in (kills, races, disks) for x in part.values())
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    print(f"\nbroken: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
