#!/usr/bin/env bash
# Brings an overlay onto the cluster that kubectl reaches: first what the processes need, then the migration, then the processes.
# usage: deploy.sh OVERLAY-FOLDER      (KUBECTL: the command, with arguments; the same for a first roll-out and for an upgrade;
# MIGRATE_ONLY=1: leave the processes as they are)
set -euo pipefail
overlay=${1:?the folder of an overlay, such as deploy/k8s/overlays/production}
kubectl=${KUBECTL:-kubectl}
migration_timeout=${MIGRATION_TIMEOUT:-900s}
rollout_timeout=${ROLLOUT_TIMEOUT:-600s}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

apply() { $kubectl apply --server-side --force-conflicts --field-manager=smdih "$@" <"$work/all.yaml" -f -; }

$kubectl kustomize "$overlay" >"$work/all.yaml"
# The labels divide it: the namespace, secrets, configuration, topics and servers first.
apply -l 'smdih/step notin (migrate, processes)'
# A Job cannot be changed: the one of the release before goes.
$kubectl -n smdih delete job migrate --ignore-not-found --wait
apply -l smdih/step=migrate
# Ends at once when it fails, too.
until $kubectl -n smdih wait --for=condition=Complete job/migrate --timeout=2s >/dev/null 2>&1; do
  failed=$($kubectl -n smdih get job migrate -o 'jsonpath={.status.conditions[?(@.type=="Failed")].message}')
  [ -z "$failed" ] || { $kubectl -n smdih logs job/migrate --all-containers --tail=20 >&2; echo "the migration failed: $failed" >&2; exit 1; }
  [ "$SECONDS" -lt "${migration_timeout%s}" ] || { echo "the migration did not end in $migration_timeout" >&2; exit 1; }
done
[ -z "${MIGRATE_ONLY:-}" ] || exit 0
rolled_out() { $kubectl -n smdih rollout status "$@" --timeout="$rollout_timeout"; }

if [ -z "$($kubectl -n smdih get deployment door --ignore-not-found -o name)" ]; then
  apply -l smdih/step=processes
  rolled_out -l smdih/step=processes deployment,statefulset
else
  # Who reads a topic before who writes it, so that nothing new is read by the release before (docs/operations.md).
  for name in funding matching anomaly anomaly-notifier anomaly-worker historian mqtt-bridge door; do
    apply -l "smdih/step=processes,app.kubernetes.io/name=$name"
    rolled_out -l "smdih/step=processes,app.kubernetes.io/name=$name" deployment,statefulset
  done
fi
