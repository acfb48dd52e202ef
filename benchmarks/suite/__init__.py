"""`popo bench`: times the functions that training uses, one JSON line a case.

sizes.py shapes   measure.py rounds, compile time, the machine's peak   load.py neighbours
forced.py response lengths of choice   report.py lines, the table, RESULTS.md   results/ kept lines, one file a machine
registry.py the cases by name; one file for each kind: train_step sampler replay verifiers checkpoint startup loop
"""
