"""What a plan holds: memory and rooflines of compiled programs, whether they fit, and what would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from popo_jax.config import Config
from popo_jax.costs import arithmetic
from popo_jax.costs.chips import Chip
from popo_jax.costs.count import Collective, Count
from popo_jax.model_config import ModelConfig


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip while a program runs."""

    arguments: float = 0.0
    """Without the KV cache."""
    cache: float = 0.0
    temporaries: float = 0.0
    """Results that take no argument's place are among them."""
    code: float = 0.0
    resident: float = 0.0
    """What lies there besides: the train state while the sampler runs, the reference policy."""

    @property
    def total(self) -> float:
        return self.arguments + self.cache + self.temporaries + self.code + self.resident


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a chip is needed for at least, all else for nothing: an estimate from below."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def limit(self) -> str:
        return max(asdict(self), key=lambda name: float(getattr(self, name)))


def roofline(c: Count, chip: Chip) -> Roofline:
    return Roofline(c.flops / chip.flops, c.bytes / chip.hbm_speed, sum(map(sent, c.collectives)) / chip.link_speed)


def sent(c: Collective) -> float:
    """Bytes that leave a device, in a ring: a reduction of everything is scattered, then gathered."""
    part = (c.group - 1) / c.group if c.group else 1.0  # 0: all devices, however many
    rounds = {"all-reduce": 2.0 * part, "collective-permute": 1.0}
    return c.bytes * c.times * rounds.get(c.kind, part)


@dataclass(frozen=True)
class Program:
    """A program of one chip, compiled; or that it is too large to be."""

    memory: Memory
    counted: Count | None = None
    """Of a step of training, or of one token of each row in decoding; None where it does not matter or did not compile."""


@dataclass
class Plan:
    topology: str
    chip: Chip
    chips: int
    c: Config
    """With its mesh and micro-batch decided."""
    model: ModelConfig
    programs: dict[str, Program]
    """train, cast, prefill, decode, take; those after one that does not compile are missing."""
    largest: dict[str, int] = field(default_factory=dict)
    """Setting -> the largest value with which its program fits, all else as it is."""
    advice: list[str] = field(default_factory=list)
    """Single changes, each compiled, with which everything fits."""
    seconds: float = 0.0
    """That planning took."""

    @property
    def fits(self) -> bool:
        return fit(self.programs.values(), self.chip)

    @property
    def tokens(self) -> int:
        """Of a batch whose rows are all as long as can be."""
        return self.c.rows * self.c.row_tokens

    @property
    def parameters(self) -> int:
        """N: weights that every token is multiplied with, the head among them, the embedding table not."""
        return arithmetic.weights(self.model) + arithmetic.head(self.model)

    @property
    def model_flops(self) -> int:
        """Of a step, all chips together: 6ND and attention, and another 2ND for the log-probs at the start where several
        mini-batches follow. With LoRA, whose frozen weights need no gradient of their own, it is more than is computed."""
        c = self.c
        how = {"mini_batches": c.batch.mini_batches, "windows": self.windows}
        return arithmetic.train(self.model, rows=c.rows, tokens=c.row_tokens, **how)

    @property
    def windows(self) -> int:
        """Of the vision tower that each row's images fill at most."""
        return (self.c.images.max_windows or 0) if self.model.sees else 0

    @property
    def model_flops_with_remat(self) -> int:
        """8ND: with all activations computed again in the backward pass, if the config has it so."""
        again = arithmetic.forward(self.model, rows=self.c.rows, tokens=self.c.row_tokens)
        again += self.c.rows * arithmetic.seen(self.model, windows=self.windows) if self.windows else 0
        return self.model_flops + (again if self.c.model.remat == "full" else 0)


def wave(c: Config) -> int:
    """Prompts that are sampled at once."""
    rows = c.sample.max_rows or c.batch.prompts * c.batch.group_size
    return min(c.batch.prompts, max(rows // c.batch.group_size, 1))


def fit(programs: Iterable[Program], chip: Chip) -> bool:
    return all(p.memory.total <= chip.hbm_bytes for p in programs)
