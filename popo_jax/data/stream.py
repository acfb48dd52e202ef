"""The prompt stream: problems -> token prompts, through grain. Its position is one global integer.

Prompt number i of a run is a function of (problems, seed, i) alone, so a position restores the stream exactly and any
process can read any part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from popo_jax import scenes
from popo_jax.data.chat import Chat
from popo_jax.data.pictures import Eyes, largest, standing
from popo_jax.scenes import Pixels, Scene, Sizes
from popo_jax.types import Prompt, UserError


@dataclass(frozen=True, eq=False)
class Source:
    """The problems of one task and how one becomes a prompt."""

    task: str
    weight: float
    problems: Sequence[Mapping[str, Any]]
    wording: Callable[[Mapping[str, Any]], str]
    """What is asked, before any chat template."""
    id: Callable[[Mapping[str, Any]], str]
    answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    chat: Chat
    eyes: Eyes | None = None
    """For a task with pictures."""
    slices: tuple[str, ...] = ()
    """Columns that prompts carry on."""

    def text(self, problem: Mapping[str, Any]) -> str:
        """What the policy reads; an image's tokens stand there once."""
        return self.chat.render(self.wording(problem), images=self.eyes is not None)

    def prompt(self, problem: Mapping[str, Any]) -> Prompt:
        text, begun = self.text(problem), self.chat.begun(self.wording(problem), images=self.eyes is not None)
        id_ = self.id(problem)
        tokens = self.chat.encode(text)
        if self.eyes is not None:
            where = standing(problem, f"task {self.task}, problem {id_}")
            tokens = self._spread(tokens, self.eyes.grids(problem, where), where)
        return Prompt(id_, self.task, text, tokens, self.answer(problem), begun, {k: _value(problem.get(k)) for k in self.slices})

    def scene(self, problem: Mapping[str, Any], where: str) -> Scene:
        """What the prompt shows, laid out for its tokens; of a task without pictures nothing. Errors: UserError."""
        v = self.chat.vision
        assert v is not None
        pixels = Pixels(np.zeros((0, 3 * v.patch**2), np.uint8), ())
        if self.eyes is not None:
            pixels = self.eyes.pixels(problem, where)
        return scenes.scene(pixels, self.prompt(problem).tokens, v)

    def check(self, limit: int, where: str) -> Sizes | None:
        """The most that a prompt's images need. Errors: UserError for the first problem whose prompt is empty or longer than
        `limit` tokens, or whose images are refused."""
        found: list[tuple[tuple[int, int], ...]] = []
        for i, tokens in enumerate(self.chat.encode_all([self.text(p) for p in self.problems])):
            at = standing(self.problems[i], f"{where}: problem {i + 1} ({self.id(self.problems[i])})")
            if self.eyes is not None:
                found.append(self.eyes.grids(self.problems[i], at))
                tokens = self._spread(tokens, found[-1], at)
            if not 1 <= len(tokens) <= limit:
                raise UserError(f"{at} must have a prompt of 1 to {limit} tokens (sample.max_prompt_tokens), got {len(tokens)}")
        return largest(found, self.eyes.v) if self.eyes is not None else None

    def _spread(self, tokens: np.ndarray, grids: Sequence[tuple[int, int]], where: str) -> np.ndarray:
        """With an image's token once for each of its cells."""
        assert self.eyes is not None
        v = self.eyes.v
        at = np.flatnonzero(tokens == v.image_token)
        if len(at) != len(grids):
            raise UserError(f"{where} must have a place in its prompt for each of its {len(grids)} images, got {len(at)}")
        times = np.ones(len(tokens), np.int64)
        times[at] = [scenes.cells(g, v) for g in grids]
        return np.repeat(tokens, times)


def _value(x: Any) -> str:
    """Of a column, as a slice is named; "none" where a row has none."""
    return "none" if x is None else ", ".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x)


class PromptStream:
    """Shuffled anew each epoch, tasks mixed by weight, endless, read ahead by worker threads.

    look: called with each prompt's task and id there, so that its images are ready when they are needed.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, look: Callable[[str, str], Any] | None = None):
        def reader(source: Source) -> Callable[[Mapping[str, Any]], Prompt]:
            def read(problem: Mapping[str, Any]) -> Prompt:
                prompt = source.prompt(problem)
                if look is not None:
                    look(prompt.task, prompt.id)
                return prompt

            return read

        parts = [grain.MapDataset.source(s.problems).seed(seed).shuffle().repeat(None).map(reader(s)) for s in sources]
        total = sum(s.weight for s in sources)
        mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=[s.weight / total for s in sources])
        self._iterator = iter(mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)))
        self._position = 0

    def __call__(self, position: int, n: int) -> list[Prompt]:
        """Prompts position .. position + n - 1."""
        if position != self._position:
            self._iterator.set_state({"next_index": position})
        self._position = position + n
        return [next(self._iterator) for _ in range(n)]


@dataclass(frozen=True, eq=False)
class Example:
    prompt: Prompt
    answer: str
    scene: Scene | None = None


class Examples(Protocol):
    """By index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Example: ...


def supervised(
    examples: Examples, chat: Chat, *, batch: int, T: int, seed: int, sizes: Sizes | None = None
) -> grain.IterDataset[dict[str, Any]]:
    """Examples -> endless batches of tokens i32 [batch, T] and answer_mask bool [batch, T], end token included; with `sizes`
    also what the rows show, `images`.

    Errors: UserError for an example longer than T tokens.
    """

    def lay_out(example: Example) -> tuple[np.ndarray, np.ndarray, Scene | None]:
        prompt, answer = example.prompt.tokens, chat.tokenizer.encode(example.answer)
        row = np.concatenate([prompt, answer, np.array(chat.tokenizer.eos_ids[:1], np.int32)])
        if len(row) > T:
            shown = (example.prompt.text, example.answer)
            raise UserError(f"an example must fit into {T} tokens (prompt and response limits), got {len(row)}: {shown}")
        position = np.arange(T)
        tokens = np.zeros(T, np.int32)
        tokens[: len(row)] = row
        return tokens, (position >= len(prompt)) & (position < len(row)), example.scene

    def together(rows: Sequence[tuple[np.ndarray, np.ndarray, Scene | None]]) -> dict[str, Any]:
        tokens, mask, seen = zip(*rows, strict=True)
        out: dict[str, Any] = {"tokens": np.stack(tokens), "answer_mask": np.stack(mask)}
        if sizes is None or chat.vision is None:
            return out
        return out | {"images": scenes.lay_out(seen, sizes, T, chat.vision)}

    laid = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None).map(lay_out).batch(batch, batch_fn=together)
    return laid.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
