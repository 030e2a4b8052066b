#!/usr/bin/env bash
# Builds the image without a container engine and writes it to .local/image/smdih-hub.tar (and its bill of materials beside it), an archive that `ctr images import`,
# `kind load image-archive` and `podman load` take. usage: build.sh    (as root; after `make setup`)
# IMAGE: its name (localhost/smdih-hub:dev)   BASE: an image by digest in place of the one made from Debian packages
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
image=${IMAGE:-localhost/smdih-hub:dev}
# Named by how they are made, so that a change of that makes them anew.
made_by=$(cat deploy/image/{base,postgres,sources,status}.sh | sha256sum | cut -c1-12)
postgres=localhost/smdih-postgres:$made_by
base=${BASE:-localhost/smdih-python:$made_by}
folder=.local/image
mkdir -p $folder/wheels .local/log
# The commit's time stands for every time in the image.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1)}
export SOURCE_DATE_EPOCH

say() { printf 'image: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

[ "$(id -u)" = 0 ] || fail "needs root: buildah makes the image in a chroot"
missing=()
for program in buildah mmdebstrap runc; do command -v $program >/dev/null || missing+=($program); done
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]}"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"; } \
    >.local/log/apt-image.log 2>&1 || fail "apt-get could not install ${missing[*]}: see .local/log/apt-image.log"
fi

want=$(cat requirements/{base,model,image}.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat $folder/wheels/.stamp 2>/dev/null)" != "$want" ]; then
  say "wheels"
  rm -rf $folder/wheels && mkdir $folder/wheels
  for name in base model image; do  # each with its own list of hashes
    .venv/bin/python -m pip download -q --disable-pip-version-check --no-cache-dir --no-deps --require-hashes \
      --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
      $(for libc in 28 27 24 17 12 5; do echo --platform manylinux_2_${libc}_"$(uname -m)"; done) \
      --platform manylinux2014_"$(uname -m)" -r requirements/$name.txt -d $folder/wheels \
      >>.local/log/wheels.log 2>&1 || fail "wheels could not be fetched: see .local/log/wheels.log"
  done
  echo "$want" >$folder/wheels/.stamp
fi

if [ -z "${BASE:-}" ] && ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  say "base from Debian packages"
  bash deploy/image/base.sh "$base" >.local/log/image-base.log 2>&1 || fail "the base could not be made: see .local/log/image-base.log"
fi

if ! buildah inspect --type image $postgres >/dev/null 2>&1; then
  say "PostgreSQL's client programs from Debian packages"
  bash deploy/image/postgres.sh $postgres >.local/log/image-postgres.log 2>&1 || fail "they could not be made: see .local/log/image-postgres.log"
fi

say "$image"
[ -z "${BASE:-}" ] || buildah pull -q "$base" >/dev/null
# The compiler of the detector's kernel goes by addresses, so these are the same each time.
setarch "$(uname -m)" -R buildah bud -q --isolation chroot --pull-never --timestamp "$SOURCE_DATE_EPOCH" --build-arg BASE="$base" --build-arg POSTGRES=$postgres \
  --label org.opencontainers.image.title="Smart Manufacturing Data Innovation Hub" \
  --label org.opencontainers.image.licenses=Apache-2.0 \
  --label org.opencontainers.image.revision="$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  -t "$image" -f deploy/image/Containerfile . >$folder/id
rm -f $folder/smdih-hub.tar
buildah push -q "$image" "docker-archive:$folder/smdih-hub.tar:$image"
# What it is made of, beside it.
.venv/bin/python -m deploy.image.bill "$image" $folder/smdih-hub.cdx.json
say "$(cat $folder/id) $(du -m $folder/smdih-hub.tar | cut -f1) MB in $folder/smdih-hub.tar"
