#!/bin/bash
# CycleAlign on two machines with eight GPUs each, under Slurm. Not run on a real cluster.
#
#   cyclealign init             # writes cyclealign.yaml
#   export OPENAI_API_KEY=...   # sbatch passes the environment on; do not write the key into this file
#   OUTPUT_DIR=/shared/qwen-cyclealign sbatch examples/launch/slurm.sh
#
# OUTPUT_DIR must be on a file system that all machines share. If a machine fails, Slurm starts the job again, possibly
# on other machines, and the run resumes from its last checkpoint. To continue a job that ended, submit it again.
#SBATCH --job-name=cyclealign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${OPENAI_API_KEY:?Export the key of the ranker first.}"
: "${OUTPUT_DIR:?Set it to a folder that all machines share.}"
export OUTPUT_DIR
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RESUME=false
if compgen -G "$OUTPUT_DIR/checkpoint-*/trainer_state.json" > /dev/null; then RESUME=true; fi
export MAIN_ADDRESS RESUME

# One launcher per machine. The quotes leave SLURM_NODEID to the machine.
srun --kill-on-bad-exit=1 bash -c '
cyclealign train --config cyclealign.yaml \
    --config_file examples/accelerate_configs/zero2.yaml \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((8 * SLURM_NNODES))" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port 29500 \
    --output_dir "$OUTPUT_DIR" --resume_from_checkpoint "$RESUME" --ddp_timeout 900
'
