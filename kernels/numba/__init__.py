"""Kernels compiled by Numba where they run, with the instructions of the CPU found there."""
