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

from popo_jax.data.chat import Chat
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

    def text(self, problem: Mapping[str, Any]) -> str:
        """What the policy reads."""
        return self.chat.render(self.wording(problem))

    def prompt(self, problem: Mapping[str, Any]) -> Prompt:
        text, begun = self.text(problem), self.chat.begun(self.wording(problem))
        return Prompt(self.id(problem), self.task, text, self.chat.encode(text), self.answer(problem), begun)

    def check(self, limit: int, where: str) -> None:
        """Errors: UserError for the first problem whose prompt is empty or longer than `limit` tokens."""
        for i, tokens in enumerate(self.chat.encode_all([self.text(p) for p in self.problems])):
            if not 1 <= len(tokens) <= limit:
                raise UserError(
                    f"{where}: problem {i + 1} ({self.id(self.problems[i])}) must have a prompt of 1 to {limit} tokens "
                    f"(sample.max_prompt_tokens), got {len(tokens)}"
                )


class PromptStream:
    """Shuffled anew each epoch, tasks mixed by weight, endless, read ahead by worker threads."""

    def __init__(self, sources: Sequence[Source], *, seed: int):
        parts = [grain.MapDataset.source(s.problems).seed(seed).shuffle().repeat(None).map(s.prompt) for s in sources]
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


class Examples(Protocol):
    """(prompt, answer) by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[str, str]: ...


def supervised(examples: Examples, chat: Chat, *, batch: int, T: int, seed: int) -> grain.IterDataset[dict[str, np.ndarray]]:
    """(prompt, answer) pairs -> endless batches of tokens i32 [batch, T] and answer_mask bool [batch, T], end token included.

    Errors: UserError for an example longer than T tokens.
    """

    def lay_out(example: tuple[str, str]) -> dict[str, np.ndarray]:
        prompt, answer = chat.encode(example[0]), chat.tokenizer.encode(example[1])
        row = np.concatenate([prompt, answer, np.array(chat.tokenizer.eos_ids[:1], np.int32)])
        if len(row) > T:
            raise UserError(f"an example must fit into {T} tokens (prompt and response limits), got {len(row)}: {example}")
        position = np.arange(T)
        tokens = np.zeros(T, np.int32)
        tokens[: len(row)] = row
        return {"tokens": tokens, "answer_mask": (position >= len(prompt)) & (position < len(row))}

    laid = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None).map(lay_out).batch(batch)
    return laid.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
