from __future__ import annotations

import numpy as np
import pytest

from popo_jax.evaluate import Answers, accuracy, answer
from popo_jax.types import Prompt, Responses, Verdict


def test_accuracy_is_per_task_too():
    prompts = tuple(Prompt(str(i), task, "", np.zeros(1, np.int32), {}) for i, task in enumerate(["a", "b", "b"]))
    verdicts = tuple(Verdict(x, x, r) for x, r in ((1.0, "right"), (0.0, "malformed"), (0.0, "malformed")))
    answers = Answers(
        prompts, ("", "", ""), verdicts, np.array([[1], [0], [0]], np.float32), np.ones(3, int), np.ones(3, bool), 0
    )
    assert accuracy(answers) == pytest.approx({"eval/accuracy": 1 / 3, "eval/a/accuracy": 1.0, "eval/b/accuracy": 0.0})


def test_a_verifier_reads_what_the_prompt_has_begun():
    prompts = [Prompt(str(i), "t", "", np.zeros(1, np.int32), {"n": i}, begun) for i, begun in enumerate(["", "<think>\n"])]
    mask = np.ones((4, 1), bool)
    responses = Responses(np.arange(4, dtype=np.int32)[:, None], mask, np.zeros((4, 1), np.float32), mask[:, 0], 0)
    seen = []

    def grade(jobs):
        seen.extend(jobs)
        return [Verdict(0.0, 0.0, "seen")] * len(jobs)

    a = answer(None, prompts, lambda *_, **__: responses, lambda ids: f"text {ids[0]}", grade, seed=0, version=0)
    fields = [{"n": 0}, {"n": 0}, {"n": 1}, {"n": 1}]
    texts = ["text 0", "text 1", "<think>\ntext 2", "<think>\ntext 3"]
    assert seen == [("t", t, f) for t, f in zip(texts, fields, strict=True)]
    assert a.texts == ("text 0", "text 1", "text 2", "text 3")
