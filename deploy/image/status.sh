#!/usr/bin/env bash
# Run by mmdebstrap once it has unpacked packages: writes what a package manager would have noted of them, so that whoever looks into
# the image sees what it is made of. usage: status.sh ROOT
set -euo pipefail
dpkg=${1:?the root that they were unpacked into}/var/lib/dpkg
mkdir -p "$dpkg/info"
: >"$dpkg/status"
for package in "$1"/var/cache/apt/archives/*.deb; do
  dpkg-deb --field "$package" | sed '1a Status: install ok unpacked' >>"$dpkg/status"
  echo >>"$dpkg/status"
  dpkg-deb --fsys-tarfile "$package" | tar --list | sed 's#^\.##; s#/$##; s#^$#/.#' >"$dpkg/info/$(dpkg-deb --field "$package" Package).list"
done
