"""SLURM: what submits to it, asks it, and reads its environment on the nodes."""
