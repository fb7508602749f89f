"""Measure losses, training steps and memory beside those of other projects: `python -m benchmarks.speed`."""
