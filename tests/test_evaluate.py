from __future__ import annotations

import numpy as np
import pytest

from popo_jax.evaluate import Answers, accuracy, pass_at, reasons
from popo_jax.types import Prompt, Verdict


def test_pass_at_k_by_hand():
    """Two problems, four samples: 1 of 4 right, 2 of 4 right."""
    correct = np.array([[1, 0, 0, 0], [1, 0, 1, 0]], np.float32)
    assert pass_at(correct, 1) == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert pass_at(correct, 2) == pytest.approx(((1 - 3 / 6) + (1 - 1 / 6)) / 2)
    assert pass_at(correct, 3) == pytest.approx(((1 - 1 / 4) + 1) / 2)
    assert pass_at(correct, 4) == 1
    with pytest.raises(ValueError, match="k from 1 to the 4 samples"):
        pass_at(correct, 5)


def test_accuracy_is_per_task_too():
    prompts = tuple(Prompt(str(i), task, "", np.zeros(1, np.int32), {}) for i, task in enumerate(["a", "b", "b"]))
    verdicts = tuple(Verdict(x, x, r) for x, r in ((1.0, "right"), (0.0, "malformed"), (0.0, "malformed")))
    answers = Answers(prompts, ("", "", ""), verdicts, np.array([[1], [0], [0]], np.float32))
    assert accuracy(answers) == pytest.approx({"eval/accuracy": 1 / 3, "eval/a/accuracy": 1.0, "eval/b/accuracy": 0.0})
    assert list(reasons(answers).items()) == [("malformed", 2), ("right", 1)]
