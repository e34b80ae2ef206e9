"""`python -m edgesdk` is the command `edgesdk`."""

from edgesdk.cli import main

main()
