"""Ray clusters outside SLURM, and jobs on them."""
