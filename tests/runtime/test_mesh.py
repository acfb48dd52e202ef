"""How many devices a CPU is divided into."""

from __future__ import annotations

import pytest

from popo_jax.runtime import mesh
from popo_jax.runtime.mesh import cpu_devices
from tests import tiny


@pytest.mark.parametrize(
    ("settings", "cores", "devices"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        ({}, 3, 2),  # a power of 2
        ({}, 64, 8),  # and no more
        ({"batch__mini_batches": 4}, 64, 4),  # rows of a mini-batch: 4
        ({"batch__prompts": 3, "batch__group_size": 3}, 64, 1),
        ({"warm_start__batch": 6}, 64, 2),
        ({"replay__extra": 1, "batch__group_size": 2}, 64, 2),  # 10 rows, 8 of them fresh
        ({"mesh__tensor": 2}, 4, 4),
        ({"mesh__tensor": 2}, 1, 2),  # what was asked for, whatever the cores
        ({"mesh__data": 3}, 2, 3),
        ({"mesh__data": 1}, 2, 1),
        ({"mesh__fsdp": 4, "mesh__tensor": 2}, 64, 16),  # 8 rows of a warm-start batch over 2 x 4
        ({"policy__path": "/some/model"}, 8, 1),
        ({"policy__path": "/some/model", "mesh__fsdp": 2}, 8, 2),
        ({"policy__path": "/some/model", "mesh__data": 4}, 8, 4),
    ],
)
def test_as_many_devices_as_suit_the_run(settings, cores, devices):
    assert cpu_devices(tiny.config(**settings), cores) == devices


def test_a_small_policy_of_ones_own_divides_the_cpu_too(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 60)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 999)
    c = tiny.config(policy__path=str(tmp_path))
    monkeypatch.setattr(mesh, "SMALL", 100)
    assert cpu_devices(c, 4) == 4
    monkeypatch.setattr(mesh, "SMALL", 99)
    assert cpu_devices(c, 4) == 1
