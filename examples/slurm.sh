#!/bin/bash
# Several nodes under Slurm. Each node has one task, which starts a process per GPU:   sbatch examples/slurm.sh
#SBATCH --job-name=cpt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

export CPT_CACHE=/shared/cpt-cache       # reference log-probs, in a folder that all nodes share
export HF_HUB_OFFLINE=1                  # compute nodes often cannot reach the hub: download model and data first
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A requeued job resumes from the last checkpoint. The first run has none.
resume=()
compgen -G "runs/dpo/checkpoint-*" > /dev/null && resume=(--resume_from_checkpoint last)

srun --kill-on-bad-exit=1 bash -c "torchrun \
    --nnodes $SLURM_NNODES --nproc_per_node 8 \
    --rdzv_id $SLURM_JOB_ID --rdzv_backend c10d --rdzv_endpoint $main:29500 \
    -m cpt_kernels.cli train --config examples/dpo.yaml --ddp_timeout 7200 ${resume[*]:-}"

# For FSDP2 or DeepSpeed instead of DDP, cpt-train starts the processes itself. Replace the torchrun command by:
#   cpt-train --accelerate_config fsdp2 --num_machines $SLURM_NNODES --num_processes $((8 * SLURM_NNODES)) \
#       --machine_rank \$SLURM_NODEID --main_process_ip $main --main_process_port 29500 --config examples/dpo.yaml
