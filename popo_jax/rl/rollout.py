"""Prompts -> responses -> graded groups. Advantages are computed here, once, right after grading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from popo_jax.config import Config
from popo_jax.ops.advantages import group_advantages
from popo_jax.rl.state import Purpose, key_for
from popo_jax.sampling.sampler import SampleFn
from popo_jax.scenes import Scene
from popo_jax.types import EPSILON, Group, Prompt, Responses, Signal, UserError, Verdict

MAX_VERIFIER_ERRORS = 0.01
"""Share of a step's responses whose verifier may raise before the run stops."""

GradeFn = Callable[[Sequence[tuple[str, str, Any]]], list[Verdict]]
"""(task, response text, answer fields) of every row -> verdicts, in order."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """What one step sampled: `slots` fill the batch's P places, `groups` are all that was sampled, in order."""

    slots: tuple[Group, ...]
    groups: tuple[Group, ...]
    prompts: tuple[Prompt, ...]
    """Of `groups`."""
    position: int
    """Of the data stream, after this step's prompts."""
    seconds: dict[str, float]
    """`time/sample` and `time/grade`."""


@dataclass(frozen=True, eq=False)
class Collector:
    """Samples and grades one step's groups. Holds what that needs and no state."""

    c: Config
    sample: SampleFn
    grade: GradeFn
    decode: Callable[[np.ndarray], str]
    prompts: Callable[[int, int], list[Prompt]]
    """(position, n) -> the n prompts from there on."""
    reference: Callable[[list[Group]], list[Group]] | None
    """Adds logp_ref to fresh groups, if the loss has a KL term."""
    choose: Callable[..., list[int]] | None
    """(candidates, n, *, step, round_) -> indices of the n prompts to take, ascending; None: the stream's next ones."""
    timer: Callable[[], Any]
    """A new clock: `with clock(section):`, `clock.take()`. One a step, since steps overlap in time."""
    scenes: Callable[[Sequence[Prompt]], list[Scene]] | None = None
    """What prompts show, for a policy that sees."""

    def __call__(self, params: Any, step: int, position: int) -> Rollout:
        """Groups of train step `step` (updates applied so far), from data position `position` on."""
        jax.block_until_ready(params)  # so that waiting for the update is not counted as sampling
        P, resample = self.c.batch.prompts, self.c.algorithm.preset.slots == "resample"
        groups: list[Group] = []
        prompts: list[Prompt] = []
        clock = self.timer()
        for round_ in range(self.c.algorithm.max_rounds if resample else 1):
            new, ids, position = self._next(position, P, step, round_)
            groups += self._round(params, new, ids, step, round_, clock)
            prompts += new
            if sum(g.effective for g in groups) >= P:
                break
        slots = choose_slots(groups, P) if resample else groups
        seconds = {k: v for k, v in clock.take().items() if k.startswith("time/")}
        return Rollout(tuple(slots), tuple(groups), tuple(prompts), position, seconds)

    def _next(self, position: int, P: int, step: int, round_: int) -> tuple[list[Prompt], list[int], int]:
        """(the round's P prompts, their positions in the stream, the position after everything read)."""
        if self.choose is None:
            return self.prompts(position, P), list(range(position, position + P)), position + P
        read = P * self.c.selection.candidates
        candidates = self.prompts(position, read)
        chosen = self.choose(candidates, P, step=step, round_=round_)
        return [candidates[i] for i in chosen], [position + i for i in chosen], position + read

    def _round(self, params: Any, prompts: list[Prompt], ids: list[int], step: int, round_: int, clock: Any) -> list[Group]:
        """A group's id is its prompt's position in the stream: unique in a run, whatever is changed on resume."""
        key = key_for(self.c.seed, Purpose.SAMPLE, step, round_)
        with clock("sample"):
            seen: dict[str, Any] = {} if self.scenes is None else {"scenes": self.scenes(prompts)}
            responses = self.sample(params, [p.tokens for p in prompts], key, version=step, **seen)
        with clock("grade"):
            groups = grade_groups(prompts, responses, self.grade, self.decode, c=self.c, ids=ids)
        return self.reference(groups) if self.reference else groups


def choose_slots(groups: Sequence[Group], P: int) -> list[Group]:
    """dapo: the first P effective groups in slot order; places still empty keep an ineffective group, to be masked."""
    chosen = [i for i, g in enumerate(groups) if g.effective][:P]
    rest = [i for i, g in enumerate(groups) if not g.effective][: P - len(chosen)]
    return [groups[i] for i in sorted(chosen + rest)]


def grade_groups(
    prompts: Sequence[Prompt],
    responses: Responses,
    grade: GradeFn,
    decode: Callable[[np.ndarray], str],
    *,
    c: Config,
    ids: Sequence[int],
) -> list[Group]:
    """P graded groups, advantages computed. Errors: UserError when more than 1 % of the verifiers' calls raised."""
    P, G = len(prompts), len(responses.tokens) // len(prompts)
    lengths = responses.sampled_mask.sum(axis=1)
    texts = [decode(row[:n]) for row, n in zip(responses.tokens, lengths, strict=True)]
    of = [prompts[i // G] for i in range(len(texts))]
    verdicts = grade([(p.task, p.begun + text, p.answer) for p, text in zip(of, texts, strict=True)])
    _refuse_broken_verifier(prompts, verdicts, G)
    score = np.array([v.score for v in verdicts], np.float32).reshape(P, G)
    correct = np.array([v.correct for v in verdicts], np.float32).reshape(P, G)
    adv = np.asarray(group_advantages(score, kind=c.algorithm.advantages), np.float32)
    groups = []
    for p, prompt in enumerate(prompts):
        rows = slice(p * G, (p + 1) * G)
        reasons = tuple(v.reason for v in verdicts[rows])
        g = _group(prompt, responses, rows, lengths[rows], ids[p], c.loss.overlong == "mask")
        g = replace(g, score=score[p], correct=correct[p], adv=adv[p], texts=tuple(texts[rows]), reasons=reasons)
        groups.append(replace(g, signal=signal_of(g, by=c.algorithm.effective_by)))
    return groups


def signal_of(g: Group, *, by: str) -> Signal:
    """Effective: `by` varies by more than 1e-6, all scores are finite, a row with a non-zero advantage is counted."""
    if not (np.isfinite(g.score).all() and np.isfinite(g.correct).all()):
        return "invalid"
    values = g.correct if by == "correct" else g.score
    row = np.repeat(np.arange(len(g.lengths)), g.lengths)
    counted = np.bincount(row[g.token_mask], minlength=len(g.lengths)) > 0
    if values.max() - values.min() > EPSILON and (counted & (g.adv != 0)).any():
        return "effective"
    if (g.correct >= 1 - EPSILON).all():
        return "all_right"
    return "all_wrong" if (g.correct <= EPSILON).all() else "invalid"


def _group(prompt: Prompt, responses: Responses, rows: slice, lengths: np.ndarray, id_: int, mask_overlong: bool) -> Group:
    """Ragged rows of one prompt; scores, advantages and signal are filled in by the caller."""
    n, G = len(prompt.tokens), len(lengths)
    ended = responses.ended[rows]
    kept = np.arange(responses.tokens.shape[1]) < lengths[:, None]

    def rag(values: np.ndarray, prefix: np.ndarray) -> np.ndarray:
        whole = np.concatenate([np.broadcast_to(prefix, (G, n)), values[rows]], axis=1)
        return whole[np.concatenate([np.ones((G, n), bool), kept], axis=1)].astype(values.dtype)

    sampled = rag(responses.sampled_mask, np.zeros(n, bool))
    keep_row = np.repeat(ended, lengths + n) if mask_overlong else True
    zeros = np.zeros(G, np.float32)
    return Group(
        id=id_,
        prompt_id=prompt.id,
        task=prompt.task,
        version=responses.version,
        signal="invalid",
        lengths=(lengths + n).astype(np.int32),
        tokens=rag(responses.tokens, prompt.tokens),
        sampled_mask=sampled,
        token_mask=sampled & keep_row,
        logp_sampler=rag(responses.logp, np.zeros(n, np.float32)),
        score=zeros,
        correct=zeros,
        adv=zeros,
        ended=ended.copy(),
    )


def _refuse_broken_verifier(prompts: Sequence[Prompt], verdicts: Sequence[Verdict], G: int) -> None:
    broken = [i for i, v in enumerate(verdicts) if not np.isfinite(v.score)]
    if len(broken) > MAX_VERIFIER_ERRORS * len(verdicts):
        i = broken[0]
        raise UserError(
            f"the verifier of task {prompts[i // G].task} failed on {len(broken)} of {len(verdicts)} responses in one step, "
            f"first on prompt {prompts[i // G].id}: {verdicts[i].reason}"
        )


def overall(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of everything a step sampled: `reward/mean`, `accuracy/train`, `groups/*`, per task beside the mean."""
    scores, correct = (np.concatenate([getattr(g, name) for g in groups]) for name in ("score", "correct"))
    sampled = [g.sampled_mask.sum() for g in groups]
    rows = sum(len(g.lengths) for g in groups)
    out = {"reward/mean": _mean(scores), "accuracy/train": _mean(correct)}
    out |= {
        f"groups/{s}": float(np.mean([g.signal == s for g in groups])) for s in ("effective", "all_right", "all_wrong", "invalid")
    }
    out |= {
        "response/length": float(sum(sampled)) / rows,
        "response/truncated": 1 - float(sum(g.ended.sum() for g in groups)) / rows,
    }
    for task in sorted({g.task for g in groups}):
        out[f"accuracy/{task}/train"] = _mean(np.concatenate([g.correct for g in groups if g.task == task]))
    return out


def _mean(x: np.ndarray) -> float:
    finite = x[np.isfinite(x)]
    return float(finite.mean()) if len(finite) else float("nan")


def reference_scorer(
    score: Callable[..., jax.Array],
    T: int,
    rows: int,
    shown: Callable[[Sequence[Group], int, int], Any] | None = None,
) -> Callable[[list[Group]], list[Group]]:
    """Adds `logp_ref` to groups: lays their rows out [rows, T], calls `score`, cuts the result back. shown: (groups, T, rows) ->
    what the rows see, which `score` takes as well."""

    def add(groups: list[Group]) -> list[Group]:
        seen = () if shown is None else (shown(groups, T, rows),)
        logp = np.asarray(score(lay_out(groups, T, rows), *seen), np.float32)
        G = len(groups[0].lengths)
        return [replace(g, logp_ref=cut(logp[i * G : (i + 1) * G], g) * g.sampled_mask) for i, g in enumerate(groups)]

    return add


def lay_out(groups: Sequence[Group], T: int, rows: int) -> np.ndarray:
    """Tokens [rows, T] of the groups' rows from the top, padding below."""
    out = np.zeros((rows, T), np.int32)
    lengths = np.concatenate([g.lengths for g in groups])
    out[: len(lengths)][np.arange(T) < lengths[:, None]] = np.concatenate([g.tokens for g in groups])
    return out


def cut(values: np.ndarray, g: Group) -> np.ndarray:
    """Flat [N] of g's rows from [G, T]."""
    return values[np.arange(values.shape[1]) < g.lengths[:, None]]


def divergences(groups: Sequence[Group], logp: np.ndarray) -> dict[int, float]:
    """Group id -> mean over its counted tokens of exp(d) - 1 - d, d = logp now - logp_behav; logp [rows, T] as laid out."""
    out, G = {}, len(groups[0].lengths)
    for i, g in enumerate(groups):
        assert g.logp_behav is not None  # stored groups have it
        d = np.clip(cut(logp[i * G : (i + 1) * G], g) - g.logp_behav, -20, 20)[g.token_mask]
        out[g.id] = float(np.mean(np.exp(d) - 1 - d)) if len(d) else float("inf")
    return out
