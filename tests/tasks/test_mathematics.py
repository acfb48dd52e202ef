"""Grading by math-verify: its own cases through the pool, hostile text, thinking kept apart; prompts, ids, the teacher."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from popo_jax.tasks import mathematics
from popo_jax.tasks.pool import Pool
from popo_jax.tasks.tags import split_thinking
from popo_jax.types import Verdict

CASES = json.loads((Path(__file__).parent / "math_verify_cases.json").read_text())["cases"]
SECONDS = 5.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    verifiers = {"math": "popo_jax.tasks.mathematics:grade"}
    verifiers |= {n: f"tests.tasks.deeds:{n}" for n in ("case", "direct")}
    with Pool(verifiers, workers=2, seconds=SECONDS) as p:
        yield p


def test_every_case_of_math_verify_comes_out_as_it_does_there(pool: Pool) -> None:
    """Those with its defaults through the task itself, those with options by the same `grade`, letters by its parser."""
    jobs = []
    for c in CASES:
        fields = {k: v for k, v in c.items() if k not in ("id", "pred", "gold", "kind", "expected")}
        if c["kind"] == "strings":
            jobs.append(("case", c["pred"], fields | {"kind": "strings", "expected": c["expected"]}))
        elif fields:
            jobs.append(("case", c["pred"], fields | {"kind": "grade", "answer": c["gold"]}))
        else:
            jobs.append(("math", c["pred"], {"answer": c["gold"]}))
    verdicts = pool(jobs)
    wrong = [
        f"{c['id']}: {v}"
        for c, v in zip(CASES, verdicts, strict=True)
        if v.correct != (1 if c["kind"] == "strings" else c["expected"]) or v.reason not in ("right", "wrong", "no answer")
    ]
    print(f"\n{len(CASES)} cases, {dict(Counter(j[0] for j in jobs))}, {len(CASES) - len(wrong)} as in math-verify")
    assert not wrong
    assert len(CASES) == 282 and 0 < sum(v.correct for v in verdicts) < len(CASES)


def test_the_verdict_is_that_of_calling_math_verify(pool: Pool) -> None:
    """Each gold answer against other problems' responses, too: 300 pairs, its own time limits on."""
    graded = [c for c in CASES if c["kind"] == "grade" and "<think>" not in c["pred"] and "</think>" not in c["pred"]]
    rng = np.random.default_rng(0)
    pairs = [(graded[i]["gold"], graded[j]["pred"]) for i, j in rng.integers(len(graded), size=(300, 2))]
    ours = pool([("math", p, {"answer": g}) for g, p in pairs])
    theirs = pool([("direct", p, {"answer": g}) for g, p in pairs])
    assert [v.correct for v in ours] == [v.correct for v in theirs]
    assert 0 < sum(v.correct for v in ours) < 300


@pytest.mark.parametrize(
    ("response", "answer", "reason"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", r"\boxed{\frac12}", "right"),
        (r"\boxed{0.5}", r"\boxed{\frac12}", "right"),
        ("The answer is 42.", "42", "right"),
        ("#### 1,234", "1234", "right"),
        (r"It was \boxed{3}. Or was it? It is \boxed{4}", "4", "right"),
        (r"first \boxed{3}, then \boxed{4}", "4", "wrong"),  # math-verify: boxes side by side are the set {3, 4}
        (r"first \boxed{3}, then \boxed{4}", r"\{3,4\}", "wrong"),
        (r"\boxed{5}", "4", "wrong"),
        (r"It was 5, but \boxed{4}, and 5 again", "4", "right"),
        ("", "4", "no answer"),
        ("I do not know", "4", "no answer"),
        (r"\boxed{}", "4", "no answer"),
        (r"<think>\boxed{4}</think>\boxed{5}", "4", "wrong"),
        (r"<think>\boxed{5}</think>\boxed{4}", "4", "right"),
        (r"\boxed{5}</think>\boxed{4}", "4", "right"),
        (r"<think>it is \boxed{4}", "4", "unfinished thinking"),
        (r"<think>a</think><think>\boxed{4}", "4", "unfinished thinking"),
        (r"<think>it is \boxed{4}</think>", "4", "no answer"),
        ("<think>a</think>\n", "4", "no answer"),
        ("٤", "4", "no answer"),
    ],
)
def test_verdicts_by_hand(pool: Pool, response: str, answer: str, reason: str) -> None:
    (verdict,) = pool([("math", response, {"answer": answer})])
    assert verdict == Verdict(float(reason == "right"), float(reason == "right"), reason)


def test_hostile_text_is_graded_in_time() -> None:
    texts = [
        "9**9**9",
        "9**9**9**9",
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{10^{10^{10}}!}",
        "(" * 100_000,
        "{" * 100_000,
        r"\boxed{" * 5_000,
        "1+" * 50_000 + "1",
        "9" * 100_000,
        "٣²" * 1000,
        "\ud800\udfff \\boxed{\ud800}",
        "$" * 10_000,
        r"\frac{" * 1000,
        "<think>" * 10_000,
        "</think>" * 10_000,
        "\x00\\boxed{4}",
    ]
    with Pool({"math": "popo_jax.tasks.mathematics:grade"}, workers=2, seconds=1.0) as pool:
        began = time.monotonic()
        verdicts = pool([("math", t, {"answer": "4"}) for t in [*texts, r"\boxed{4}"]])
        took = time.monotonic() - began
    assert verdicts[-1].reason == verdicts[-2].reason == "right"
    assert {v.score for v in verdicts[:-2]} == {0.0}
    allowed = {"wrong", "no answer", "unfinished thinking", "timeout", "memory"}
    assert {v.reason for v in verdicts[:-2]} <= allowed, verdicts
    assert took < (1.0 + 1.0) * 2 * len(texts) / 2, took  # all of them twice, with a start
    print(f"\n{took:.1f} s: {Counter(v.reason for v in verdicts)}")


@pytest.mark.parametrize(
    ("response", "thinking", "answer"),
    [
        ("4", "", "4"),
        ("<think>a</think>b", "a", "b"),
        ("\n<think>a</think>b", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a</think>b</think>c", "a</think>b", "c"),
        ("<think>a", "<think>a", None),
        ("a</think>b<think>c", "a</think>b<think>c", None),
        ("<think></think>", "", ""),
        ("", "", ""),
    ],
)
def test_thinking_is_split_from_the_answer(response: str, thinking: str, answer: str | None) -> None:
    assert split_thinking(response) == (thinking, answer)


def test_running_out_of_memory_is_told_from_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise MemoryError

    import math_verify

    monkeypatch.setattr(mathematics, "_library", lambda: (math_verify, parse, None))
    with pytest.raises(MemoryError):
        mathematics.grade("4", answer="4")


def test_prompt_id_and_fields() -> None:
    p = {"problem": "What is 1+1?", "answer": r"\frac{4}{2}", "instruction": "Box it."}
    assert mathematics.prompt_text(p) == "What is 1+1?\nBox it."
    assert mathematics.prompt_text({**p, "instruction": ""}) == "What is 1+1?"
    assert mathematics.problem_id(p) == mathematics.problem_id({**p, "instruction": "", "answer": "2"})
    assert mathematics.problem_id(p) != mathematics.problem_id({**p, "problem": "What is 1+2?"})
    assert mathematics.problem_id({**p, "problem": "\ud800"}).startswith("math-")
    assert mathematics.answer_fields(p) == {"answer": r"\boxed{\frac{4}{2}}"}
    assert mathematics.answer_fields({**p, "answer": "1,234"}) == {"answer": "1,234"}
    assert mathematics.answer_fields({**p, "answer": "$x$"}) == {"answer": "$x$"}


@pytest.mark.parametrize("answer", ["12", "-3", "0", r"\frac{1}{2}", "x+1", "3.5"])
def test_the_teacher_is_right_or_wrong_as_told(pool: Pool, answer: str) -> None:
    p = {"problem": "?", "answer": answer, "instruction": ""}
    rng = np.random.default_rng(0)
    texts = [mathematics.teacher_answer(p, rng, right=float(i % 2)) for i in range(100)]
    verdicts = pool([("math", t, mathematics.answer_fields(p)) for t in texts])
    assert [v.reason for v in verdicts] == ["wrong", "right"] * 50
    assert len(set(texts[::2])) > 5 and set(texts[1::2]) == {f"\\boxed{{{answer}}}"}
