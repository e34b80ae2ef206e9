"""Kernels in CUDA C++, compiled by NVRTC for the GPU found or for GPUs that are not here."""
