"""Where a run comes from and what it cost: config, code, data, machine; responses, tokens, device hours, energy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from popo_jax.health import finite
from popo_jax.report.curves import seconds
from popo_jax.report.frame import Figure, Section, Series, Table
from popo_jax.report.read import Run

RATED_WATTS: Mapping[str, float] = {"H200": 700, "H100": 700, "A100": 400, "L40S": 350, "V100": 300, "L4": 72, "T4": 70}
"""Board power of accelerators by their makers' data sheets (of SXM boards if there are), by a part of the device's name."""
PARTS = ("sample", "grade", "replay", "update", "eval", "checkpoint")
"""Of a step: `time/<part>`. Sampling and grading of the next step run beside the rest, so that their sum may exceed the step."""


def section(run: Run) -> Section:
    """Tables provenance/code, data, machine, settings, sessions, cost; figure provenance/time."""
    tables = (_cost(run), _code(run), _data(run), _machine(run), _sessions(run), _settings(run))
    notes = [energy(run)[1]]
    if not run.sessions:
        notes.append("sessions.jsonl is not there: the machine and the packages' versions are not known.")
    return Section("provenance", "Provenance and cost", _time(run), tuple(t for t in tables if t.rows), tuple(notes))


def devices(run: Run) -> np.ndarray:
    """float [n]: devices at work in each row of the metrics, by the session it was made in; NaN where that is not known."""
    out = np.full(len(run.metrics.rows), np.nan)
    for s in run.sessions:
        count = finite((s.get("devices") or {}).get("count"))
        began = int(s["step"]) if isinstance(s.get("step"), int) else 0
        out[run.metrics.step > began if began else run.metrics.step >= 0] = np.nan if count is None else count
    return out


def device_hours(run: Run) -> float:
    """Hours of all devices, of the steps that the metrics hold; NaN where the number of devices is not known."""
    return float(np.sum(seconds(run.metrics) * devices(run)) / 3600) if len(run.metrics.rows) else 0.0


def energy(run: Run) -> tuple[float, str]:
    """(kWh, how it is known): counted by the devices, else estimated from their rated power, else NaN and why."""
    counted = run.metrics["energy/joules"]
    known = np.isfinite(counted)
    steps = run.metrics.step > 0
    if known.any():
        share = known[steps].mean()
        part = "" if share == 1 else f", of {share:.0%} of the steps"
        told = f"Energy: counted by the run's devices (NVML, or the CPU's packages){part}, with whatever else ran on them"
        return float(np.nansum(counted)) / 3.6e6, f"{told}; hosts of GPUs, cooling and network are not in it."
    kinds = {str((s.get("devices") or {}).get("kind", "")) for s in run.sessions}
    watts = {kind: next((w for part, w in RATED_WATTS.items() if re.search(rf"\b{part}\b", kind)), None) for kind in kinds}
    hours = device_hours(run)
    if len(watts) == 1 and np.isfinite(hours) and (rated := next(iter(watts.values()))) is not None:
        kind = next(iter(watts))
        told = f"Energy: estimated as device hours x {rated:.0f} W, the rated power of one {kind}: an upper bound for the boards"
        return hours * rated / 1000, f"{told} in these hours; hosts, cooling and network are not in it."
    found = ", ".join(sorted(filter(None, kinds))) or "an unknown device"
    why = "no rated power is kept for" if len(kinds) < 2 else "the sessions ran on different kinds:"
    return float("nan"), f"Energy: not known. No counter could be read, and {why} {found}."


def _cost(run: Run) -> Table:
    took, kwh = float(seconds(run.metrics).sum()), energy(run)[0]
    rows: list[tuple[str, Any]] = [
        ("steps", int(run.metrics.step.max()) if len(run.metrics.rows) else 0),
        ("responses sampled in training", _whole(run.metrics.last("rollouts_total"))),
        ("tokens sampled in training", _whole(run.metrics.last("tokens_generated_total"))),
        ("answers to held-out problems", run.evaluations.num_rows or None),
        ("hours, sum of the steps", took / 3600),
        ("hours of the last session, with what is saved", _hours(run)),
        ("device hours", device_hours(run)),
        ("energy, kWh", kwh),
    ]
    for part in PARTS:
        total = float(np.nansum(run.metrics[f"time/{part}"]))
        if total and took:
            rows.append((f"{part}: hours", total / 3600))
    note = (
        "Hours are those of the steps in metrics.jsonl: steps that a resumed run did again are counted once; writing samples and "
    )
    note += "checkpoints, loading and the warm start are not in them. " + energy(run)[1]
    return Table("provenance/cost", "What it cost", ("what", "value"), tuple(rows), note)


def _time(run: Run) -> tuple[Figure, ...]:
    steps = run.metrics.step[run.metrics.step > 0].tolist()
    if not steps or not run.metrics.has("time/step"):
        return ()
    series = []
    for part in PARTS:
        took = run.metrics[f"time/{part}"][run.metrics.step > 0]
        if np.isfinite(took).any():
            series.append(Series(part, steps, np.nan_to_num(took).tolist()))
    whole = Series("step", steps, run.metrics["time/step"][run.metrics.step > 0].tolist())
    note = "Sampling and grading run beside the rest of the step before: the parts may add to more than the step."
    return (Figure("provenance/time", "Where a step's time goes", "line", "step", "seconds", (whole, *series), note=note),)


def _code(run: Run) -> Table:
    last: Mapping[str, Any] = run.sessions[-1] if run.sessions else {}
    rows = [(name, last.get(key)) for name, key in (("popo-jax", "code"), ("source", "source"), ("commit", "git"))]
    rows += [("python", last.get("python"))]
    rows += [(name, version) for name, version in dict(last.get("packages") or {}).items()]
    note = "commit: + means that files differed from it. Of the last session."
    return Table("provenance/code", "Code and packages", ("what", "version"), tuple(r for r in rows if r[1] is not None), note)


def _data(run: Run) -> Table:
    prints = run.fingerprints
    rows: list[tuple[Any, ...]] = [(f"fingerprint of {name}", value) for name, value in prints.items()]
    for i, task in enumerate(run.task_configs):
        own = task.get(task["name"])
        source = task.get("train_file") or (own.get("dataset") if isinstance(own, Mapping) else None) or "generated"
        rows.append((f"task {i}: {task.get('name')}", source))
    rows.append(("policy at the start", run.setting("policy.path") or "a warm start of a fresh policy"))
    rows.append(("seed", str(run.setting("seed"))))
    note = "Fingerprints change with the data, the prompt's template, the reward on fixed answers, the tokenizer."
    return Table("provenance/data", "Data, policy, seed", ("what", "value"), tuple(rows) if prints or run.config else (), note)


def _machine(run: Run) -> Table:
    last: Mapping[str, Any] = run.sessions[-1] if run.sessions else {}
    found = dict(last.get("devices") or {})
    rows = [("devices", f"{found.get('count')} x {found.get('kind')} ({found.get('platform')})" if found else None)]
    rows += [("processes", found.get("processes")), ("cpu", last.get("cpu")), ("cores", last.get("cores"))]
    rows += [("memory, GiB", last.get("memory_gb")), ("system", last.get("platform"))]
    return Table("provenance/machine", "Machine", ("what", "value"), tuple(r for r in rows if r[1] is not None))


def _sessions(run: Run) -> Table:
    columns = ("began", "from step", "commit", "devices", "command")
    rows = []
    for s in run.sessions:
        found, command = dict(s.get("devices") or {}), s.get("command")
        kind = f"{found.get('count')} x {found.get('kind')}" if found else None
        rows.append((s.get("began"), s.get("step"), s.get("git"), kind, " ".join(map(str, command or ()))))
    return Table("provenance/sessions", "Starts of the trainer", columns, tuple(rows))


def _settings(run: Run) -> Table:
    data = {k: v for k, v in run.config.items() if k != "fingerprints"}
    own = [{k: v for k, v in t.items() if k == t["name"] or not isinstance(v, Mapping)} for t in run.task_configs]
    rows = tuple(dotted(data | ({"tasks": own} if own else {})))
    return Table("provenance/settings", "Every setting", ("setting", "value"), rows)


def dotted(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting of a nested config; lists of sections by their number."""
    if isinstance(data, Mapping) and data:
        for k, v in data.items():
            yield from dotted(v, f"{prefix}.{k}" if prefix else str(k))
    elif isinstance(data, list) and any(isinstance(v, Mapping) for v in data):
        for i, v in enumerate(data):
            yield from dotted(v, f"{prefix}.{i}")
    else:
        yield prefix, data if isinstance(data, (int, float, str)) else str(data)


def _hours(run: Run) -> float | None:
    took = finite(run.summary.get("seconds"))
    return None if took is None else took / 3600


def _whole(x: float) -> int | None:
    return int(x) if np.isfinite(x) else None
