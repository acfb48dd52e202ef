"""The run directory: what a run leaves on disk, how it is opened anew or resumed, and what a checkpoint must agree with.

RUN/config.yaml  sessions.jsonl  metrics.jsonl  samples/  replays/  evaluations/  checkpoints/N/  policy/  summary.json
discarded/
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from popo_jax import plain
from popo_jax.config import Config
from popo_jax.runtime.writers import MetricsFile, ParquetFiles, new_run_dir, unused
from popo_jax.types import UserError

FORMAT = 1
"""Of a checkpoint's meta."""


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides state and buffer."""

    step: int = 0
    """Updates applied."""
    position: int = 0
    """Of the prompt stream: how many prompts were taken."""
    rollouts_total: int = 0
    tokens_generated_total: int = 0
    dead_steps: int = 0
    """Steps in a row without a fresh effective group."""
    nonfinite_steps: int = 0
    """Steps in a row that were not applied because loss or gradient was not finite."""


@dataclass(frozen=True, eq=False)
class RunDir:
    path: epath.Path
    metrics: MetricsFile
    samples: ParquetFiles
    replays: ParquetFiles
    evaluations: ParquetFiles

    @classmethod
    def at(cls, path: epath.PathLike) -> RunDir:
        path = epath.Path(path)
        steps = (ParquetFiles(path / name) for name in ("samples", "replays", "evaluations"))
        return cls(path, MetricsFile(path / "metrics.jsonl"), *steps)

    def began(self, session: Mapping[str, Any]) -> None:
        """A row of sessions.jsonl: the trainer was started."""
        with (self.path / "sessions.jsonl").open("a") as f:
            f.write(json.dumps(session) + "\n")

    def rewind(self, step: int) -> None:
        """Rows, files and checkpoints beyond `step` move to discarded/."""
        discarded = self.path / "discarded"
        later = [p for p in (self.path / "checkpoints").iterdir() if p.name.isdigit() and int(p.name) > step]
        if later:
            target = unused(discarded, f"checkpoints-{step:06d}", "")
            target.mkdir(parents=True)
            for p in sorted(later, key=lambda p: -int(p.name)):
                p.rename(target / p.name)
        for writer in (
            self.metrics,
            self.samples,
            self.replays,
            self.evaluations,
        ):  # after the checkpoints, which say what must be there
            writer.rewind(step, discarded)


def create(c: Config, *, make: bool = True) -> RunDir:
    """A new directory: `run_dir`, or runs/<tasks>-<algorithm>-s<seed> with a number if that is taken. make False: only look."""
    if c.run_dir is not None:
        return RunDir.at(new_run_dir(c.run_dir, make=make))
    base = epath.Path("runs") / f"{'+'.join(t.name for t in c.tasks)}-{c.algorithm.name}-s{c.seed}"
    path, n = base, 1
    while path.exists():
        n += 1
        path = base.parent / f"{base.name}-{n}"
    return RunDir.at(new_run_dir(path, make=make))


def write_config(run: RunDir, c: Config, fingerprints: Mapping[str, str]) -> None:
    """The resolved config; repeating it makes a new directory, so its own is left out."""
    data = {"fingerprints": dict(fingerprints)} | plain.to_plain(dataclasses.replace(c, run_dir=None))
    (run.path / "config.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def code_version() -> str:
    return importlib.metadata.version("popo-jax")


def versions() -> dict[str, str]:
    """What several processes of a run must share besides config and data."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return {"source code": code} | {f"version of {name}": importlib.metadata.version(name) for name in ("jax", "jaxlib")}


def digest(c: Config) -> str:
    """Of a config, 16 hex digits."""
    return hashlib.sha256(json.dumps(plain.to_plain(c), sort_keys=True).encode()).hexdigest()[:16]


def meta(c: Config, progress: Progress, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "format": FORMAT,
        "progress": dataclasses.asdict(progress),
        "fingerprints": dict(fingerprints),
        "settings": _settings(c),
    }


def _settings(c: Config) -> dict[str, Any]:
    s = c.sample
    return {
        "algorithm.advantages": c.algorithm.advantages,
        "sample.temperature": s.temperature,
        "batch.group_size": c.batch.group_size,
        "sample.max_prompt_tokens": s.max_prompt_tokens,
        "sample.max_response_tokens": s.max_response_tokens,
        "selection.method": c.selection.method,
        "replay.capacity": c.replay.capacity,
        "images.min_pixels": c.images.min_pixels,
        "images.max_pixels": c.images.max_pixels,
    }


def check_settings(saved: Mapping[str, Any], c: Config, tokenizer: str, where: str) -> None:
    """Errors: UserError if a checkpoint's meta belongs to another tokenizer (its fingerprint), advantage, temperature, group
    size or scale of images, or was made under higher limits."""
    check_tokenizer(saved, tokenizer, where)
    for key, now in _settings(c).items():
        was = saved["settings"].get(key)
        if was is None or now is None:  # not known before, or of images of which there are none
            continue
        limit = key.startswith(("sample.max", "replay"))
        if (now < was) if limit else (now != was):
            raise UserError(
                f"{where} was written with {key} {was}, which must {'not be lowered' if limit else 'stay'}, got {now}"
            )


def check_meta(saved: Mapping[str, Any], fingerprints: Mapping[str, str], where: str) -> Progress:
    """The progress in a checkpoint's meta. Errors: UserError if it belongs to another template or reward."""
    for name in ("template", "reward"):
        was, now = saved["fingerprints"].get(name), fingerprints[name]
        if was != now:
            raise UserError(f"{where} was written with another {name}: expected fingerprint {now}, got {was}")
    return Progress(**saved["progress"])


def check_tokenizer(saved: Mapping[str, Any], fingerprint: str, where: str) -> None:
    """Errors: UserError if a checkpoint's meta lacks a part, or is of another format or tokenizer."""
    lacking = [k for k in ("progress", "fingerprints", "settings") if not isinstance(saved.get(k), Mapping)]
    if saved.get("format") != FORMAT or lacking:
        raise UserError(f"{where} must have a meta of format {FORMAT}, got {saved.get('format')} without {lacking or 'nothing'}")
    was = saved["fingerprints"].get("tokenizer")
    if was != fingerprint:
        raise UserError(f"{where} was written with another tokenizer: expected fingerprint {fingerprint}, got {was}")


def open_existing(path: epath.PathLike) -> RunDir:
    """Errors: UserError if `path` is not a run directory."""
    path = epath.Path(path)
    if not (path / "config.yaml").exists():
        raise UserError(
            f"{path} must be a run directory (a folder with config.yaml), got {'another' if path.exists() else 'none'}"
        )
    return RunDir.at(path)
