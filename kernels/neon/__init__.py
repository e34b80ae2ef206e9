"""C kernels with NEON intrinsics for arm64 cores: `build` compiles them here, `load` calls them on the device."""
