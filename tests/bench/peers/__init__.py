"""The parts of `compress_vs_peers.py`: what is compressed, who compresses, and how the answer is shown."""
