#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --job-name=baseline-imagenet_resnet50
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/baseline-imagenet_resnet50/slurm/%j_0_log.out
#SBATCH --partition=main
#SBATCH --requeue
#SBATCH --signal=USR2@45
#SBATCH --time=30

# setup
export PYTHONPATH=HERE/runs/baseline-imagenet_resnet50/slurm/code-SHA256"${PYTHONPATH:+:$PYTHONPATH}"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/baseline-imagenet_resnet50/slurm/%j_%t_log.out --export=ALL --cpus-per-task=1 sh -c 'trap "" USR2; exec "$@"' sh PYTHON -P -u -m submitit.core._submit HERE/runs/baseline-imagenet_resnet50/slurm

