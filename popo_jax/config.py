"""Every setting of a run: frozen typed dataclasses, checked; algorithm presets in one table. Tasks' and models' have a file each.

`from_dict` builds a Config from nested plain data and refuses unknown keys with the nearest name; `rules.resolve` then
checks it and fills in what depends on other settings.
None means off, or "the default that depends on other settings" where a field says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from popo_jax import plain
from popo_jax.model_config import ModelConfig
from popo_jax.task_config import PoolConfig, TaskConfig
from popo_jax.types import UserError


@dataclass(frozen=True)
class Preset:
    """What an algorithm does with an ineffective slot, and how it weighs and clips."""

    slots: Literal["keep", "mask", "resample", "replay"]
    stores: Literal["nothing", "effective", "all"] = "nothing"
    order: Literal["priority", "newest", "kl"] = "priority"
    marked_fresh: bool = False
    around: Literal["proximal", "behaviour"] = "proximal"
    room: int = 4
    """Groups the buffer holds, in steps' prompts, unless `replay.capacity` says otherwise."""
    extra: int = 0
    """Further slots of a step, in its prompts, unless `replay.extra` says otherwise."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted settings the preset changes before the file and the command line do."""


OLDER = {"replay.min_age": 10, "replay.max_age": 40}

PRESETS: Mapping[str, Preset] = {
    "grpo": Preset("keep"),
    "grpo-filter": Preset("mask"),
    "dapo": Preset("resample"),
    "popo": Preset("replay", "effective"),
    "popo-ineff": Preset("replay", "all", "newest"),
    "popo-stale": Preset("replay", "effective", room=64, overrides=OLDER),
    "popo-pi-old": Preset("replay", "effective", marked_fresh=True),
    "popo-behav": Preset("replay", "effective", around="behaviour"),
    "popo-kl": Preset("replay", "effective", "kl"),
    "popo-plus": Preset(
        "replay",
        "effective",
        around="behaviour",
        room=64,
        extra=1,
        overrides=OLDER | {"selection.method": "mopps", "selection.prior_mean": "running"},
    ),
}
"""The last is ours, what won the study (benchmarks/study/RESULTS.md): older groups, as many slots again, the clip around the
behaviour policy, prompts by MoPPS."""


@dataclass(frozen=True)
class AlgorithmConfig:
    name: str = "popo"
    """A preset: grpo, grpo-filter, dapo, popo, popo-ineff, popo-stale, popo-pi-old, popo-behav, popo-kl, popo-plus."""
    advantages: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    effective_by: Literal["correct", "score"] = "correct"
    """What must vary for a group to be effective; `score` for policies that do not know the format yet."""
    max_rounds: int = 4
    """dapo: sampling rounds per step, the first included."""
    dead_steps: int = 10
    """Steps in a row without one fresh effective group that stop the run."""

    @property
    def preset(self) -> Preset:
        return PRESETS[self.name]


@dataclass(frozen=True)
class PolicyConfig:
    path: str | None = None
    """Folder of a checkpoint in Hugging Face's format, or a hub id; None: a fresh policy of shape `model`, warm-started."""


@dataclass(frozen=True)
class ChatConfig:
    """How a problem's text becomes a prompt."""

    template: bool | None = None
    """None: in the tokenizer's chat template where it has one; false: as it is, with the tokenizer's special tokens."""
    system: str | None = None
    """A system message before it."""
    thinking: bool | None = None
    """enable_thinking of the template (Qwen3); None: not given."""
    date: str | None = None
    """YYYY-MM-DD, the template's strftime_now (Llama 3.2); None: today, which a run keeps."""
    prefix: str = ""
    """What every response is begun with, e.g. "<think>\n"; graded with it."""


@dataclass(frozen=True)
class BatchConfig:
    prompts: int = 32
    """P, prompts per step."""
    group_size: int = 8
    """G, responses per prompt."""
    mini_batches: int = 1
    """Optimizer steps per batch; mini-batch m holds the slots s with s mod M == m."""
    micro_batch: int | Literal["auto"] | None = None
    """Rows per gradient accumulation; None: as many as make 32768 tokens a device, or 4096 on a CPU. auto: those, or as many as
    fit: fewer and fewer are tried until the compiled train step needs at most `memory_gb`."""
    memory_gb: float | None = None
    """GiB of a device that micro_batch auto may take; None: nine tenths of what the device has."""
    length_buckets: int | None = None
    """Lengths, up to 4, that a micro-batch's rows may be cut to: rows are sorted by length and padding beyond is not computed.
    One program, with as many branches. None: 4 for rows of 256 tokens and more, else 1."""


@dataclass(frozen=True)
class SampleConfig:
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_prompt_tokens: int = 32
    max_response_tokens: int = 16
    chunk: int = 16
    """Tokens decoded between two looks at which rows have ended."""
    max_rows: int | None = None
    """Rows decoded at once; None: all. The rest follow in waves of whole groups; no draw changes by it."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which prompts of the stream a step takes."""

    method: Literal["uniform", "mopps"] = "uniform"
    """uniform: the next ones; mopps: those whose success rate, drawn from its posterior, is nearest `target`."""
    candidates: int = 4
    """Times the prompts per step: how many are read from the stream to choose from; the others pass by."""
    decay: float = 0.5
    """What earlier counts of a prompt weigh when it is seen again; 1: never forgets."""
    prior: float = 2.0
    """Strength of the Beta prior, alpha + beta."""
    prior_mean: Literal["half", "running"] = "half"
    """half: one half, so that prompts never seen are tried first, as in MoPPS; running: the success rate of late."""
    target: float = 0.5


@dataclass(frozen=True)
class LossConfig:
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    """Bound on r for negative advantages, above 1; None: off."""
    aggregation: Literal["token", "sequence", "dr_grpo"] = "token"
    kl_coef: float = 0.0
    """Weight of the k3 divergence to the policy the run started from."""
    entropy_coef: float = 0.0
    overlong: Literal["keep", "mask"] = "keep"
    """mask: responses cut by the limit stay in the baseline and lose their place in the loss."""


@dataclass(frozen=True)
class WeightConfig:
    cap: float = 2.0
    level: Literal["token", "sequence"] = "token"
    correct_sampler: bool = False
    """Take the sampler's own log-probs as the behaviour policy's, on fresh rows too."""


@dataclass(frozen=True)
class ReplayConfig:
    capacity: int | None = None
    """Groups; None: 4 x prompts per step (64 x for popo-stale and popo-plus)."""
    min_age: int = 1
    """Updates since the group was sampled; at least 1."""
    max_age: int = 8
    max_uses: int = 4
    """How often one group may be replayed."""
    quality: Literal["uniform", "variance"] = "uniform"
    """uniform: pure recency, as in the paper; variance: 4 p (1 - p) of the group's accuracy p."""
    selection: Literal["top", "proportional"] = "top"
    half_life: float = 4.0
    """Updates in which priority halves; read with quality variance or selection proportional."""
    extra: int | None = None
    """Slots a step trains on beyond its fresh prompts, filled from the buffer alone; empty ones have zero weight. None: 0, with
    popo-plus as many as prompts."""
    candidates: int | None = None
    """popo-kl: how many of the newest groups are scored; None: 4 x prompts per step."""


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or down to 0 at the last step."""
    warmup_steps: int = 0
    """Train steps over which the learning rate rises from 0; a step's mini-batches share one rate."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Global norm."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of Adam's two moments between steps; bfloat16 halves their memory and is rounded by chance."""


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised warm start of a fresh policy on a generated teacher's answers."""

    steps: int = 600
    batch: int = 256
    learning_rate: float = 2e-3
    right: float = 0.33
    """Share of the teacher's answers that are right; the others are well-formed and miss the target."""
    seed: int = 0
    """Apart from the run's, so that runs with different seeds start from one policy."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10
    problems: int = 512
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    samples: int = 1
    """Responses per problem; more than one needs a temperature above 0."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 20
    keep_last: int = 2
    keep_best: int = 1
    """How many of the best by eval/accuracy are kept besides."""


@dataclass(frozen=True)
class ImagesConfig:
    """What a policy that sees is shown."""

    min_pixels: int | None = None
    """Images are scaled so that they have as many at least; None: as the policy was made for,"""
    max_pixels: int | None = None
    """and at most."""
    max_tokens: int | None = None
    """Of the images of one prompt; None: as many as a problem of the data has."""
    max_windows: int | None = None
    """Windows of the vision tower that the images of one prompt fill; None: as many as a problem of the data needs."""
    cache_mb: int = 512
    """MB that prepared images may take of a process' memory; others are read again when they are needed."""
    blind_eval: bool = True
    """Evaluate with the images in grey, too: what is right without seeing (eval/blind/accuracy)."""


@dataclass(frozen=True)
class MeshConfig:
    data: int | None = None
    """None: all devices that the other axes leave. A CPU is divided into as many devices as asked for; None: one a core, up to
    8, as far as they divide the rows of a mini-batch, for a policy of up to 100 MB."""
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 100
    run_dir: str | None = None
    """A new directory; None: runs/<task>-<algorithm>-s<seed>, numbered if taken."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides metrics.jsonl."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    tasks: tuple[TaskConfig, ...] = (TaskConfig(),)
    verifier: PoolConfig = PoolConfig()
    policy: PolicyConfig = PolicyConfig()
    chat: ChatConfig = ChatConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    batch: BatchConfig = BatchConfig()
    selection: SelectionConfig = SelectionConfig()
    sample: SampleConfig = SampleConfig()
    images: ImagesConfig = ImagesConfig()
    loss: LossConfig = LossConfig()
    weight: WeightConfig = WeightConfig()
    replay: ReplayConfig = ReplayConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def row_tokens(self) -> int:
        """T: tokens of a row, prompt and response limits together."""
        return self.sample.max_prompt_tokens + self.sample.max_response_tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that a micro-batch's rows may be cut to, ascending; the last is T. Round numbers, which kernels like."""
        T, n = self.row_tokens, self.batch.length_buckets or (4 if self.row_tokens >= 256 else 1)
        step = 128 if T >= 512 else 8
        return tuple(sorted({min(T, -(-T * k // (n * step)) * step) for k in range(1, n + 1)}))

    @property
    def micro_batches(self) -> int:
        """n, micro-batches of a mini-batch; 1 while `batch.micro_batch` is not decided."""
        micro = self.batch.micro_batch
        return self.rows // self.batch.mini_batches // micro if isinstance(micro, int) else 1

    @property
    def slots(self) -> int:
        """Groups a step trains on: its P prompts, and what `replay.extra` adds."""
        return self.batch.prompts + ((self.replay.extra or 0) if self.algorithm.preset.slots == "replay" else 0)

    @property
    def rows(self) -> int:
        """B, rows a step trains on: slots * G."""
        return self.slots * self.batch.group_size


def from_dict(data: Mapping[str, Any], where: str = "config") -> Config:
    """A Config from nested plain data (what YAML gives), preset applied under it, not yet resolved.

    Errors: UserError for an unknown key (with the nearest name), a wrong type, an unknown algorithm.
    """
    data = dict(data)
    if isinstance(data.get("algorithm"), str):
        data["algorithm"] = {"name": data["algorithm"]}
    section = data.get("algorithm", {})
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: algorithm must be a name or a mapping, got {section!r}")
    name = section.get("name", AlgorithmConfig.name)
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"{where}: algorithm must be one of {', '.join(PRESETS)}, got {name!r}{plain.nearest(name, PRESETS)}")
    return plain.build(Config, plain.merge(plain.nest(PRESETS[name].overrides), data), where)


def without_preset(data: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """A resolved run's data, to be repeated with algorithm `name`: without the settings that its preset or the run's decides."""
    section = data.get("algorithm")
    if name is None or not isinstance(section, Mapping) or name == section.get("name"):
        return dict(data)
    both = [PRESETS[n] for n in (name, str(section.get("name"))) if n in PRESETS]
    decided = {"replay.capacity", "replay.candidates", "replay.extra", *(k for p in both for k in p.overrides)}

    def rest(section: str, values: Any) -> Any:
        return {k: v for k, v in values.items() if f"{section}.{k}" not in decided} if isinstance(values, Mapping) else values

    return {section: rest(section, values) for section, values in data.items()}
