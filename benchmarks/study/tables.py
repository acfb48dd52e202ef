"""The study's tables, as Markdown, from the raw results: one per task, the ablations, the group sizes, the claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.study.plan import ADOPTED, ALGORITHMS, EVERY, MAIN, OTHERS, SIZES
from benchmarks.study.results import Key, Reach, Run, final, grid, interval, load, mean_of, reach

Found = Mapping[Key, Sequence[Run]]


def document(folder: Path) -> str:
    """RESULTS.md."""
    found = load(folder)
    parts = ["# Study: results", where(found), "## The claims", claims(found)]
    for task in (MAIN, *OTHERS):
        if any(k[0] == task for k in found):
            parts += [f"## {task}", by_algorithm(found, task)]
    parts += ["## Inside the runs", inside(found, MAIN), "## Group sizes", group_sizes(found), "## Solo runs", solo(found)]
    if stops := [
        f"- `{r.ending['algorithm']}` seed {r.ending['seed']}: {r.ending['stopped']}" for r in _all(found) if r.ending["stopped"]
    ]:
        parts += ["## Runs that stopped by themselves", "\n".join(stops)]
    return "\n\n".join(parts) + "\n"


def _all(found: Found) -> list[Run]:
    return [r for runs in found.values() for r in runs]


def where(found: Found) -> str:
    runs = _all(found)
    names = ("machine", "python", "jax", "commit", "date")
    facts = [f"{n} {', '.join(sorted({str(r.ending[n]) for r in runs}))}" for n in names]
    return (
        f"{len(runs)} runs; {'; '.join(facts)}. Accuracy: held out, 512 problems, temperature 0.6, mean of the last three "
        "evaluations, in %. Brackets: 95 % percentile bootstrap over seeds (scipy); with three seeds it is rather too narrow. "
        "`> N`: not reached within N. *dead at first*: ineffective groups over the first ten steps."
    )


def by_algorithm(found: Found, task: str) -> str:
    """One line per algorithm of a task, group size 8."""
    runs_of = {a: found.get((task, a, 8)) for a in EVERY}
    targets = {a: float(final(runs).mean()) if (runs := runs_of[a]) else None for a in ("grpo", "dapo")}
    head = (
        "algorithm",
        "seeds",
        "dead at first",
        "start",
        "final",
        "minus grpo",
        "responses",
        "responses to dapo's final",
        "steps to grpo's final",
    )
    lines = []
    for name, runs in runs_of.items():
        if not runs:
            continue
        score = final(runs)
        to_dapo = "" if targets["dapo"] is None else of_reach(reach(runs, targets["dapo"], by="responses"), thousands)
        to_grpo = "" if targets["grpo"] is None else of_reach(reach(runs, targets["grpo"], by="steps"), whole)
        dead = 1 - np.mean([r.column("groups/effective")[:10] for r in runs])
        start = np.mean([r.rows[0]["eval/accuracy"] for r in runs])
        cells = (name, len(runs), f"{100 * dead:.0f} %", percent(start), f"{percent(score.mean())} {span(score)}")
        total = thousands(np.mean([r.total("rollouts_total") for r in runs]))
        lines.append((*cells, _paired(runs, runs_of["grpo"]), total, to_dapo, to_grpo))
    return table(head, lines)


def _paired(runs: Sequence[Run], base: Sequence[Run] | None) -> str:
    """Difference of final accuracies over the seeds both have."""
    gap = differences(runs, base)
    return "" if len(gap) == 0 or runs is base else points(gap)


def differences(runs: Sequence[Run], base: Sequence[Run] | None) -> np.ndarray:
    """float [seeds in common]."""
    mine, theirs = ({r.ending["seed"]: f for r, f in zip(x, final(x), strict=True)} if x else {} for x in (runs, base))
    return np.array([mine[s] - theirs[s] for s in mine if s in theirs])


def inside(found: Found, task: str) -> str:
    """What the runs' own measures say, over the last hundred steps."""
    keys = (
        ("effective", "groups/effective", percent),
        ("entropy", "entropy", number),
        ("replayed slots", "replay/filled", number),
        ("replay age", "replay/age_mean", number),
        ("ESS", "weight/ess", number),
        ("capped", "weight/capped", percent),
        ("kl behaviour", "kl/behaviour_replayed", small),
        ("clipped fresh", "clip/high_fresh", percent),
        ("clipped replayed", "clip/high_replayed", percent),
        ("gradient norm", "grad_norm", number),
        ("train accuracy", "accuracy/train", percent),
        ("CPU s a step", "cpu/step", small),
    )
    lines = []
    for name in EVERY:
        if runs := found.get((task, name, 8)):
            lines.append((name, *(show(mean_of(runs, key, last=100)) for _, key, show in keys)))
    return table(("algorithm", *(k[0] for k in keys)), lines)


def group_sizes(found: Found) -> str:
    """grpo and popo at other group sizes on the main task, seeds 0 and 1."""
    lines = []
    for G, *pair in _sizes(found):
        scores = [final(runs) for runs in pair]
        cells = (f"{percent(s.mean())} {each(s)}" for s in scores)
        lines.append((G, *cells, f"{100 * (scores[1].mean() - scores[0].mean()):+.1f}"))
    return table(("group size", "grpo (each seed)", "popo (each seed)", "popo minus grpo"), lines)


def _sizes(found: Found) -> Iterator[tuple[int, list[Run], list[Run]]]:
    """(group size, grpo's runs, popo's), of the two seeds that every size has."""
    for G in sorted({8, *SIZES}):
        grpo, popo = ([r for r in found.get((MAIN, a, G), ()) if r.ending["seed"] < 2] for a in ("grpo", "popo"))
        if grpo and popo:
            yield G, grpo, popo


def solo(found: Found) -> str:
    """Wall time of runs that had the machine to themselves."""
    lines = []
    for (task, algorithm, _), runs in found.items():
        if task == "solo":
            run, step = runs[0], runs[0].column("time/step")[2:]
            parts = [small(float(np.median(run.column(f"time/{k}")[2:]))) for k in ("sample", "update")]
            lines.append(
                (algorithm, len(run.rows) - 1, small(float(np.median(step))), *parts, f"{np.nansum(run.column('time/step')):.0f}")
            )
    return table(("algorithm", "steps", "median step, s", "sampling, s", "update, s", "all steps, s"), lines)


def claims(found: Found) -> str:
    """The paper's claims as questions, on the main task and the others, and the same of what was adopted."""
    lines: list[tuple[str, ...]] = []
    for task in (MAIN, *OTHERS):
        of = {a: found.get((task, a, 8)) for a in EVERY}
        if (grpo := of["grpo"]) and (dapo := of["dapo"]) and (popo := of["popo"]):
            for name, runs in (("popo", popo), (ADOPTED, of[ADOPTED])):
                lines += _budgets(task, name, runs, grpo, dapo) if runs else []
            if middle := of["grpo-filter"]:
                gaps = [differences(a, b) for a, b in ((middle, grpo), (popo, middle))]
                here = f"filter minus grpo {points(gaps[0])}, popo minus filter {points(gaps[1])}"
                lines.append((f"{task}: is grpo-filter between grpo and popo?", "yes", here, str(len(gaps[0]))))
    lines += _ablation_claims({a: found.get((MAIN, a, 8)) for a in ALGORITHMS})
    for G, grpo, popo in _sizes(found):
        gap = differences(popo, grpo)
        here = f"popo minus grpo {points(gap)}; grpo ends at {percent(final(grpo).mean())}"
        lines.append((f"{MAIN}: group size {G}", "popo ahead", here, str(len(gap))))
    return table(("question", "paper", "here", "seeds"), lines)


def _budgets(task: str, name: str, runs: Sequence[Run], grpo: Sequence[Run], dapo: Sequence[Run]) -> list[tuple[str, ...]]:
    """How soon `name` is where the others end."""
    x, g, last = float(final(dapo).mean()), float(final(grpo).mean()), float(grid(grpo)[-1])
    to_x, own, to_g = reach(runs, x, by="responses"), reach(dapo, x, by="responses"), reach(runs, g, by="steps")
    paper = ("23 to 34 % of dapo's", "40 to 70 % of grpo's") if name == "popo" else ("(not the paper's)",) * 2
    return [
        (
            f"{task}: responses {name} needs to dapo's final accuracy ({percent(x)})",
            paper[0],
            f"{of_reach(to_x, thousands)}; dapo reaches it after {of_reach(own, thousands)} of {thousands(own.end)}"
            f": {share(to_x, own.end)} of dapo's",
            f"{len(runs)}, dapo {len(dapo)}",
        ),
        (
            f"{task}: steps {name} needs to grpo's final accuracy ({percent(g)})",
            paper[1],
            f"{of_reach(to_g, whole)} of {whole(last)}: {share(to_g, last)} of grpo's",
            f"{len(runs)}, grpo {len(grpo)}",
        ),
    ]


def _ablation_claims(of: Mapping[str, Sequence[Run] | None]) -> list[tuple[str, ...]]:
    said = {
        "popo-stale": "collapses",
        "popo-pi-old": "collapses",
        "popo-ineff": "worse",
        "popo-behav": "worse",
        "popo-kl": "the same",
    }
    lines = []
    for name, claim in said.items():
        if (runs := of.get(name)) and (popo := of.get("popo")):
            gap, score = differences(runs, popo), final(runs)
            here = f"ends at {percent(score.mean())}; minus popo {points(gap)}"
            lines.append((f"{MAIN}: {name} against popo", claim, here, str(len(gap))))
    for base, more in (("mopps", "popo+mopps"), ("rloo", "popo+rloo")):
        if (a := of.get(base)) and (b := of.get(more)):
            gap = differences(b, a)
            lines.append((f"{MAIN}: does replay help on top of {base}?", "yes", points(gap), str(len(gap))))
    return lines


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def percent(x: float) -> str:
    return "" if math.isnan(x) else f"{100 * x:.1f}"


def number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.2f}"


def small(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3f}"


def whole(x: float) -> str:
    return f"{x:.0f}"


def thousands(x: float) -> str:
    return f"{x / 1000:.1f}k"


def points(gap: np.ndarray) -> str:
    """Mean difference in points of accuracy with its interval."""
    return f"{100 * gap.mean():+.1f} {span(gap)}"


def span(values: np.ndarray) -> str:
    low, high = interval(values)
    return "" if math.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]"


def each(values: np.ndarray) -> str:
    return f"({' / '.join(f'{100 * x:.1f}' for x in values)})"


def of_reach(r: Reach, show: Callable[[float], str]) -> str:
    def one(x: float) -> str:
        return show(x) if math.isfinite(x) else f"> {show(r.end)}"

    return one(r.at) if r.low == r.high else f"{one(r.at)} [{one(r.low)}, {one(r.high)}]"


def share(r: Reach, of: float) -> str:
    return f"{100 * r.at / of:.0f} %" if math.isfinite(r.at) else f"> {100 * r.end / of:.0f} %"
