"""Targets: one file a family of boards; each ends in `TARGET = Target(...)`."""
