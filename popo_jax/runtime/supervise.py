"""A process of a run of several works in a child of the command: where jax's runtime ends it, the parent says why and what to do.

Imports no jax.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

SUPERVISED = "POPO_SUPERVISED"
"""Set in the child's environment."""
MODULE = "popo_jax.cli"
"""What the child runs."""
LOST = 3
"""Exit status of a process that ends because another one was lost: to be started again with --resume."""
_PR_SET_PDEATHSIG = 1


def several(told: bool) -> bool:
    """Is this one of several processes? Told so by flags, started by SLURM or Open MPI with more than one, or on a Cloud TPU."""
    if told:
        return True
    if any(int(os.environ.get(name, "1")) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    return "tpu" in os.environ.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu") is not None and _chips()


def _chips() -> bool:
    """Is there a TPU in this machine?"""
    if any(path.name[5:].isdigit() for path in Path("/dev").glob("accel*")):
        return True
    google = any(path.read_text().strip() == "0x1ae0" for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
    return google and any(path.name.isdigit() for path in Path("/dev/vfio").glob("*"))


def child() -> bool:
    return SUPERVISED in os.environ


def run(argv: Sequence[str]) -> int:
    """`popo *argv` in a child, which SIGTERM and Ctrl-C reach and which ends with this process. Returns its exit status."""
    command = [sys.executable, "-m", MODULE, *argv]
    env = os.environ | {SUPERVISED: "1"}
    process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_end_with_parent)

    def hand_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    code = process.wait()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    why = "jax ends a process whose peers are lost: killed, stopped or cut off" if -code == signal.SIGABRT else "see above"
    print(
        f"error: this process of the run was ended by {name} ({why}); checkpoints committed before are whole: "
        f"start all processes again with popo train --resume RUN",
        file=sys.stderr,
    )
    return LOST


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
