#!/usr/bin/env bash
# Makes a kind cluster with Istio in ambient mode and Culvert's image on its nodes; ztunnel still serves them (see swap.sh).
#
#   deploy/kind/up.sh [--name NAME] [--workers N] [--dual-stack] [--image NAME | --archive FILE] [--gateway-api FILE]
#                     [--istio-set NAME=VALUE]… [--dry-run]
#
#   --name NAME          the cluster's name; its context is kind-NAME [default: culvert]
#   --workers N          nodes beside the control plane [default: 2]
#   --dual-stack         IPv4 and IPv6 [default: IPv4]
#   --image NAME         the image, known to docker; deploy/image/build.sh makes it [default: culvert:dev]
#   --archive FILE       the image as deploy/image/build.sh --output wrote it; docker need not know it
#   --gateway-api FILE   the Gateway API's resource definitions, which waypoints need: the release's standard-install.yaml
#   --istio-set K=V      a further setting for istioctl install --set
#   --dry-run            only prints the commands
#
# It may be run again: what is there stays. KUBECONFIG says where the cluster's context is written to.
# shellcheck source=deploy/prelude.sh
source "$(dirname "$0")/../prelude.sh"

name=culvert workers=2 family=ipv4 image=culvert:dev archive="" gateway_api="" istio_set=()
while [ $# -gt 0 ]; do
  case "$1" in
    --name | --workers | --image | --archive | --gateway-api | --istio-set)
      [ $# -ge 2 ] || wrong_usage "$1 needs a value"
      case "$1" in
        --name) name="$2" ;;
        --workers) workers="$2" ;;
        --image) image="$2" ;;
        --archive) archive="$2" ;;
        --gateway-api) gateway_api="$2" ;;
        --istio-set) istio_set+=(--set "$2") ;;
      esac
      shift
      ;;
    --dual-stack) family=dual ;;
    --dry-run) dry_run=print ;;
    -h | --help) print_help && exit 0 ;;
    *) wrong_usage "unknown argument $1" ;;
  esac
  shift
done
[[ "$workers" =~ ^[0-9]$ ]] || wrong_usage "--workers $workers is not a number below 10"
use_context "kind-$name"

need kind "Kubernetes in containers, 0.23 or newer; from the kind release or your distribution"
need_kubectl
need_istioctl
if [ -z "$archive" ]; then
  need docker "the container engine that kind uses and that knows the image; without it, give the image by --archive"
  ask "" docker image inspect --format '{{.Id}}' "$image" >/dev/null || die "docker knows no image $image: deploy/image/build.sh makes it"
elif [ -z "$dry_run" ] && [ ! -f "$archive" ]; then
  die "there is no file $archive: deploy/image/build.sh --output makes it"
fi
if [ -n "$gateway_api" ] && [ -z "$dry_run" ] && [ ! -f "$gateway_api" ]; then die "there is no file $gateway_api"; fi

clusters="$(ask "" kind get clusters)"
if grep -qxF -- "$name" <<<"$clusters"; then
  say "the cluster $name is there"
else
  config="kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking:
  ipFamily: $family
nodes:
  - role: control-plane"
  for ((i = 0; i < workers; i++)); do config+=$'\n  - role: worker'; done
  run_text "$config" kind create cluster --name "$name" --wait 180s --config -
fi

if [ -n "$archive" ]; then
  run kind load image-archive "$archive" --name "$name"
else
  run kind load docker-image "$image" --name "$name"
fi

if [ -n "$gateway_api" ]; then run "${kubectl[@]}" apply --server-side -f "$gateway_api"; fi

parts=(deployment/istiod daemonset/istio-cni-node)
# Installing again would bring ztunnel back to nodes that swap.sh gave to Culvert.
if [ -n "$(ask "" "${kubectl[@]}" -n istio-system get daemonset culvert --ignore-not-found -o name)" ]; then
  say "Culvert is in place, so Istio stays as it is"
else
  settings=(--set profile=ambient)
  if [ "$family" = dual ]; then
    settings+=(--set values.pilot.env.ISTIO_DUAL_STACK=true --set values.pilot.ipFamilyPolicy=RequireDualStack)
  fi
  parts+=(daemonset/ztunnel)
  run "${istioctl[@]}" install --skip-confirmation "${settings[@]}" "${istio_set[@]}"
fi
for part in "${parts[@]}"; do
  run "${kubectl[@]}" -n istio-system rollout status "$part" --timeout=300s
done
say "ready: deploy/kind/swap.sh puts Culvert in ztunnel's place, deploy/kind/demo.sh shows what it does, deploy/kind/down.sh ends it"
