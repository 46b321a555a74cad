"""Claims about speed, one file each; `python -m benchmarks` measures them."""
