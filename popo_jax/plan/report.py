"""A plan as JSON and as tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from popo_jax.costs.count import Count
from popo_jax.plan.figures import Plan, roofline, sent, wave

GIB = 2.0**30


def as_json(p: Plan) -> dict[str, Any]:
    """Bytes, FLOPs and seconds of one chip, but for what is named otherwise."""
    c = p.c
    return {
        "topology": p.topology,
        "chip": asdict(p.chip),
        "chips": p.chips,
        "mesh": {"data": p.chips // (c.mesh.fsdp * c.mesh.tensor), "fsdp": c.mesh.fsdp, "tensor": c.mesh.tensor},
        "rows": c.rows,
        "row_tokens": c.row_tokens,
        "batch.micro_batch": c.batch.micro_batch,
        "sample.max_rows": wave(c) * c.batch.group_size,
        "attention": p.model.attention,
        "parameters_multiplied": p.parameters,
        "fits": p.fits,
        "largest": p.largest,
        "advice": p.advice,
        "memory": {name: asdict(program.memory) | {"total": program.memory.total} for name, program in p.programs.items()},
        "train": _train(p),
        "decode": _decode(p),
        "seconds": p.seconds,
    }


def _train(p: Plan) -> dict[str, Any] | None:
    counted = p.programs["train"].counted
    if counted is None:
        return None
    roof, model = roofline(counted, p.chip), p.model_flops / p.chips
    return {
        "model_flops": model,
        "model_flops_with_remat": p.model_flops_with_remat / p.chips,
        "hardware_flops": counted.flops,
        "matmul_flops": counted.matmul,
        "kernel_flops": counted.kernels,
        "bytes": counted.bytes,
        "collectives": _collectives(counted),
        "host_transfers": counted.host,
        "roofline": asdict(roof) | {"seconds": roof.seconds, "limit": roof.limit},
        "tokens_per_second": p.tokens / roof.seconds,
        "model_flop_utilisation_at_most": model / p.chip.flops / roof.seconds,
    }


def _decode(p: Plan) -> dict[str, Any] | None:
    program = p.programs.get("decode")
    if program is None or program.counted is None:
        return None
    roof, rows = roofline(program.counted, p.chip), wave(p.c) * p.c.batch.group_size
    return {
        "flops": program.counted.flops,
        "bytes": program.counted.bytes,
        "collectives": _collectives(program.counted),
        "roofline": asdict(roof) | {"seconds": roof.seconds, "limit": roof.limit},
        "rows": rows,
        "tokens_per_second": rows / roof.seconds,
    }


def _collectives(c: Count) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, int], Counter[str]] = {}
    for x in c.collectives:
        kinds.setdefault((x.kind, x.group), Counter()).update(times=x.times, bytes=x.bytes * x.times, sent=sent(x))  # type: ignore[call-overload]
    return [{"kind": kind, "group": group} | dict(n) for (kind, group), n in sorted(kinds.items())]


def show(p: Plan, console: Console) -> None:
    d = as_json(p)
    mesh = " x ".join(f"{k} {v}" for k, v in d["mesh"].items())
    console.print(
        f"{p.topology}: {p.chips} chips, {mesh}; {p.parameters / 1e9:.2f} G parameters multiplied, "
        f"{p.c.rows} rows of {p.c.row_tokens} tokens, {p.c.batch.micro_batch} at once trained, {d['sample.max_rows']} sampled, "
        f"attention {p.model.attention}"
    )
    console.print(_memory_table(p))
    if d["train"]:
        console.print(_work_table(d))
        console.print(_collective_table(d))
    verdict = "It fits." if p.fits else "It does not fit."
    tried = ", or ".join(p.advice) if p.advice else "no single change that was tried makes it fit: more chips, or shorter rows"
    console.print(verdict if p.fits else f"{verdict} With one change it does: {tried}" if p.advice else f"{verdict} {tried}.")
    most = ", ".join(f"{name} {n}" for name, n in p.largest.items())
    console.print(f"Largest that fit, each alone: {most or 'none'}. Planned in {p.seconds:.0f} s.")


def _memory_table(p: Plan) -> Table:
    table = Table(title=f"GiB of a chip, of {p.chip.hbm_bytes / GIB:.2f}", title_justify="left")
    for name in ("", "arguments", "KV cache", "temporaries", "code", "resident", "total"):
        table.add_column(name, justify="right")
    for name, program in p.programs.items():
        m = program.memory
        parts = (m.arguments, m.cache, m.temporaries, m.code, m.resident, m.total)
        table.add_row(name, *(f"{x / GIB:.2f}" for x in parts), style=None if m.total <= p.chip.hbm_bytes else "red")
    return table


def _work_table(d: dict[str, Any]) -> Table:
    table = Table(title="at best (rooflines; every row as long as can be)", title_justify="left")
    for name in ("", "TFLOP", "model's TFLOP", "GB", "compute s", "memory s", "links s", "limit", "tokens/s, all chips"):
        table.add_column(name, justify="right")
    t = d["train"]
    model = f"{t['model_flops'] / 1e12:.0f} ({t['model_flops_with_remat'] / 1e12:.0f} with remat)"
    rows = [("train step", t, t["hardware_flops"], model)]
    rows += [("decoded token", d["decode"], d["decode"]["flops"], "")] if d["decode"] else []
    for name, x, flops, told in rows:
        r = x["roofline"]
        times = (f"{r[k]:.3g}" for k in ("compute", "memory", "links"))
        table.add_row(
            name, f"{flops / 1e12:.3g}", told, f"{x['bytes'] / 1e9:.3g}", *times, r["limit"], f"{x['tokens_per_second']:,.0f}"
        )
    return table


def _collective_table(d: dict[str, Any]) -> Table:
    table = Table(title="collectives", title_justify="left")
    for name in ("", "kind", "devices", "times", "GB", "GB sent by a chip"):
        table.add_column(name, justify="right")
    for name in ("train", "decode"):
        for x in d[name]["collectives"] if d[name] else ():
            table.add_row(
                name,
                x["kind"],
                str(x["group"] or "all"),
                f"{x['times']:.0f}",
                f"{x['bytes'] / 1e9:.2f}",
                f"{x['sent'] / 1e9:.2f}",
            )
    return table
