"""Kernels: one registry row for each operation × format × target."""
