from __future__ import annotations

import numpy as np
import pytest

from popo_jax.evaluate import Answers, accuracy
from popo_jax.types import Prompt, Verdict


def test_accuracy_is_per_task_too():
    prompts = tuple(Prompt(str(i), task, "", np.zeros(1, np.int32), {}) for i, task in enumerate(["a", "b", "b"]))
    verdicts = tuple(Verdict(x, x, r) for x, r in ((1.0, "right"), (0.0, "malformed"), (0.0, "malformed")))
    answers = Answers(
        prompts, ("", "", ""), verdicts, np.array([[1], [0], [0]], np.float32), np.ones(3, int), np.ones(3, bool), 0
    )
    assert accuracy(answers) == pytest.approx({"eval/accuracy": 1 / 3, "eval/a/accuracy": 1.0, "eval/b/accuracy": 0.0})
