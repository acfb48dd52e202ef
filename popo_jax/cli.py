"""popo train | sft | eval | export | inspect | report | plan | bench: parses, then calls one function.

Imports nothing heavy before that."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from popo_jax import plain
from popo_jax.config import Config, from_dict, without_preset
from popo_jax.eval_args import EvalArgs
from popo_jax.rules import resolve, unread, why_unread
from popo_jax.types import UserError

A = TypeVar("A")
USAGE = """usage: popo COMMAND ...

  popo train CONFIG [--key value ...]     train; --algorithm grpo, --seed 1, --loss.clip-low 0.1 and so on
  popo train --resume RUN [--from-step N] go on with a run
                                          in several processes: the same command once on every host; found on Cloud TPU and
                                          SLURM, else told: --coordinator HOST:PORT --processes N --process I
  popo sft CONFIG --out DIR               only the warm start
  popo eval MODEL_OR_RUN [--task AIME24]  avg@k and pass@k on held-out problems or a suite; --answers FILE: of given answers
  popo export RUN --out DIR [--step N]    a folder that transformers opens
  popo inspect RUN                        what a run and its checkpoints hold
  popo report RUN [RUN ...]               the account of a run as one HTML page, or of several side by side; --json, --card
  popo plan CONFIG --topology v5p:4x4x8   will it fit those TPUs, and how fast at best; compiled here, without one
  popo bench [CASE ...]                   how fast the parts are here; --list names the cases

popo COMMAND --help lists the options; popo train CONFIG --help lists every setting."""


@dataclass(frozen=True)
class ExportArgs:
    """The policy of a run as a folder that transformers opens."""

    run: tyro.conf.Positional[Path]
    out: Path
    step: int | None = None
    """None: the newest checkpoint."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; None: as they were trained."""
    adapter: tyro.conf.FlagCreatePairsOff[bool] = False
    """LoRA's adapter alone, for peft; else it is merged into the weights."""


@dataclass(frozen=True)
class InspectArgs:
    """What a run and its checkpoints hold."""

    run: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class BenchArgs:
    """How fast the parts of training are on this machine: a JSON line a case, then a table."""

    cases: tyro.conf.Positional[tuple[str, ...]] = ()
    """None: all."""
    size: tuple[str, ...] = ()
    """tiny, small, 0.5b, 1.5b, 7b. None: tiny and small on a CPU, 1.5b on an accelerator."""
    out: Path | None = None
    """A new file that takes the lines too."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only name the cases and sizes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done (or stopped and saved), 2 bad input told in one sentence, 3 another process of the run was lost."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands: Mapping[str, Callable[[list[str]], int | None]] = {
        "train": _train,
        "sft": _sft,
        "eval": _eval,
        "export": _export,
        "inspect": _inspect,
        "report": _report,
        "plan": _plan,
        "bench": _bench,
    }
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    try:
        if args[0] not in commands:
            raise UserError(f"popo {args[0]}: no such command{plain.nearest(args[0], commands)}; popo --help lists them")
        return commands[args[0]](args[1:]) or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        if e.errno is None or e.filename is None:
            raise
        print(f"error: {e.filename}: {os.strerror(e.errno).lower()}; what was saved before is whole", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; what was saved before is whole", file=sys.stderr)
        return 130


def parse_config(path: str | None, overrides: Sequence[str], say: Callable[[str], None]) -> Config:
    """Defaults < preset < file < command line, checked. Keys the algorithm does not read: refused here, noticed in a file."""
    data = {} if path is None else plain.read_mapping(path)
    of_a_run = data.pop("fingerprints", None) is not None  # complete, so it names every key
    given = _given_keys(overrides)
    if of_a_run:
        data = without_preset(data, given.get("algorithm.name"))
    if "algorithm.name" in given:
        section = data.get("algorithm")
        data["algorithm"] = (section if isinstance(section, dict) else {}) | {"name": given["algorithm.name"]}
    base = from_dict(data, path or "config")
    known = plain.dotted(plain.to_plain(base))
    for key in given:
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise UserError(f"command line: unknown key {key}{plain.nearest(key, known)}")
    c = resolve(_apply(overrides, base))
    dead = unread(c)
    for key in given:
        if why := why_unread(key, dead):
            raise UserError(f"command line: {key} is not read: {why}")
    ignored = [key for key in plain.dotted(data) if key != "algorithm" and why_unread(key, dead)]
    if ignored and not of_a_run:
        say(f"Not read with algorithm {c.algorithm.name}: {', '.join(ignored)}")
    return c


def _apply(overrides: Sequence[str], base: Config) -> Config:
    """Typed overrides through tyro; `--algorithm X` is `--algorithm.name X`."""
    args = [_spell(a) for a in overrides]
    with _one_sentence(args):
        return tyro.cli(Config, prog="popo train CONFIG", args=args, default=base, config=(tyro.conf.FlagConversionOff,))


@contextlib.contextmanager
def _one_sentence(args: Sequence[str]) -> Iterator[None]:
    """Errors: UserError instead of tyro's box."""
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(args):
        os.environ["COLUMNS"] = "4000"  # or its box cuts the sentence into lines
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as e:
        if not e.code:
            raise  # --help
        lines = [line.strip(" │╭╰─╮╯-") for line in said.getvalue().splitlines()]
        raise UserError(f"command line: {next((x for x in lines[1:] if x), 'cannot be parsed')}") from None
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ |= {} if before is None else {"COLUMNS": before}


def _parsed(cls: type[A], command: str, args: Sequence[str]) -> A:
    with _one_sentence(args):
        return tyro.cli(cls, prog=f"popo {command}", args=args)


def _spell(arg: str) -> str:
    name, eq, value = arg.partition("=")
    return f"--algorithm.name{eq}{value}" if name == "--algorithm" else arg


def _given_keys(overrides: Sequence[str]) -> dict[str, str]:
    """Dotted key -> the text that follows it."""
    keys = {}
    for i, arg in enumerate(overrides):
        if arg.startswith("--") and arg != "--help":
            name, eq, value = _spell(arg)[2:].partition("=")
            following = overrides[i + 1] if i + 1 < len(overrides) else ""
            keys[name.replace("-", "_")] = value if eq else following
    return keys


def _train(args: list[str]) -> int | None:
    path, how, rest = _split(args)
    from popo_jax.runtime import supervise
    from popo_jax.runtime.console import Console

    helped = bool({"-h", "--help"} & set(rest))
    if how.resume is None:
        if how.from_step is not None:
            raise UserError(f"popo train: --from-step {how.from_step} goes with --resume RUN")
        if path is None and not helped:
            raise UserError("popo train: expected a config file or --resume RUN, got neither")
    elif path is not None:
        raise UserError(f"popo train: --resume {how.resume} takes its config from the run; expected no config file, got {path}")
    told = any(x is not None for x in (how.coordinator, how.processes, how.process))
    if helped or not supervise.several(told):
        _train_here(path, how, rest, Console())
        return None
    if not supervise.child():
        return supervise.run(["train", *args])
    from popo_jax.runtime import peers

    _start()
    place = peers.Place(how.coordinator, how.processes, how.process)
    return peers.leaving_together(place, lambda p: _train_here(path, how, rest, Console(quiet=p.index > 0), p))


def _train_here(path: str | None, how: argparse.Namespace, rest: list[str], console: Any, peers: Any = None) -> None:
    if how.resume is None:
        c = parse_config(path, rest, console.say)
        _start().new(c, console, peers)
        return
    from popo_jax import run_dir

    run = run_dir.open_existing(how.resume)
    c = parse_config(str(run.path / "config.yaml"), rest, console.say)
    _start().resume(c, run, how.from_step, console, peers)


def _split(args: list[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """(config path, what says how to start, everything else)."""
    parser = argparse.ArgumentParser(prog="popo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--from-step", type=int)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    path = args[0] if args and not args[0].startswith("-") else None
    with _one_sentence(args):
        known, rest = parser.parse_known_args(args[1:] if path else args)
    return path, known, rest


def _start() -> Any:
    """jax's process-wide settings, then the module that launches runs."""
    from popo_jax import launch
    from popo_jax.runtime import mesh

    mesh.start()
    return launch


def _sft(args: list[str]) -> None:
    from popo_jax.runtime.console import Console

    out = None
    if "--out" in args and args.index("--out") + 1 < len(args):
        i = args.index("--out")
        out, args = Path(args[i + 1]), args[:i] + args[i + 2 :]
    if out is None or not args or args[0].startswith("-"):
        raise UserError("popo sft: expected CONFIG --out DIR")
    if out.exists():
        raise UserError(f"--out {out} must not exist yet")
    console = Console()
    c = parse_config(args[0], args[1:], console.say)
    _start()
    from popo_jax import sft
    from popo_jax.runtime.mesh import make_mesh

    sft.make(c, make_mesh(c), out, console.say)


def _eval(args: list[str]) -> None:
    a = _parsed(EvalArgs, "eval", args)
    a.check()
    if a.answers is not None:
        from popo_jax import answers

        answers.command(a.answers, k=a.k or None, out=a.out)
        return
    _start()
    from popo_jax import exam

    exam.command(a)


def _export(args: list[str]) -> None:
    a = _parsed(ExportArgs, "export", args)
    _start()
    from popo_jax import export

    step = export.export(a.run, a.out, a.step, dtype=a.dtype, adapter=a.adapter)
    print(f"Policy of {a.run} after step {step} written to {a.out}")


def _inspect(args: list[str]) -> None:
    a = _parsed(InspectArgs, "inspect", args)
    _start()
    from popo_jax import inspect

    inspect.command(a.run)


def _plan(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="popo plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--shape")
    parser.add_argument("--json", action="store_true")
    path = args[0] if args and not args[0].startswith("-") else None
    with _one_sentence(args):
        known, rest = parser.parse_known_args(args[1:] if path else args)
    if path is None or known.topology is None:
        raise UserError("popo plan: expected CONFIG --topology CHIP:SHAPE [--shape CONFIG.JSON] [--json] [--key value ...]")
    c = parse_config(path, rest, lambda text: print(text, file=sys.stderr))
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from popo_jax.plan.command import command  # without the cache of compiled programs: such as these cannot be read back

    command(c, known.topology, shape=known.shape, as_json=known.json)


def _report(args: list[str]) -> None:
    from popo_jax.report import command

    command.command(_parsed(command.ReportArgs, "report", args))


def _bench(args: list[str]) -> None:
    a = _parsed(BenchArgs, "bench", args)
    try:
        from benchmarks.suite import registry
    except ModuleNotFoundError as e:
        if e.name not in ("benchmarks", "benchmarks.suite"):
            raise
        raise UserError("popo bench: benchmarks are not installed; in a checkout, run: python -m popo_jax.cli bench") from None
    if a.list:
        print(registry.listing())
        return
    registry.command(a.cases, a.size, a.out)


if __name__ == "__main__":
    sys.exit(main())
