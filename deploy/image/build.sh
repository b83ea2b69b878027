#!/usr/bin/env bash
# Builds Culvert's image, one static file on top of nothing, without pulling anything.
#
#   deploy/image/build.sh [--binary FILE] [--tag NAME] [--tool buildah|docker|podman] [--output FILE] [--dry-run]
#
#   --binary FILE   this binary, which must be static [default: cargo builds one, release]
#   --tag NAME      name of the image [default: culvert:dev]
#   --tool TOOL     what builds it [default: the first of docker, podman, buildah that is there]
#   --output FILE   also writes the image as a docker archive, as `deploy/kind/up.sh --archive` takes it
#   --dry-run       only prints the commands
#
# docker build -f deploy/image/Dockerfile builds the same image from source, inside of the compiler's image.
# shellcheck source=deploy/prelude.sh
source "$(dirname "$0")/../prelude.sh"
here="$(cd "$(dirname "$0")" && pwd)"
repository="$(cd "$here/../.." && pwd)"

binary="" tag="culvert:dev" tool="" output=""
while [ $# -gt 0 ]; do
  case "$1" in
    --binary | --tag | --tool | --output)
      [ $# -ge 2 ] || wrong_usage "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --dry-run) dry_run=print ;;
    -h | --help) print_help && exit 0 ;;
    *) wrong_usage "unknown argument $1" ;;
  esac
  shift
done

if [ -z "$tool" ]; then
  for tool in docker podman buildah; do
    command -v "$tool" >/dev/null && break
  done
fi
case "$tool" in
  buildah) need buildah "the package buildah of your distribution" ;;
  docker | podman) need "$tool" "a container engine; buildah will do as well" ;;
  *) wrong_usage "--tool $tool is none of buildah, docker, podman" ;;
esac

if [ -z "$binary" ]; then
  need cargo "the Rust toolchain, 1.95 or newer"
  target="${CARGO_TARGET_DIR:-$repository/target}"
  # The flag is for the last link only: what the usual build has compiled is used again.
  run env CARGO_TARGET_DIR="$target" cargo rustc --manifest-path "$repository/Cargo.toml" --locked --release --bin culvert -- -C target-feature=+crt-static
  binary="$target/release/culvert"
fi
need readelf "it tells whether a binary is static; the package binutils"
if [ -z "$dry_run" ]; then
  [ -f "$binary" ] || die "there is no file $binary"
  headers="$(readelf --program-headers --dynamic --wide "$binary" 2>&1)" || die "$binary is not an ELF file"
  # An interpreter or a library would have to be in the image.
  if grep -qE 'INTERP|\(NEEDED\)' <<<"$headers"; then
    die "$binary is not static: link it with cargo rustc --release --bin culvert -- -C target-feature=+crt-static"
  fi
fi

staging="/staging"
if [ -z "$dry_run" ]; then
  staging="$(mktemp -d)"
  trap 'rm -rf "$staging"' EXIT
fi
run install -m 755 "$binary" "$staging/culvert"

arguments=(--build-arg BINARY=given -f "$here/Dockerfile" -t "$tag" "$staging")
case "$tool" in
  # chroot needs no runtime, as nothing is run; the same binary gives the same image.
  buildah) run buildah build --isolation chroot --pull-never --timestamp 0 "${arguments[@]}" ;;
  podman) run podman build --pull=never --timestamp 0 "${arguments[@]}" ;;
  docker) run docker build --pull=false "${arguments[@]}" ;;
esac

if [ -n "$output" ]; then
  run rm -f "$output"
  case "$tool" in
    buildah) run buildah push "$tag" "docker-archive:$output:$tag" ;;
    podman) run podman save --format docker-archive -o "$output" "$tag" ;;
    docker) run docker save -o "$output" "$tag" ;;
  esac
fi
say "$tag is built"
