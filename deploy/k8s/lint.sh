#!/usr/bin/env bash
# Every overlay, as the server would be given it: built by kustomize, checked against the schemas of Kubernetes, judged by checkov.
# Needs no cluster, and no network once its tools are installed. usage: lint.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=.local/k8s/venv
version=1.34.0
mkdir -p .local/k8s .local/log
want=$(sha256sum requirements/k8s.txt | cut -d' ' -f1)
if [ "$(cat $tools/.stamp 2>/dev/null)" != "$want" ]; then
  echo "k8s-lint: tools" >&2
  [ -x $tools/bin/python ] || .venv/bin/uv venv -q --python .venv/bin/python $tools
  .venv/bin/uv pip sync -q --require-hashes --python $tools/bin/python requirements/k8s.txt
  echo "$want" >$tools/.stamp
fi
rm -rf .local/k8s/rendered && mkdir .local/k8s/rendered
for overlay in deploy/k8s/overlays/*/; do
  $tools/bin/kubectl kustomize "$overlay" >".local/k8s/rendered/$(basename "$overlay").yaml"
done
# What operators define has no schema among those of Kubernetes; tests/unit/test_kubernetes.py looks at it.
$tools/bin/python deploy/k8s/builtin.py .local/k8s/rendered/*.yaml
$tools/bin/kubernetes-validate -k $version --strict --quiet .local/k8s/rendered/*.yaml.builtin
# Without a key it asks nobody; --skip-download keeps it from looking for newer rules.
CKV_SKIP_PACKAGE_UPDATE_CHECK=true $tools/bin/checkov -d .local/k8s/rendered --framework kubernetes --skip-download --quiet --compact >.local/log/checkov.log 2>&1 ||
  { cat .local/log/checkov.log; exit 1; }
