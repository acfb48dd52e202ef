"""The pool of verifier processes: whatever happens there, every response has its verdict, in order, in time."""

from __future__ import annotations

import ast
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from popo_jax.task_config import PoolConfig, TaskConfig
from popo_jax.tasks.graders import Graders
from popo_jax.tasks.pool import Pool
from popo_jax.types import UserError, Verdict
from tests import tiny

DEED = {"deed": "tests.tasks.deeds:deed", "short": "tests.tasks.deeds:short"}
SECONDS = 0.8
FIELDS = {"nums": (3, 5, 7), "target": 56}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(DEED, workers=2, seconds=SECONDS, memory_gb=0.3) as p:
        p.start()
        yield p


def jobs(texts: list[str], **fields: object) -> list[tuple[str, str, dict]]:
    return [("deed", t, dict(fields)) for t in texts]


def right(text: str) -> Verdict:
    return Verdict(1.0, 1.0, str(len(text)))


def children() -> set[int]:
    """Living processes started from this one, at any depth, by number."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {p for p, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(pids: set[int], wait: float = 5.0) -> set[int]:
    """Those that have not ended after `wait` seconds; one that nobody has waited for has."""
    deadline = time.monotonic() + wait
    while left := {p for p in pids if _state(p) not in "XZ"}:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return set()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


HOSTILE = {
    "forever": "timeout",
    "stubborn": "timeout",
    "bignum": "timeout",
    "regex": "timeout",
    "stop": "timeout",
    "child": "timeout",
    "sleep 30": "timeout",
    "memory": "memory",
    "quiet_memory": "memory",
    "exit 3": "worker exited (code 3)",
    "exit 0": "worker exited (code 0)",
    "sys.exit": "worker exited (code 5)",
    "segfault": "worker exited (signal 11)",
    "orphan": "worker exited (code 4)",
}


@pytest.mark.parametrize("text", [t if t in ("forever", "memory") else pytest.param(t, marks=pytest.mark.slow) for t in HOSTILE])
def test_one_hostile_response_costs_only_itself(pool: Pool, text: str) -> None:
    texts = [f"fine {i}" for i in range(20)]
    texts[7] = text
    began = time.monotonic()
    verdicts = pool(jobs(texts))
    took = time.monotonic() - began
    assert verdicts[7] == Verdict(0.0, 0.0, HOSTILE[text])
    assert [v for i, v in enumerate(verdicts) if i != 7] == [right(t) for i, t in enumerate(texts) if i != 7]
    assert took < 2 * SECONDS + 4, took  # two tries, two starts


def test_a_batch_of_all_of_them_is_complete_ordered_and_on_time(pool: Pool) -> None:
    texts = [t for pair in zip(HOSTILE, [f"fine {i}" for i in range(len(HOSTILE))], strict=True) for t in pair]
    texts += [f"fine {i}" for i in range(400)]
    began = time.monotonic()
    verdicts = pool(jobs(texts))
    took = time.monotonic() - began
    assert verdicts == [Verdict(0.0, 0.0, HOSTILE[t]) if t in HOSTILE else right(t) for t in texts]
    tries = 2 * len(HOSTILE)
    assert took < tries * (SECONDS + 1.0) / 2 + 5, took
    print(f"\n{len(texts)} responses, {len(HOSTILE)} hostile, limit {SECONDS} s, two workers: {took:.1f} s")


def test_what_failed_is_tried_once_more_in_a_fresh_worker(pool: Pool, tmp_path: Path) -> None:
    texts = ["exit 3", f"once {tmp_path / 'mark'}", *[f"sleep 0.0{i}" for i in range(1, 10)], "forever"]
    pool(jobs(texts[2:11]))  # both workers have been used
    verdicts = pool(jobs(texts, log=str(tmp_path / "log")))
    assert [verdicts[0].reason, verdicts[-1].reason] == ["worker exited (code 3)", "timeout"]
    assert verdicts[1:-1] == [right(t) for t in texts[1:-1]]  # the second try of `once` counts
    tries: dict[str, list[str]] = {}
    began: dict[str, list[str]] = {}
    for line in (tmp_path / "log").read_text().splitlines():
        pid, _, text = line.partition(" ")
        tries.setdefault(ast.literal_eval(text), []).append(pid)
        began.setdefault(pid, []).append(ast.literal_eval(text))
    for text in texts:
        pids = tries[text]
        assert len(pids) == (1 if text.startswith("sleep") else 2) == len(set(pids)), text
        if len(pids) == 2:
            assert began[pids[1]][0] == text, "the second try is the first thing its worker does"


def test_an_exception_is_the_verifiers_error_and_costs_no_worker(pool: Pool, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    verdicts = pool(jobs(["raise no\ud800 luck" + "!" * 10**6, "fine"], log=log))
    assert math.isnan(verdicts[0].score) and math.isnan(verdicts[0].correct) and verdicts[1] == right("fine")
    assert verdicts[0].reason.startswith("verifier error: ValueError: no\\ud800 luck!") and len(verdicts[0].reason) < 400
    assert pool(jobs(["fine"] * 4, log=log)) == [right("fine")] * 4
    pids = [line.split()[0] for line in Path(log).read_text().splitlines() if "fine" in line]
    assert len(set(pids)) <= 2


def test_fields_that_cannot_travel_are_the_samples_own_error(pool: Pool) -> None:
    verdicts = pool([("deed", "a", {"x": lambda: 0}), ("deed", "b", {}), ("nobody", "c", {})])
    assert verdicts[1] == right("b")
    assert verdicts[0].reason.startswith("verifier error: ") and verdicts[2].reason == "verifier error: KeyError: 'nobody'"


def test_what_a_verifier_prints_is_no_answer(pool: Pool) -> None:
    texts = ["print", "fine"] * 30
    assert pool(jobs(texts)) == [right(t) for t in texts]


def test_texts_of_any_kind_arrive(pool: Pool) -> None:
    texts = ["", "\ud800\udfff lone", "\x00\r\n", "٣²", "(" * 100_000, "x" * 5_000_000]
    assert pool(jobs(texts)) == [right(t) for t in texts]


def test_a_worker_that_does_not_read_blocks_nobody(pool: Pool) -> None:
    """More is waiting to be sent to it than a connection holds."""
    texts = ["stop"] + ["y" * 1_000_000] * 40
    verdicts = pool(jobs(texts))
    assert verdicts == [Verdict(0.0, 0.0, "timeout")] + [right(t) for t in texts[1:]]


def test_many_samples_keep_their_order(pool: Pool) -> None:
    texts = ["z" * (i * 7919 % 997) for i in range(5000)]
    assert pool(jobs(texts)) == [right(t) for t in texts]
    assert pool([]) == []


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("0.5", Verdict(0.5, 0.5, "partly right")),
        ("True", Verdict(1.0, 1.0, "right")),
        ("0", Verdict(0.0, 0.0, "wrong")),
        ("pair", Verdict(-2.0, 1.0, "right")),
        ("half", Verdict(3.0, 0.5, "partly right")),
        ("two", "correct must lie in [0, 1], got 2.0"),
        ("text", "expected a Verdict, got str"),
        ("None", "expected a Verdict, got NoneType"),
    ],
    ids=str,
)
def test_short_answers_of_a_users_verifier(pool: Pool, text: str, verdict: Verdict | str) -> None:
    (found,) = pool([("short", text, {})])
    if isinstance(verdict, Verdict):
        assert found == verdict
    else:
        assert math.isnan(found.score) and found.reason == f"verifier error: {verdict}"


def test_calls_from_several_threads(pool: Pool) -> None:
    results: dict[int, list[Verdict]] = {}

    def call(n: int) -> None:
        results[n] = pool(jobs([f"{'w' * n} {i}" for i in range(50)] + ["exit 3"]))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for n in range(1, 5):
        assert results[n][:-1] == [right(f"{'w' * n} {i}") for i in range(50)]
        assert results[n][-1].reason == "worker exited (code 3)"


def test_workers_are_kept_between_calls_and_replaced_when_killed_between(pool: Pool, tmp_path: Path) -> None:
    def pids(name: str) -> set[int]:
        assert pool(jobs(["sleep 0.01"] * 20, log=str(tmp_path / name))) == [right("sleep 0.01")] * 20
        return {int(line.split()[0]) for line in (tmp_path / name).read_text().splitlines()}

    ready = time.monotonic() + 60
    while len(first := pids("a")) < 2:  # a worker that starts slowly misses calls that the other one finishes
        assert time.monotonic() < ready
    assert pids("b") <= first
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    assert not pids("c") & first


def test_closing_leaves_no_process(tmp_path: Path) -> None:
    before = children()
    with Pool(DEED, workers=3, seconds=SECONDS) as p:
        p(jobs(["fine"] * 30 + [f"child {tmp_path / 'pid'}"]))  # which starts another process
        workers = children() - before
        assert len(workers) == 3
    assert not alive(workers | {int((tmp_path / "pid").read_text())})
    with pytest.raises(RuntimeError, match="closed"):
        p(jobs(["fine"]))
    p.close()


def test_closing_during_a_call_ends_it() -> None:
    p = Pool(DEED, workers=1, seconds=30)
    p.start()
    failed: list[BaseException] = []

    def call() -> None:
        try:
            p(jobs(["forever"]))
        except RuntimeError as e:
            failed.append(e)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    p.close()
    thread.join(5)
    assert not thread.is_alive() and "closed" in str(failed[0])


def run_python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("end", ["", "os._exit(0)", "os.kill(os.getpid(), 9)"], ids=["exit", "_exit", "kill"])
@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_their_parent(end: str, busy: bool) -> None:
    """However it ends; a busy worker loops for ever. The script has no `if __name__ == "__main__"`."""
    code = f"""
import os, threading, time
from popo_jax.tasks.pool import Pool
p = Pool({{"deed": "tests.tasks.deeds:deed"}}, workers=2, seconds=60)
p.start()
print(*[c._process.pid for c in p._children], flush=True)
if {busy}:
    threading.Thread(target=p, args=([("deed", "forever", {{}})],), daemon=True).start()
    time.sleep(0.5)
{end}
"""
    with run_python(code) as script:
        assert script.stdout is not None
        pids = {int(x) for x in script.stdout.readline().split()}
        script.wait(30)
    assert len(pids) == 2
    assert not alive(pids, wait=10)


def test_a_started_worker_imports_no_jax() -> None:
    code = (
        "import sys, popo_jax.tasks.worker, popo_jax.tasks.mathematics; "
        "print([m for m in ('jax', 'flax', 'torch', 'pyarrow', 'sympy') if m in sys.modules])"
    )
    with run_python(code) as script:
        assert script.communicate(timeout=30)[0].strip() == "[]"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:grade", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("tests.tasks.deeds:nothing", "cannot be imported: AttributeError: .*nothing"),
        ("tests.tasks.deeds:not_a_function", "must be a function, got int"),
        ("leaves:grade", "cannot be imported: SystemExit: 7"),
        ("ends:grade", r"workers must start, got 3 in a row that did not \(worker exited \(code 9\)"),
    ],
    ids=str,
)
def test_a_verifier_that_cannot_be_imported_is_told_at_once(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(7)")
    (tmp_path / "ends.py").write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    before = children()
    c = tiny.config(tasks=[{"name": "countdown", "verifier": path}], verifier__workers=1)
    with pytest.raises(UserError, match=message):
        Graders(c)
    assert not alive(children() - before)


def test_too_little_memory_to_start_is_told() -> None:
    with Pool(DEED, workers=1, memory_gb=0.02) as p, pytest.raises(UserError, match=r"workers must start, .*memory_gb is 0\.02"):
        p.start()


def test_a_users_verifier_gets_the_tasks_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current directory; a module there that has a standard library's name is not in the way."""
    (tmp_path / "mine.py").write_text(
        "def grade(response, *, nums, target):\n    return response == f'{sorted(nums)} {target}'\n"
    )
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    c = tiny.config(tasks=[{"name": "countdown", "verifier": "mine:grade"}, {"name": "arithmetic"}])
    with Graders(c) as grade:
        found = grade([("countdown", "[3, 5, 7] 56", FIELDS), ("arithmetic", "4", {"value": 4}), ("countdown", "x", FIELDS)])
        assert [v.reason for v in found] == ["right", "right", "wrong"]
        with pytest.raises(UserError, match="task must be one of"):
            grade([("countdwn", "x", {})])


def test_bounded_tasks_start_no_process() -> None:
    before = children()
    with Graders(tiny.config()) as grade:
        assert [v.reason for v in grade([("countdown", "(3+5)*7", FIELDS)])] == ["right"]
        assert children() == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"verifier__workers": 0}, "verifier.workers must be at least 1, got 0"),
        ({"verifier__seconds": 0}, "verifier.seconds must be above 0, got 0"),
        ({"verifier__seconds": math.inf}, "verifier.seconds must be above 0, got inf"),
        ({"verifier__memory_gb": -1}, "verifier.memory_gb must be above 0, got -1"),
        ({"tasks": [{"verifier": "mine.py"}]}, "tasks.0.verifier must name a function as module:function, got 'mine.py'"),
        ({"tasks": [{"verifier": ":grade"}]}, "tasks.0.verifier must name a function"),
    ],
    ids=str,
)
def test_settings_out_of_range(setting: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        tiny.config(**setting)


def test_defaults() -> None:
    assert PoolConfig() == PoolConfig(None, 5.0, 2.0) and TaskConfig().verifier is None


def test_counting_reasons_needs_few_kinds(pool: Pool) -> None:
    verdicts = pool(jobs(["exit 3", "exit 3", "forever", "fine"]))
    assert Counter(v.reason for v in verdicts) == {"worker exited (code 3)": 2, "timeout": 1, "4": 1}
