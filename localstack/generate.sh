#!/usr/bin/env bash
# Builds gen/ (Python messages, gRPC stubs and their types) from proto/.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf gen && mkdir gen
PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m grpc_tools.protoc -I proto \
  --python_out=gen --grpc_python_out=gen --mypy_out=quiet:gen --mypy_grpc_out=quiet:gen \
  $(find proto -name '*.proto' | sort)
