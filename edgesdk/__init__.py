"""edgesdk: plan, build, flash and profile models on edge devices."""

__version__ = "0.1.0"
