#!/usr/bin/env bash
# Makes the base of the image from Debian packages, where no container registry is reachable: Python and what it links to,
# no shell, no package manager. usage: base.sh NAME    (as root; buildah and mmdebstrap)
set -euo pipefail
name=${1:?the name that the Containerfile gives its base}
suite=bookworm
: "${SOURCE_DATE_EPOCH:?}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

from=$(bash "$(dirname "$0")/sources.sh" $suite "$work")
# extract: files only, no package's scripts run; enough for a root without a shell in use.
mmdebstrap -q --variant=extract --include=base-files,netbase,python3-minimal,libpython3.11-stdlib,ca-certificates,tzdata,libstdc++6,libgomp1,zlib1g,libssl3,libexpat1,libffi8,libsqlite3-0,libbz2-1.0,liblzma5 \
  --aptopt='APT::Install-Recommends "false"' --extract-hook="$(realpath "$(dirname "$0")")/status.sh" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  "$suite" "$work/root.tar" "$from"
container=$(buildah from scratch)
buildah add -q "$container" "$work/root.tar" / >/dev/null
buildah config --env PATH=/usr/local/bin:/usr/bin:/bin "$container"
buildah commit -q --rm --timestamp "$SOURCE_DATE_EPOCH" "$container" "$name"
