"""Our trainer, sampler and train step beside TRL, transformers, torch and Tunix: same weights, same batch, one run.

python -m benchmarks.peers.install DIR               the peers, each in an environment of its own
python -m benchmarks.peers.run train two_cores --peers DIR --out FILE.jsonl
python -m benchmarks.peers.table                     the committed rows as a table
"""
