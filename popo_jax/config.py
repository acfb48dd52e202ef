"""Every setting of a run: frozen typed dataclasses, checked; algorithm presets in one table.

`from_dict` builds a Config from nested plain data and refuses unknown keys with the nearest name; `rules.resolve` then
checks it and fills in what depends on other settings.
None means off, or "the default that depends on other settings" where a field says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from popo_jax import plain
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
class CountdownConfig:
    """Countdown problems: reach the target with + - * / from all the numbers, each used once. Generated where no files are."""

    prompt: str = "{nums} -> {target}:"
    """What the policy is asked, with the problem's numbers and target in place of {nums} and {target}."""
    numbers: tuple[int, ...] = (3,)
    """How many numbers a problem has, e.g. 3 4 for a mix."""
    low: int = 1
    high: int = 9
    target_low: int = 1
    target_high: int = 99
    train_problems: int = 20000
    eval_problems: int = 512
    """Held out: their sorted numbers and target never occur in training."""
    seed: int = 0
    """Seed of the problems, apart from the run's, so that runs with different seeds share their problems."""


@dataclass(frozen=True)
class ArithmeticConfig:
    """Generated arithmetic problems: the value of an expression such as 7+8*3."""

    terms: int = 3
    """Numbers in an expression."""
    low: int = 0
    high: int = 9
    operators: str = "+-"
    """Some of the signs + - *."""
    train_problems: int = 20000
    eval_problems: int = 512
    """Held out: they never occur in training."""
    seed: int = 0
    """Seed of the problems, apart from the run's."""


@dataclass(frozen=True)
class MathConfig:
    """Mathematics problems of `train_file`, or of a data set on the hub; with neither, generated word problems."""

    dataset: str | None = None
    """Its id, or a local folder, for the `datasets` library, e.g. agentica-org/DeepScaleR-Preview-Dataset; the files win."""
    dataset_name: str | None = None
    """Its configuration, e.g. main for openai/gsm8k."""
    train_split: str = "train"
    eval_split: str | None = None
    """None: `eval_problems` of the training ones are held out."""
    problem_column: str | None = None
    """None: problem or question, whichever is there."""
    answer_column: str | None = None
    """None: answer or solution. The answer is what follows "####", or stands in the last \\boxed{}, or all of it."""
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """Put below the problem; empty for none."""
    eval_problems: int = 512
    """Held out where no file or split is: chosen by a seeded hash of the problem."""
    seed: int = 0
    """Of what is held out, and of generated problems; apart from the run's."""
    train_problems: int = 20000
    """Generated ones."""
    steps: int = 2
    """Operations in a generated problem, up to 3."""
    high: int = 20
    """The largest number in one, up to 99."""


@dataclass(frozen=True)
class TaskConfig:
    name: Literal["countdown", "arithmetic", "math"] = "countdown"
    weight: float = 1.0
    """Share of the prompts, relative to the other tasks."""
    train_file: str | None = None
    """JSONL or parquet of problems; None: generated."""
    eval_file: str | None = None
    verifier: str | None = None
    """Your own instead of the task's: "my_module:grade", importable from the current directory or PYTHONPATH. Called as
    grade(response, **answer fields) in a worker process; answers a popo_jax.types.Verdict, a number in [0, 1] (score and
    correct both), or a pair (score, correct)."""
    countdown: CountdownConfig = CountdownConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    math: MathConfig = MathConfig()


TASK_NAMES: tuple[str, ...] = get_args(get_type_hints(TaskConfig)["name"])
UNBOUNDED: Mapping[str, str] = {"math": "popo_jax.tasks.mathematics:grade"}
"""Tasks whose verifier may take any time and memory, and where worker processes find it."""


@dataclass(frozen=True)
class PoolConfig:
    """The worker processes that grade mathematics, and what your own verifiers grade."""

    workers: int | None = None
    """None: one a core."""
    seconds: float = 5.0
    """Wall-clock limit of one response; it is tried twice, then has score 0."""
    memory_gb: float = 2.0
    """Address space of a worker, in GiB."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length a model was first trained on."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_positions: int = 8192
    """Length before stretching; llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_positions / low are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: those below original_positions / high not at all."""
    beta_fast: float = 32.0
    """yarn: rotations over the original length above which a dimension keeps its frequency."""
    beta_slow: float = 1.0
    """yarn: and below which it is stretched in full."""
    truncate: bool = True
    """yarn: round the two bounds to whole dimensions."""
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; None: 0.1 ln(factor) + 1."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights: x w + alpha / rank * (x a) b (arXiv:2106.09685)."""

    rank: int | None = None
    """None: off, every weight is trained."""
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Linear layers of a block that have adapters."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and precision of a decoder. With `policy.path` the shape comes from there."""

    family: Literal["qwen2", "qwen3", "llama", "mistral"] = "qwen2"
    """Whose architecture and checkpoint format: qwen3 norms queries and keys."""

    vocab_size: int | None = None
    """None: the tokenizer's."""
    layers: int = 3
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_positions: int = 32768
    """Longest sequence the model was made for."""
    window: int | None = None
    """Tokens a query sees, itself included; None: all before it. mistral."""
    rms_eps: float = 1e-6
    attention_bias: bool = True
    """Of queries, keys and values; with qwen3 and llama of the output too."""
    mlp_bias: bool = False
    """llama."""
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, whole blocks."""
    linear: Literal["auto", "plain", "barrier"] = "auto"
    """How the backward of a linear layer is scheduled; auto: barrier on CPU (same numbers, faster), else plain."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Of whole rows, in training: xla keeps all scores; cudnn (a GPU, bfloat16) and splash (a TPU) are flash kernels. auto: the
    flash kernel where there is one for the platform and dtype is bfloat16, else xla."""
    head_chunk: int | None = None
    """Positions whose logits exist at once in training, computed again for the gradient; None: all where that is at most
    0.5 GB a device, else as many as make so much."""

    lora: LoraConfig = LoraConfig()

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.family in ("qwen3", "llama")


MODEL_HOW = ("dtype", "param_dtype", "remat", "linear", "attention", "lora", "head_chunk")
"""Fields of ModelConfig that say how to compute; the others are a checkpoint's shape."""


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
    """Rows per gradient accumulation; None: a whole mini-batch at once, on a CPU as many rows as make 4096 tokens. auto: the most
    for which the compiled train step fits into `memory_gb`."""
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
