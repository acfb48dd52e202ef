"""One device, whatever the machine. Compiled programs are shared between tests and worker processes: presets that differ in
data only compile once. They are compiled in half the time, not for speed: most of the suite's time is XLA's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

CACHE = Path(os.environ.setdefault("POPO_TEST_CACHE", tempfile.mkdtemp(prefix="popo-test-")))
os.environ.setdefault("POPO_CACHE", str(CACHE))
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Nothing that a test writes to a relative path lands in the checkout."""
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(root)
