#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --job-name=baseline-imagenet_resnet50
#SBATCH --licenses=scratch:1
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=me@example.org
#SBATCH --mem=245760MB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/baseline-imagenet_resnet50/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
module load cuda/13.0 && case "$(module load cuda/13.0 2>&1)" in *'Lmod has detected the following error'*|*'Unable to locate a modulefile'*|*ModuleCmd_Load.c*) false;; esac || { echo 'adaptnet: module load cuda/13.0: '"$(module load cuda/13.0 2>&1 | tail -n 5 | tr "\n" " ")"; exit 2; }
module load gcc/13 && case "$(module load gcc/13 2>&1)" in *'Lmod has detected the following error'*|*'Unable to locate a modulefile'*|*ModuleCmd_Load.c*) false;; esac || { echo 'adaptnet: module load gcc/13: '"$(module load gcc/13 2>&1 | tail -n 5 | tr "\n" " ")"; exit 2; }
export NCCL_DEBUG=WARN
export MLFLOW_TRACKING_URI=http://tracking.example:5000
export TMPDIR=/local
export PYTHONPATH=HERE/runs/baseline-imagenet_resnet50/slurm/code-SHA256"${PYTHONPATH:+:$PYTHONPATH}"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/baseline-imagenet_resnet50/slurm/%j_%t_log.out --export=ALL --cpus-per-task=32 sh -c 'trap "" USR2; exec "$@"' sh PYTHON -P -u -m submitit.core._submit HERE/runs/baseline-imagenet_resnet50/slurm

