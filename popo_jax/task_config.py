"""Settings of the tasks: which problems, and what their verifiers may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


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
class GeometryConfig:
    """Geometry problems with pictures: of `train_file`, or of a data set on the hub; with neither, drawn figures."""

    dataset: str | None = None
    """Its id, or a local folder, for the `datasets` library, e.g. hiyouga/geometry3k; the files win."""
    dataset_name: str | None = None
    """Its configuration."""
    train_split: str = "train"
    eval_split: str | None = None
    """None: `eval_problems` of the training ones are held out."""
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """Put below the problem; empty for none."""
    tolerance: float = 1e-3
    """Relative error up to which a number counts as the answer, unless both are whole numbers or fractions. A decimal that is the
    answer rounded counts as well, if half a unit of its last digit is at most 1 % of the answer."""
    format_score: float = 0.1
    """Score of a wrong answer that stands in \\boxed{}, in [0, 1)."""
    eval_problems: int = 512
    """Held out where no file or split is. Drawn ones: their figure and numbers never occur in training, however moved."""
    seed: int = 0
    """Of what is held out, and of drawn problems; apart from the run's."""
    train_problems: int = 20000
    """Drawn ones."""
    kinds: tuple[str, ...] = ("triangle", "angle", "parallel", "circle", "length", "right")
    """Figures to draw, in equal shares: two angles of a triangle; angles on a line or in a corner; parallels and a transversal;
    inscribed and central angle, radius and diameter; a segment of two parts; a right triangle with whole sides."""
    low: int = 20
    """The smallest number that is drawn from, at least 1: of angles in degrees, of lengths."""
    high: int = 80
    """The largest, up to 99."""
    step: int = 1
    """Between the numbers: 10 gives 20 30 ... 80. Sides of a right triangle are any whole ones up to 99."""
    size: int = 56
    """Pixels of a side of the image, at least 56, where a digit has 5 x 7 in a cell of 8 x 8."""
    jitter: int = 0
    """How far a figure may be moved and turned, in 56ths of the side and in degrees, up to 4; 0: every digit in a fixed cell."""


@dataclass(frozen=True)
class TaskConfig:
    name: Literal["countdown", "arithmetic", "math", "geometry"] = "countdown"
    weight: float = 1.0
    """Share of the prompts, relative to the other tasks."""
    train_file: str | None = None
    """JSONL or parquet of problems; None: generated."""
    eval_file: str | None = None
    verifier: str | None = None
    """Your own instead of the task's: "my_module:grade", importable from the current directory or PYTHONPATH. Called as
    grade(response, **answer fields) in a worker process; answers a popo_jax.types.Verdict, a number in [0, 1] (score and
    correct both), or a pair (score, correct)."""
    slices: tuple[str, ...] = ()
    """Columns of the data (level, topic, language, source) that samples/ and evaluations/ carry on, so that `popo report` tells
    what was trained on and who gained. Generated problems have: countdown `size`, arithmetic `signs`, geometry `kind`."""
    countdown: CountdownConfig = CountdownConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    math: MathConfig = MathConfig()
    geometry: GeometryConfig = GeometryConfig()


TASK_NAMES: tuple[str, ...] = get_args(get_type_hints(TaskConfig)["name"])
PICTURED = ("geometry",)
"""Tasks whose problems have pictures, for a policy that sees."""
UNBOUNDED: Mapping[str, str] = {"math": "popo_jax.tasks.mathematics:grade", "geometry": "popo_jax.tasks.geometry:grade"}
"""Tasks whose verifier may take any time and memory, and where worker processes find it."""


@dataclass(frozen=True)
class PoolConfig:
    """The worker processes that grade mathematics, geometry, and what your own verifiers grade."""

    workers: int | None = None
    """None: one a core."""
    seconds: float = 5.0
    """Wall-clock limit of one response; it is tried twice, then has score 0."""
    memory_gb: float = 2.0
    """Address space of a worker, in GiB."""
