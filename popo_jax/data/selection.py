"""Which prompts of the stream a step takes. `uniform`: the next ones. `mopps`: those likely to give an effective group.

MoPPS (Qu et al. 2025, "Can prompt difficulty be online predicted for accelerating RL finetuning of reasoning models?"):
each prompt's success rate has a Beta posterior; a step reads more candidates than it needs, draws a rate for each
(Thompson sampling), and takes those nearest to the target. How many candidates, and the decay, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from popo_jax.config import SelectionConfig
from popo_jax.types import Group, Prompt, UserError

SELECT = 0x53656C65
"""Sets these draws apart from every other use of the seed."""


class Mopps:
    """A posterior for each prompt id: (alpha, beta), the prior for those never observed."""

    def __init__(self, c: SelectionConfig, *, seed: int):
        self.c = c
        self.seed = seed
        self._counts: dict[str, tuple[float, float]] = {}

    @property
    def observed(self) -> int:
        """Prompts that have a posterior of their own."""
        return len(self._counts)

    def posterior(self, prompt_id: str) -> tuple[float, float]:
        """(alpha, beta): the prior plus decayed successes and failures."""
        return self._counts.get(prompt_id, (self.c.prior, self.c.prior))

    def choose(self, candidates: Sequence[Prompt], n: int, *, step: int, round_: int) -> list[int]:
        """Indices, ascending, of the n candidates whose drawn success rates lie nearest `c.target`; the earlier on a tie."""
        rng = np.random.default_rng([self.seed, SELECT, step, round_])
        alpha, beta = np.array([self.posterior(p.id) for p in candidates]).T
        distance = np.abs(rng.beta(alpha, beta) - self.c.target)
        return sorted(np.argsort(distance, kind="stable")[:n].tolist())

    def observe(self, groups: Sequence[Group]) -> dict[str, float]:
        """Update the posteriors by graded groups; returns how well they had predicted.

        alpha <- decay alpha + (1 - decay) prior + sum of correct, beta likewise with the rest. Groups with a value that is
        not finite are left out. `selection/seen`: share of the groups whose prompt had been observed before;
        `selection/error`: mean distance over those between the posterior's mean and the group's accuracy, NaN without one.
        """
        d, prior = self.c.decay, self.c.prior
        errors, n = [], 0
        for g in groups:
            if not np.isfinite(g.correct).all():
                continue
            n += 1
            alpha, beta = self.posterior(g.prompt_id)
            if g.prompt_id in self._counts:
                errors.append(abs(alpha / (alpha + beta) - float(g.correct.mean())))
            right = float(g.correct.sum())
            fade = (1 - d) * prior
            self._counts[g.prompt_id] = (d * alpha + fade + right, d * beta + fade + len(g.correct) - right)
        return {
            "selection/seen": len(errors) / n if n else float("nan"),
            "selection/error": float(np.mean(errors)) if errors else float("nan"),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint: ids [n] and float64 [n, 2]."""
        return {
            "selection_ids": np.array(list(self._counts), np.str_),
            "selection_counts": np.array(list(self._counts.values()), np.float64).reshape(-1, 2),
        }

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave. Errors: UserError if a part is missing or they do not fit together."""
        ids, counts = arrays.get("selection_ids"), arrays.get("selection_counts")
        if ids is None or counts is None or counts.shape != (len(ids), 2):
            got = f"{sorted(arrays)}" if ids is None or counts is None else f"{len(ids)} ids and counts {counts.shape}"
            raise UserError(f"a checkpoint of a run with selection.method mopps must hold its posteriors, got {got}")
        self._counts = {str(i): (float(a), float(b)) for i, (a, b) in zip(ids, counts, strict=True)}
