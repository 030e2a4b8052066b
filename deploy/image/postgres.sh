#!/usr/bin/env bash
# Makes an image of nothing but pg_dump and pg_restore of PostgreSQL 17, with every library that they need: Debian 12, which the
# image stands on, has an older one, and a dump must be taken by one as new as the server. usage: postgres.sh NAME    (as root)
set -euo pipefail
name=${1:?the name that the Containerfile gives it}
: "${SOURCE_DATE_EPOCH:?}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# The architecture's own names are not trusted to the machine's links: the root is a folder, and every path is taken inside of it.
mmdebstrap -q --variant=extract --include=postgresql-client-17 --aptopt='APT::Install-Recommends "false"' \
  --extract-hook="$(realpath "$(dirname "$0")")/status.sh" \
  --dpkgopt='path-exclude=/usr/share/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
  trixie "$work/root" "$(bash "$(dirname "$0")/sources.sh" trixie "$work")"
libraries=$work/root/usr/lib/$(uname -m)-linux-gnu
loader=$(ls "$libraries"/ld-linux-*.so.*)
mkdir -p "$work/postgres"
for program in pg_dump pg_restore; do
  cp "$work/root/usr/lib/postgresql/17/bin/$program" "$work/postgres/"
  "$loader" --library-path "$libraries" --list "$work/postgres/$program" | sed -nE 's#.*=> (/[^ ]+) .*#\1#p' |
    while read -r library; do cp -L "$libraries/$(basename "$library")" "$work/postgres/"; done
done
# With this name they are started (SMDIH_PG_PREFIX): the image's own loader is that of an older release.
cp -L "$loader" "$work/postgres/ld.so"
# What came along of which package, and under which licence.
mkdir "$work/postgres/packages"
cp -r "$work/root/var/lib/dpkg/status" "$work/root/var/lib/dpkg/info" "$work/postgres/packages/"
cp -rT "$work/root/usr/share/doc" "$work/postgres/packages/doc"
container=$(buildah from scratch)
buildah add -q "$container" "$work/postgres" /postgres >/dev/null
buildah commit -q --rm --timestamp "$SOURCE_DATE_EPOCH" "$container" "$name"
