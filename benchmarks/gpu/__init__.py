"""The benchmark house on a GPU: the sweep, the figures and the checks that `benchmarks/gpu.sh` runs."""
