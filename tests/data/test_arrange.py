"""Rows in the order in which the train step takes them: by length within their mini-batch, and put back."""

from __future__ import annotations

import numpy as np
import pytest

from popo_jax.data.arrange import arrange, needed_lengths, put_back
from tests import tiny


def config(M: int = 1, micro: int | None = 2, buckets: int = 3, prompts: int = 4, G: int = 2):
    """T = 24 in lengths of 8, 16 and 24."""
    return tiny.config(
        batch__prompts=prompts,
        batch__group_size=G,
        batch__mini_batches=M,
        batch__micro_batch=micro,
        batch__length_buckets=buckets,
        sample__max_prompt_tokens=4,
        sample__max_response_tokens=20,
    )


def rows(lengths) -> dict[str, np.ndarray]:
    """Row i counts tokens 2 .. lengths[i] - 1, none where that is 0, and is known by its advantage."""
    t = np.arange(24)
    mask = (t >= 2) & (t < np.array(lengths)[:, None])
    return {"tokens": np.broadcast_to(t, mask.shape), "token_mask": mask, "adv": np.arange(len(lengths), dtype=np.float32)}


def test_lengths_reach_to_the_last_counted_token():
    mask = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    assert needed_lengths(mask).tolist() == [4, 0, 5]


def test_a_mini_batch_by_hand():
    """Four micro-batches of two rows: 24 and 20, then 17 and 9, then 8 and 5; the rest has nothing to count."""
    out, order = arrange(rows([5, 0, 24, 9, 17, 0, 8, 20]), config())
    assert config().lengths == (8, 16, 24)
    assert out["bucket"].tolist() == [[2, 2, 0, -1]] and out["bucket"].dtype == np.int32
    micros = out["adv"].astype(int).reshape(2, 4).T  # micro-batch j holds rows j and j + 4
    assert micros.tolist() == [[2, 7], [4, 3], [6, 0], [1, 5]]
    np.testing.assert_array_equal(put_back(out["adv"], order), np.arange(8))
    np.testing.assert_array_equal(put_back(out["token_mask"], order), rows([5, 0, 24, 9, 17, 0, 8, 20])["token_mask"])


def test_rows_stay_in_their_mini_batch():
    """Slots 0 and 2 are mini-batch 0, slots 1 and 3 are mini-batch 1, each sorted by itself."""
    out, order = arrange(rows([3, 24, 9, 9, 17, 8, 3, 3]), config(M=2))
    assert set(order[[0, 1, 4, 5]]) == {0, 1, 4, 5} and set(order[[2, 3, 6, 7]]) == {2, 3, 6, 7}
    assert out["bucket"].tolist() == [[2, 0], [1, 0]]
    assert order.tolist() == [1, 5, 2, 6, 4, 0, 3, 7]


@pytest.mark.parametrize("length", [1, 7, 8])
def test_one_micro_batch_needs_no_order(length):
    out, order = arrange(rows([length if i else 3 for i in range(8)]), config(micro=None))
    assert order.tolist() == list(range(8)) and out["bucket"].tolist() == [[0]]
    assert arrange(rows([0] * 8), config(micro=None))[0]["bucket"].tolist() == [[-1]]


def test_equal_lengths_keep_their_order_and_the_long_come_first():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 25, 64)
    c = config(prompts=32, micro=4, M=2)
    out, order = arrange(rows(lengths), c)
    needed = needed_lengths(out["token_mask"])
    for m in range(2):
        mini = np.flatnonzero(np.arange(64) // 2 % 2 == m)
        ranked = mini.reshape(4, 8).T.ravel()
        assert (np.diff(needed[ranked]) <= 0).all()
        same = np.flatnonzero(np.diff(needed[ranked]) == 0)
        assert (order[ranked[same]] < order[ranked[same + 1]]).all()
        for j, bucket in enumerate(out["bucket"][m]):
            longest = needed[mini.reshape(4, 8)[:, j]].max()
            want = -1 if longest == 0 else next(i for i, t in enumerate(c.lengths) if longest <= t)
            assert bucket == want


@pytest.mark.parametrize(
    ("tokens", "buckets", "lengths"),
    [
        (24, None, (24,)),
        (24, 4, (8, 16, 24)),
        (256, None, (64, 128, 192, 256)),
        (1000, None, (256, 512, 768, 1000)),
        (9216, None, (2304, 4608, 6912, 9216)),
        (9216, 2, (4608, 9216)),
        (9216, 1, (9216,)),
    ],
)
def test_lengths_of_a_config(tokens, buckets, lengths):
    c = tiny.config(sample__max_prompt_tokens=8, sample__max_response_tokens=tokens - 8, batch__length_buckets=buckets)
    assert c.lengths == lengths
