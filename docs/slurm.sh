#!/bin/bash
# Two nodes of eight GPUs, gone on with after every time limit:
#     sbatch docs/slurm.sh configs/7b.yaml runs/7b [--key value ...]
# The checkout, data/ and runs/ have to lie on a file system that all nodes see.
#SBATCH --job-name=moshi-ttt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -uo pipefail

config=${1:?usage: sbatch docs/slurm.sh CONFIG RUN_DIR [--key value ...]}
run=${2:?usage: sbatch docs/slurm.sh CONFIG RUN_DIR [--key value ...]}
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --resume goes on from the newest checkpoint, or begins where there is none.
srun .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m finetune.train "$config" --run_dir "$run" --resume "$@" &
step=$!

# 600 s before the limit: after its step the run saves and stops, and the job queues again. (torchrun
# would kill the ranks 30 s after a signal, too soon for a long step.)
again=
trap 'again=yes; touch "$run/stop"' USR1
wait "$step"
status=$?
if [ -n "$again" ]; then
    wait "$step"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
