#!/usr/bin/env bash
# One search on the nodes of a Slurm job: Ray is started on all of them, and ends with the search.
#
#   RUN=/shared/runs/arc_easy MODEL=/shared/models/Llama-3.1-8B-Instruct sbatch jobs/clusters/slurm.sh
#
# Two minutes before the time is up the search is told to store what it has; it exits with 75, the job is queued again,
# and goes on where it was. Nodes that are lost or taken away queue it again, too. Change the #SBATCH lines as your
# cluster needs them; `ray` and `tale-ray` have to be on the PATH of every node.
#
#SBATCH --job-name=tale-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

run=${RUN:?name a folder that every node sees, or a URI}
model=${MODEL:-bundled}
task=${TASK:-boolean_synthetic}
gpus_per_worker=${GPUS_PER_WORKER:-1}
cpus_per_worker=${CPUS_PER_WORKER:-8}
read -r -a more <<<"${OPTIONS:-}" # e.g. OPTIONS="--rows 550 --shots 5"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:$((20000 + SLURM_JOB_ID % 20000))" # two jobs may share a node

# Whoever reaches a port of Ray without a token could run code.
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

pid_file=$(mktemp)
trap 'rm -f "$pid_file"' EXIT

# Note the search's process id, run it, and end Ray with it. The last thing that `ray symmetric-run` does is `ray stop`,
# which ends every process of Ray that it sees on its node.
# shellcheck disable=SC2016  # that shell, and not this one, knows its process id
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_PER_TASK" -- \
  sh -c 'echo "$$" >"$0"; exec "$@"' "$pid_file" \
  tale-ray search --address "$address" --run "$run" --model "$model" --task "$task" \
  --gpus-per-worker "$gpus_per_worker" --cpus-per-worker "$cpus_per_worker" "${more[@]}" &
step=$!

# Tell the search alone, which is on this node: a signal to srun, or to the step, would kill it before it has stored
# anything. Before it is there, nothing is lost with the step.
stopping=""
driver=""
trap 'stopping=yes; driver=$(cat "$pid_file"); kill -TERM "${driver:-$step}"' TERM

code=0
wait "$step" || code=$?
if [ -n "$stopping" ]; then # the signal ended the wait, not the step
  code=0
  wait "$step" || code=$?
fi

echo "tale-ray exited with $code"
if [ "$code" -eq 75 ] || { [ -n "$stopping" ] && [ "$code" -gt 128 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
