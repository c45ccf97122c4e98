#!/bin/bash
# Begins a run, or goes on with it if it has begun: what a batch system should start each time.
#
#     train_or_resume.sh RUN_FOLDER ENV [FLAGS of qfleet train]
#
# The flags count only when the run begins: its folder keeps them. SIGTERM makes qfleet write a checkpoint and end.
#
# Exit codes:
#   0   the run has ended, or had ended before
#   75  it was interrupted: start this again
#   1   the run failed, and 2 for bad input, as with qfleet itself

set -u
run=$1
shift
has_ended() { grep -qsE '"stopped": "(env steps|return reached)"' "$run/summary.json"; }

if has_ended; then
	echo "the run in $run has ended; qfleet resume $run --env-steps N takes it further"
	exit 0
fi
if [ -e "$run/config.json" ]; then
	qfleet resume "$run" & # add --trust if the environment is a module of your own
else
	qfleet train "$@" --run-dir "$run" &
fi
child=$!
was_asked=no
trap 'was_asked=yes; kill -TERM "$child" 2>/dev/null' TERM INT HUP
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, but not yet qfleet
	wait "$child"
done
wait "$child"
code=$?
if [ "$code" -eq 0 ] && ! has_ended; then
	code=75
elif [ "$was_asked" = yes ] && [ "$code" -gt 128 ]; then
	code=75 # it was asked before it had begun
fi
exit "$code"
