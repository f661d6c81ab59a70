"""Time, memory and error of every operation beside its peers: `pytest benchmarks/`, `python -m benchmarks.report`."""
