#!/bin/bash
# Trains a fleet on the nodes of one SLURM job, and goes on in another job when the time is up.
#
#     sbatch examples/cluster/slurm.sh RUN_FOLDER ENV [FLAGS of qfleet train]
#
# for example
#
#     sbatch examples/cluster/slurm.sh ~/runs/pong ale:Pong --preset ape_x --num-actors 90 --num-replay-shards 2
#
# Submit it in the folder that holds examples/, with an environment active that has qfleet[ray]. RUN_FOLDER is read and
# written on the first node only, and must be there for the next job, so put it where all nodes see it.
# Each actor and each replay shard takes a CPU, and so does the learner, which also takes a GPU if the nodes have one.
#
#SBATCH --job-name=qfleet
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# --exclusive: `ray symmetric-run` refuses a node on which another Ray runs.
# --signal: 300 seconds before the time is up, SLURM tells this script alone, which then tells qfleet alone. Ray must
#   still run while the checkpoint is written, so give it more time if the replay is large.
# --requeue: the same job begins again after a node has failed, and after the time is up, by `scontrol requeue` below.

set -euo pipefail
run=$1
folder=${SLURM_SUBMIT_DIR:-.}/examples/cluster

# A token for this job alone, so that no other user of the cluster's network can reach its Ray. srun passes it on.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds that the nodes have to start Ray

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # the node that runs this script
note=$(mktemp)                                                    # the process to tell when the time is up
trap 'rm -f "$note"' EXIT

# All nodes start Ray, and the first one then runs what follows `--`.
# shellcheck disable=SC2016 # $$ and $0 are those of the inner shell
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
	ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus="$SLURM_CPUS_PER_TASK" \
	--include-dashboard=false -- \
	sh -c 'echo $$ >"$0"; exec "$@"' "$note" bash "$folder/train_or_resume.sh" "$@" --ray-address auto &
step=$!
trap 'kill -TERM "$(cat "$note")" || kill -TERM "$step" || true' TERM
while kill -0 "$step" 2>/dev/null; do # the signal ends `wait`, but not yet the step
	wait "$step" || true
done
code=0
wait "$step" || code=$?

if [ "$code" -eq 75 ]; then
	scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -eq 0 ] && ! grep -qsE '"stopped": "(env steps|return reached)"' "$run/summary.json"; then
	echo "Ray didn't start, as said above" >&2 # symmetric-run exits with 0 then
	code=1
fi
exit "$code"
