"""Which prompts of the stream a step takes. `uniform`: the next ones. `mopps`: those likely to give an effective group.

MoPPS (Qu et al. 2025, "Can prompt difficulty be online predicted for accelerating RL finetuning of reasoning models?"):
each prompt's success rate has a Beta posterior; a step reads more candidates than it needs, draws a rate for each
(Thompson sampling), and takes those nearest to the target. How many candidates, the decay and the running prior are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from popo_jax.config import SelectionConfig
from popo_jax.types import Group, Prompt, UserError

SELECT = 0x53656C65
"""Sets these draws apart from every other use of the seed."""
MEMORY = 0.9
"""What the running success rate keeps of its counts from one observation to the next."""


class Mopps:
    """A posterior for each prompt id: (alpha, beta), the prior for those never observed."""

    def __init__(self, c: SelectionConfig, *, seed: int):
        self.c = c
        self.seed = seed
        self._counts: dict[str, tuple[float, float]] = {}
        self._running = np.zeros(2)

    @property
    def observed(self) -> int:
        """Prompts that have a posterior of their own."""
        return len(self._counts)

    def posterior(self, prompt_id: str) -> tuple[float, float]:
        """(alpha, beta): the prior plus decayed successes and failures."""
        return self._counts.get(prompt_id) or self._prior()

    def _prior(self) -> tuple[float, float]:
        """Of strength `c.prior`; a running mean starts as one success in two."""
        right, n = self._running + np.array([1, 2]) if self.c.prior_mean == "running" else (1.0, 2.0)
        mean = float(right / n)
        return self.c.prior * mean, self.c.prior * (1 - mean)

    def choose(self, candidates: Sequence[Prompt], n: int, *, step: int, round_: int) -> list[int]:
        """Indices, ascending, of the n candidates whose drawn success rates lie nearest `c.target`; the earlier on a tie."""
        rng = np.random.default_rng([self.seed, SELECT, step, round_])
        alpha, beta = np.array([self.posterior(p.id) for p in candidates]).T
        distance = np.abs(rng.beta(alpha, beta) - self.c.target)
        return sorted(np.argsort(distance, kind="stable")[:n].tolist())

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """Update the posteriors by graded groups; returns how well they had predicted.

        alpha <- decay alpha + (1 - decay) alpha of the prior + sum of correct, beta likewise with the rest; groups with a
        value that is not finite are left out. `selection/seen`: share of the groups whose prompt had been observed before;
        `selection/error`: mean distance over those between the posterior's mean and the group's accuracy, NaN without one.
        """
        d, (a, b) = self.c.decay, self._prior()
        errors, n, running = [], 0, MEMORY * self._running
        for g in groups:
            if not np.isfinite(g.correct).all():
                continue
            n += 1
            alpha, beta = self.posterior(g.prompt_id)
            if g.prompt_id in self._counts:
                errors.append(abs(alpha / (alpha + beta) - float(g.correct.mean())))
            right = float(g.correct.sum())
            wrong = len(g.correct) - right
            self._counts[g.prompt_id] = (d * alpha + (1 - d) * a + right, d * beta + (1 - d) * b + wrong)
            running = running + np.array([right, len(g.correct)])
        self._running = running
        return {
            "selection/seen": len(errors) / n if n else float("nan"),
            "selection/error": float(np.mean(errors)) if errors else float("nan"),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint: ids [n], float64 [n, 2], and the running counts [2]."""
        return {
            "selection_ids": np.array(list(self._counts), np.str_),
            "selection_counts": np.array(list(self._counts.values()), np.float64).reshape(-1, 2),
            "selection_running": self._running,
        }

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave. Errors: UserError if a part is missing or they do not fit together."""
        names = ("selection_ids", "selection_counts", "selection_running")
        ids, counts, running = (arrays.get(name) for name in names)
        if ids is None or counts is None or running is None or counts.shape != (len(ids), 2) or running.shape != (2,):
            got = ", ".join(f"{n} {arrays[n].shape}" for n in names if n in arrays) or "nothing"
            raise UserError(f"a checkpoint of a run with selection.method mopps must hold its posteriors, got {got}")
        self._running = running.astype(float)
        self._counts = {str(i): (float(a), float(b)) for i, (a, b) in zip(ids, counts, strict=True)}
