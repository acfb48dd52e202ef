"""Is the off-policy correction healthy? Ages, uses and weights of replayed groups, clipping, divergences, gradients.

Every figure whose metric has a line of health shows it, with what to do beyond it.
"""

from __future__ import annotations

import numpy as np

from popo_jax.report.curves import present, series, worry
from popo_jax.report.frame import Figure, Section, Series
from popo_jax.report.read import Run

REPLAY = {
    "age": ("Age of replayed groups", "updates", {"replay/age_mean": "mean", "replay/age_max": "oldest"}, False),
    "weight-mean": ("Importance weights of replayed tokens", "mean, capped", {"weight/mean": "mean"}, False),
    "weight-max": ("Largest importance weight", "uncapped", {"weight/max": "largest"}, True),
    "weight-capped": ("Replayed tokens whose weight is capped", "share", {"weight/capped": "capped"}, False),
    "ess": ("Effective sample size of replayed tokens", "share of them", {"weight/ess": "ESS"}, False),
}
EVERY = {
    "clip-fresh": (
        "Fresh tokens that the trust region clips",
        "share",
        {"clip/low_fresh": "low", "clip/high_fresh": "high"},
        False,
    ),
    "clip-replayed": (
        "Replayed tokens that the trust region clips",
        "share",
        {"clip/low_replayed": "low", "clip/high_replayed": "high"},
        False,
    ),
    "kl-proximal": ("Divergence within a step, fresh tokens", "nats a token", {"kl/proximal": "from the step's start"}, True),
    "kl-behaviour": (
        "Divergence from what sampled, replayed tokens",
        "nats a token",
        {"kl/behaviour_replayed": "from the behaviour policy"},
        True,
    ),
    "mismatch": ("Sampler against trainer", "nats a token", {"mismatch/mean": "mean", "mismatch/max": "largest"}, True),
    "grad-norm": ("Norm of the gradient", "", {"grad_norm": "gradient"}, False),
    "update-norm": ("Norm of the update", "", {"update_norm": "update"}, False),
    "skipped": ("Updates with nothing to train on", "mini-batches of a step", {"update/skipped": "skipped"}, False),
    "nonfinite": ("Updates that were not finite", "mini-batches of a step", {"update/nonfinite": "not applied"}, False),
}
NOTES = {
    "ess": "(sum w)^2 / (n sum w^2): 100 % where all weights are equal, little where few tokens speak for all.",
    "clip-fresh": "low: A < 0 and r < 1 - clip_low; high: A > 0 and r > 1 + clip_high; of the counted tokens.",
    "clip-replayed": "As for fresh tokens. No line: around a behaviour policy of ten updates ago a tenth is usual.",
    "kl-proximal": "k3, in expectation at least 0 (Schulman 2020).",
    "kl-behaviour": "k3, in expectation at least 0 (Schulman 2020).",
    "weight-mean": "Near 1 where the policy still is what sampled the groups; far from it, look at the effective sample size.",
    "weight-max": "No line: the cap bounds what a single token does. Where the ESS falls too, lower replay.max_age.",
    "update-norm": "No line: it follows optim.learning_rate. A jump without one of the gradient's norm is worth a look.",
    "mismatch": "Between the sampler's log-probs and those of the first training on the same tokens.",
}
BINS = 60
"""Of the histogram of ages, at most."""
PERCENT = ("weight-capped", "ess", "clip-fresh", "clip-replayed")


def section(run: Run) -> Section:
    shown, notes = [], []
    if run.replays.num_rows or run.metrics.has("replay/age_mean"):
        shown += [_figure(run, name, *REPLAY[name]) for name in REPLAY] + [age_histogram(run), uses(run)]
        notes += [] if run.replays.num_rows else ["replays/ has no rows: ages and uses of single groups are not known."]
    else:
        notes += ["No group was replayed: there is no weight to look at."]
    shown += [_figure(run, name, *EVERY[name]) for name in EVERY]
    figures = tuple(f for f in shown if f.series)
    return Section("correction", "Is the off-policy correction healthy?", figures, notes=tuple(notes))


def _figure(run: Run, name: str, title: str, y: str, keys: dict[str, str], log: bool) -> Figure:
    found = present(*(series(run, key, label) for key, label in keys.items()))
    there = {s.name for s in found}
    lines = {label: w for key, label in keys.items() if label in there and (w := worry(run, key)) is not None}
    whose, line = next(iter(lines.items()), ("", None))
    note = NOTES.get(name, "") + (f" The line is for '{whose}'." if line and len(found) > 1 else "")
    return Figure(f"correction/{name}", title, "line", "step", y, found, line, note.strip(), name in PERCENT, log)


def age_histogram(run: Run) -> Figure:
    """correction/age-histogram: all replays by age, in at most BINS bins of whole ages, empty ones too."""
    age = run.replays["age"].drop_null().to_numpy()
    title, found = "How old replayed groups were", list[Series]()
    if len(age):
        least, width = int(age.min()), -(-(int(age.max()) - int(age.min()) + 1) // BINS)
        count = np.bincount((age - least) // width)
        edges = least + width * np.arange(len(count))
        found += [Series("replays", edges.tolist(), count.tolist())]
    return Figure("correction/age-histogram", title, "histogram", "age in updates", "replays", tuple(found))


def uses(run: Run) -> Figure:
    """correction/uses: groups that were replayed once, twice, .."""
    group = run.replays["group_id"].drop_null().to_numpy()
    _, times = np.unique(group, return_counts=True)
    values, count = np.unique(times, return_counts=True)
    found = (Series("groups", values.tolist(), count.tolist()),) if len(group) else ()
    title = "How often a stored group was replayed"
    limit = run.setting("replay.max_uses", "not known")
    note = f"The limit is replay.max_uses, {limit}: lower it where few groups fill most slots."
    return Figure("correction/uses", title, "bar", "times", "groups", found, note=note)
