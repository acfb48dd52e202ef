"""What a report costs to make and to open: `python -m benchmarks.report`; --run RUN takes screenshots of one."""
