#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --job-name=baseline-imagenet_resnet50
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/baseline-imagenet_resnet50/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=720

# setup
export PYTHONPATH=HERE/runs/baseline-imagenet_resnet50/slurm/code-SHA256"${PYTHONPATH:+:$PYTHONPATH}"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/baseline-imagenet_resnet50/slurm/%j_%t_log.out --export=ALL --cpus-per-task=64 apptainer exec --nv --bind /shared --bind /local:/tmp /shared/images/adaptnet.sif sh -c 'trap "" USR2; exec "$@"' sh python -P -u -m submitit.core._submit HERE/runs/baseline-imagenet_resnet50/slurm


# teardown
code=$?
if [ -e HERE/runs/baseline-imagenet_resnet50/slurm/requeue-"$SLURM_JOB_ID" ]; then rm HERE/runs/baseline-imagenet_resnet50/slurm/requeue-"$SLURM_JOB_ID"; scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
