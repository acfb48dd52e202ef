"""Checkpoints: state, replay buffer and meta in one Orbax composite, written asynchronously, committed together.

RUN/checkpoints/N/state/  replay/replay.npz  meta/metadata      (N: updates applied)
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from popo_jax.types import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step of a save

NPZ = "replay.npz"


class NpzHandler(ocp.CheckpointHandler):
    """A dict of numpy arrays as one .npz file."""

    def save(self, directory: epath.Path, args: NpzSave) -> None:
        if jax.process_index() > 0:  # all hold the same
            return
        buffer = io.BytesIO()
        np.savez(buffer, **dict(args.arrays))  # type: ignore[arg-type]
        (directory / NPZ).write_bytes(buffer.getvalue())

    def restore(self, directory: epath.Path, args: NpzRestore | None = None) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO((directory / NPZ).read_bytes()), allow_pickle=False) as data:
            return {name: data[name] for name in data.files}


@ocp.args.register_with_handler(NpzHandler, for_save=True)
@dataclass
class NpzSave(ocp.args.CheckpointArgs):
    arrays: Mapping[str, np.ndarray]


@ocp.args.register_with_handler(NpzHandler, for_restore=True)
@dataclass
class NpzRestore(ocp.args.CheckpointArgs):
    pass


class Checkpoints:
    """The checkpoints of a run. Errors: UserError for a full disk, and for a damaged checkpoint with the newest whole one."""

    def __init__(self, directory: epath.PathLike, *, keep_last: int, keep_best: int):
        self.directory = epath.Path(directory).resolve()  # orbax takes absolute paths only
        keep: list[policies.PreservationPolicy] = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(policies.BestN(get_metric_fn=_score, reverse=False, n=keep_best, keep_checkpoints_without_metrics=False))
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=_score,
            enable_async_checkpointing=True,
            multiprocessing_options=_barriers(),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "replay": NpzHandler(), "meta": ocp.JsonCheckpointHandler()}
        registry = ocp.DefaultCheckpointHandlerRegistry()
        saves = {"state": ocp.args.StandardSave, "replay": NpzSave, "meta": ocp.args.JsonSave}
        restores = {"state": ocp.args.StandardRestore, "replay": NpzRestore, "meta": ocp.args.JsonRestore}
        for item, handler in handlers.items():
            registry.add(item, saves[item], handler)
            registry.add(item, restores[item], handler)
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as e:
            logging.getLogger(__name__).warning("a save did not end well: %s", e)

    def save(
        self, step: int, *, state: Any, replay: Mapping[str, np.ndarray], meta: Mapping[str, Any], score: float | None
    ) -> None:
        """Returns once the device arrays are copied; the files are written behind. An earlier save's failure is raised here.

        `score` (higher is better) decides which checkpoints count as best; None is never best.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), replay=NpzSave(dict(replay)), meta=ocp.args.JsonSave(dict(meta) | {"step": step})
        )
        metrics = None if score is None else {"score": float(score)}
        self._guard(lambda: self._manager.save(step, args=args, metrics=metrics, force=True))

    def wait(self) -> None:
        """Until everything is committed."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guard(self._manager.close)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def restore(self, step: int | None, abstract_state: Any) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
        """(state, replay arrays, meta) of a committed step, None for the newest, laid out as `abstract_state` says."""
        step = self._committed(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), replay=NpzRestore(), meta=ocp.args.JsonRestore()
        )
        got = self._read(step, lambda: self._manager.restore(step, args=args))
        return got["state"], got["replay"], got["meta"]

    def read_meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(self._committed(step), lambda: self._manager.restore(step, args=args))["meta"]

    def read_replay(self, step: int) -> dict[str, np.ndarray]:
        args = ocp.args.Composite(replay=NpzRestore())
        return self._read(self._committed(step), lambda: self._manager.restore(step, args=args))["replay"]

    def _committed(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            have = f"committed are {', '.join(map(str, steps))}" if steps else "there is none"
            raise UserError(f"{self.directory} holds no committed checkpoint{'' if step is None else f' of step {step}'}: {have}")
        return steps[-1] if step is None else step

    def _read(self, step: int, read: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, json.JSONDecodeError) as e:
            older = [s for s in self.steps() if s < step and self._whole(s)]
            offer = (
                f"the newest whole one before it is step {older[-1]}: --from-step {older[-1]}"
                if older
                else "there is no whole one before it"
            )
            raise UserError(f"checkpoint {self.directory / str(step)} cannot be read ({_first_line(e)}); {offer}") from e

    def _whole(self, step: int) -> bool:
        """Everything of it can be read, device arrays included."""
        try:
            self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), replay=NpzRestore(), meta=ocp.args.JsonRestore())
            )
        except Exception:
            return False
        return True

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception as e:
            text = str(e)
            if "No space left" in text or "RESOURCE_EXHAUSTED" in text or "Disk quota" in text:
                raise UserError(
                    f"{self.directory}: the disk is full; checkpoints committed before ({self.steps()}) are whole"
                ) from e
            raise


def _barriers() -> Any:
    """Processes wait for each other through jax.distributed's service: naming them all keeps orbax off the devices, where a
    rollout is under way."""
    several = jax.process_count() > 1
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())) if several else None)


def _score(metrics: Mapping[str, float] | None) -> float:
    return float(metrics["score"]) if metrics else float("-inf")


def _first_line(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200] if lines else ''}"
