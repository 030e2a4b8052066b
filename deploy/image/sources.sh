#!/usr/bin/env bash
# Writes the machine's own package source, pointed at a release of Debian with its updates, and prints the file. usage: sources.sh SUITE FOLDER
set -euo pipefail
suite=${1:?a release of Debian} folder=${2:?a folder}
if [ -f /etc/apt/sources.list.d/debian.sources ]; then
  sed -E "s/^Suites:.*-security.*/Suites: $suite-security/; t; s/^Suites:.*/Suites: $suite $suite-updates/" \
    /etc/apt/sources.list.d/debian.sources >"$folder/$suite.sources"
  echo "$folder/$suite.sources"
else
  grep '^deb ' /etc/apt/sources.list | sed -E "s#^(deb +(\[[^]]*\] +)?[^ ]+) +[a-z]+(-security|-updates)? .*#\1 $suite\3 main#" >"$folder/$suite.list"
  echo "$folder/$suite.list"
fi
