"""Fuzzing of everything that reads what others wrote: files, frames, tables. `python -m tests.fuzz` lists the targets."""
