"""`popo report`: the account of a run, from its directory alone. Knows no jax, and of the trainer only what it left on disk.

read -> sections (learning, correction, data, safeguards, samples, provenance) -> findings -> page, or JSON, or a model card.
"""
