from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from popo_jax.config import BatchConfig, Config
from popo_jax.runtime.clocks import Clock
from popo_jax.runtime.console import Console, describe
from popo_jax.runtime.signals import stop_wish


def test_a_clock_adds_up_across_threads_and_starts_anew():
    clock = Clock()

    def work():
        with clock("sample"):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    with clock("replay"):
        sum(range(200_000))
    row = clock.take()
    assert row["time/sample"] >= 0.1 and 0 < row["cpu/replay"] <= row["cpu/step"] + 1e-3
    assert set(clock.take()) == {"cpu/replay", "cpu/step"}


def test_the_banner_names_the_attention_and_the_rows_at_once(capsys):
    c = Config(batch=BatchConfig(micro_batch=16))
    Console().banner(c, 1_230_000, "splash", [SimpleNamespace(device_kind="TPU v5e")] * 4, {"countdown": (9, 3)})
    said = capsys.readouterr().out
    assert "; 1.23 M parameters, float32, attention splash; 4 x TPU v5e\n" in said
    assert "32 prompts x 8 responses, 16 rows trained at once, seed 0\n" in said


def test_the_line_leaves_out_what_is_not_there():
    assert describe({"step": 0, "eval/accuracy": 0.125}) == "held-out 12.5 %"
    assert describe({"step": 0, "eval/accuracy": 0.5, "eval/blind/accuracy": 0.125}) == "held-out 50.0 % (blind 12.5 %)"
    line = describe(
        {"step": 3, "groups/effective": 0.5, "replay/filled": 16.0, "replay/age_mean": float("nan"), "time/step": 1.0}
    )
    assert line == "effective 50 %  replayed 16  1.00 s"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_and_a_second_ctrl_c_acts(number):
    before = signal.getsignal(number)
    with stop_wish() as wish:
        assert not wish.is_set()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert wish.is_set() and (signal.getsignal(number) == before) == (number == signal.SIGINT)
        if number == signal.SIGTERM:  # parent and child both get it, and the parent hands its own on
            os.kill(os.getpid(), number)
            time.sleep(0.01)
    assert signal.getsignal(number) == before


def test_a_wish_within_a_wish_is_the_same():
    with stop_wish() as outer:
        with stop_wish() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert inner is outer and outer.is_set()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    with stop_wish() as later:
        assert not later.is_set()
