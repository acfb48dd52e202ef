"""Runs one case in one mode: every contestant in a process of its own, rounds interleaved A B C A B C, one JSON line each.

    python -m benchmarks.peers.run sample one_core --peers DIR --out benchmarks/peers/results/sample.jsonl

A round in which other processes took more than LIMIT of the cores is written down as not kept, and tried again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.peers import case, inputs, load
from benchmarks.peers.contestants import CASES, ROOT, Contestant, Mode, command, environment, modes

LIMIT = 0.05
"""Share of the cores' time that processes outside the round may take: more, and the round is not kept."""
TRIES = 4
"""Rounds in a row for one kept, at most."""
LOOK = 0.5
"""Seconds over which it is seen whether the machine is quiet before a round begins."""
STEPS = {"sample": 1, "train": 1, "step": 2}
"""Of a round."""


@dataclass(eq=False)
class Worker:
    """A contestant's process, warm."""

    contestant: Contestant
    process: subprocess.Popen[str]
    versions: dict[str, str]
    facts: dict[str, Any]

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Errors: RuntimeError when the process is gone."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.contestant.name} ended with {self.process.wait()}; its log tells why")
        return json.loads(line)


def start(c: Contestant, argv: Sequence[str], env: dict[str, str], case_: str, folder: Path, log: IO[str]) -> Worker:
    process = subprocess.Popen(argv, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    worker = Worker(c, process, {}, {})
    answer = worker.ask({"inputs": str(folder), "case": case_})
    worker.versions, worker.facts = answer["versions"], answer["facts"]
    return worker


def check(workers: Sequence[Worker]) -> None:
    """Errors: ValueError for contestants whose losses or gradient norms differ from ours: they do not compute the same."""
    ours = workers[0].facts.get("loss_and_norm", ())
    for w in workers[1:]:
        for (loss, norm), (other, other_norm) in zip(ours, w.facts["loss_and_norm"] if ours else (), strict=True):
            if abs(loss - other) > case.AGREE or abs(norm - other_norm) > case.AGREE * norm:
                raise ValueError(
                    f"{w.contestant.name}: loss and norm must be {ours} up to {case.AGREE}, got {w.facts['loss_and_norm']}"
                )


def one(workers: Sequence[Worker], running: Worker, mode: Mode, steps: int) -> dict[str, Any]:
    """One round of one contestant, the others waiting. Errors: ValueError for a wrong number of tokens."""
    pids = [w.process.pid for w in workers]
    pid = running.process.pid
    before, began = load.use(mode.cores, pids), time.perf_counter()
    answer = running.ask({"steps": steps})
    after, wall = load.use(mode.cores, pids), time.perf_counter() - began
    waiting = [p for p in pids if p != pid]
    others, idle = load.shares(before, after, running=pid, idle=waiting, seconds=wall, cores=len(mode.cores))
    row = {"steps": steps, "seconds": answer["seconds"] / steps, "tokens": answer["tokens"] // steps}
    used = (after.own[pid] - before.own[pid]) / wall
    return row | {"cores_used": used, "others": others, "waiting": idle, "kept": others <= LIMIT, "peak_mb": load.peak_mb(pid)}


def await_quiet(mode: Mode, until: float) -> bool:
    """Waits for a moment in which nobody uses the cores, at most until that time of the monotonic clock."""
    while time.monotonic() < until:
        before = load.use(mode.cores, ()).busy
        time.sleep(LOOK)
        if load.use(mode.cores, ()).busy - before <= LIMIT * LOOK * len(mode.cores):
            return True
    return False


def rounds(
    workers: Sequence[Worker], mode: Mode, case_: str, cycles: int, until: float
) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """Cycle by cycle, every contestant in turn, again where a round is not kept; ends early at `until`."""
    for cycle in range(cycles):
        for w in workers:
            for _ in range(TRIES):
                if not await_quiet(mode, until):
                    return
                row = one(workers, w, mode, STEPS[case_])
                if row["tokens"] != TOKENS[case_]:
                    raise ValueError(f"{w.contestant.name} must handle {TOKENS[case_]} tokens a step, got {row['tokens']}")
                yield w, {"cycle": cycle} | row
                if row["kept"]:
                    break


TOKENS = {
    "sample": case.SAMPLE_ROWS * case.RESPONSE,
    "train": case.TRAIN_ROWS * (case.PROMPT + case.RESPONSE),
    "step": case.PROMPTS * case.GROUP * case.RESPONSE,
}
"""A step samples (sample, step) or trains on (train) that many, no less."""


def commit() -> str:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} x {name}"


def measure(args: argparse.Namespace, folder: Path, log: IO[str]) -> None:
    mode = modes()[args.mode]
    chosen = [c for c in CASES[args.case] if not args.only or c.name in args.only]
    common = {"case": args.case, "mode": args.mode, "date": datetime.date.today().isoformat(), "commit": commit()}
    common["machine"] = machine()
    workers: list[Worker] = []
    try:
        for c in chosen:
            argv, env = command(c, mode, args.peers), environment(c, mode, folder / "cache")
            workers.append(start(c, argv, env, args.case, folder, log))
            print(f"{c.name}: ready {workers[-1].facts}", flush=True)
        check(workers)
        with args.out.open("a") as out:
            until = time.monotonic() + 60 * args.minutes
            for w, row in rounds(workers, mode, args.case, args.cycles, until):
                whole = common | {"contestant": w.contestant.name} | row | {"versions": w.versions, "facts": w.facts}
                out.write(json.dumps(whole) + "\n")
                print(f"{w.contestant.name:24} {row['seconds']:7.3f} s  others {row['others']:.3f}", flush=True)
    finally:
        for w in workers:
            w.process.kill()
            w.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("mode", choices=sorted(modes()))
    parser.add_argument("--peers", type=Path, help="folder with the environments that benchmarks.peers.install made")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--cycles", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=10.0, help="for rounds and for waiting until the machine is quiet")
    parser.add_argument("--only", nargs="*", help="names of contestants; all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        inputs.write(Path(folder))
        try:
            measure(args, Path(folder), log)
        except Exception:
            log.seek(0)
            print(log.read()[-4000:])
            raise


if __name__ == "__main__":
    main()
