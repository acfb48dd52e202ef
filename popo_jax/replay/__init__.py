"""The replay room: stored groups, their order, and what fills a batch's ineffective slots. Numpy only, no jax.

Everything here is a deterministic function of the groups stored so far, so every process holds the same buffer and
makes the same plans.
"""
