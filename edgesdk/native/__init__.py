"""Sequence models on our own kernels: what no runtime has a format for, and what it computes slower.

`lower` (on the machine that builds) → `program` (the file) → `machine` (the runner, on any machine; numpy and the kernels alone).
"""
