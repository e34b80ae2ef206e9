"""Disk images: a bundle put into one without root and without mounting, written to a card or disk, and A/B slots under U-Boot."""
