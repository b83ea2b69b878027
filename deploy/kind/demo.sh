#!/usr/bin/env bash
# Shows, in a namespace of its own, what the mesh does: two services in plain, then in the mesh, an allow, a deny, a waypoint.
#
#   deploy/kind/demo.sh [--image NAME] [--keep] [--wait SECONDS] [--name NAME | --context CONTEXT] [--dry-run]
#
#   --image NAME        the image of the services and clients [default: culvert:dev]
#   --keep              leaves the namespace culvert-demo as it is at the end
#   --wait SECONDS      for a policy to arrive, or a log line [default: 30]
#   --name NAME         the kind cluster's name [default: culvert]
#   --context CONTEXT   another cluster's context, out of KUBECONFIG
#   --dry-run           only prints the commands
#
# It says what happened, and why a proxy refused; its exit code is 0 only if every step held.
# shellcheck source=deploy/prelude.sh
source "$(dirname "$0")/../prelude.sh"
files="$(cd "$(dirname "$0")/demo" && pwd)"

image=culvert:dev keep="" context=kind-culvert wait_seconds=30
while [ $# -gt 0 ]; do
  case "$1" in
    --image | --wait | --name | --context)
      [ $# -ge 2 ] || wrong_usage "$1 needs a value"
      case "$1" in
        --image) image="$2" ;;
        --wait) wait_seconds="$2" ;;
        --name) context="kind-$2" ;;
        --context) context="$2" ;;
      esac
      shift
      ;;
    --keep) keep=yes ;;
    --dry-run) dry_run=print ;;
    -h | --help) print_help && exit 0 ;;
    *) wrong_usage "unknown argument $1" ;;
  esac
  shift
done
[[ "$wait_seconds" =~ ^[0-9]{1,5}$ ]] || wrong_usage "--wait $wait_seconds is not a number of seconds"
need_kubectl
need_istioctl
use_context "$context"
readonly namespace=culvert-demo
inside=("${kubectl[@]}" -n "$namespace")
istio=("${kubectl[@]}" -n istio-system)

failed=0
held() { say "    ✓ $*"; }
broken() {
  say "    ✗ $*"
  failed=$((failed + 1))
}
step() { say "" && say "== $*"; }

# The last answer, whether there was one, and what a refusal must say.
answer="" refused="" because=""
try() {
  local pod="$1"
  shift
  if answer="$("${inside[@]}" exec "$pod" -- /culvert lab "$@" 2>&1)"; then refused=""; else refused=yes; fi
}
answered() { try "$@" && [ -z "$refused" ]; }
denied() { try "$@" && [ -n "$refused" ] && [[ "$answer" == *"$because"* ]]; }

# expect answered|denied POD COMMAND…: what comes to hold within a while, as policies take a moment to arrive.
expect() {
  local how="$1" pod="$2"
  shift
  printf '%s\n' "$(command_line "${inside[@]}" exec "$pod" -- /culvert lab "${@:2}")" >&3
  if [ "$dry_run" = print ]; then return; fi
  if until_true "$wait_seconds" "$how" "$@"; then
    held "$pod is $how: ${answer%%$'\n'*}"
  else
    broken "$pod should be $how, but: ${answer%%$'\n'*}"
  fi
}

# The name of the proxy that serves a pod.
proxy_of() {
  local node
  node="$(ask NODE "${inside[@]}" get pod "$1" -o 'jsonpath={.spec.nodeName}')"
  ask PROXY "${istio[@]}" get pods -l app=ztunnel --field-selector "spec.nodeName=$node" -o 'jsonpath={.items[0].metadata.name}'
}

# line_of POD PATTERN: the newest line of its proxy's log about it that has the pattern.
line=""
line_of() {
  local proxy
  proxy="$(proxy_of "$1")"
  line="$(ask "" "${istio[@]}" logs "$proxy" -c istio-proxy --since=60s | grep -F "dst.workload=\"$1\"" | grep -E "$2" | tail -n 1)" || true
  [ -n "$line" ]
}
# field NAME: NAME="…" of that line.
field() { sed -n "s/.*[[:space:]]$1=\"\([^\"]*\)\".*/\1/p" <<<"$line"; }
say_reason() {
  if until_true "$wait_seconds" line_of "$1" 'error='; then
    held "its proxy says: $(field src.identity): $(field error)"
  elif [ -z "$dry_run" ]; then
    broken "the proxy of $1 has no word about it"
  fi
}

clean_up() {
  if [ -n "$keep" ]; then
    say "" && say "kept: kubectl delete namespace $namespace ends it"
  else
    run "${kubectl[@]}" delete namespace "$namespace" --ignore-not-found --wait=false
  fi
}
trap clean_up EXIT

step "two services and two clients, not in the mesh"
run "${kubectl[@]}" delete namespace "$namespace" --ignore-not-found
objects="$(sed "s|image: culvert:dev|image: $image|" "$files/workloads.yaml")"
run_text "$objects" "${kubectl[@]}" apply -f -
run "${inside[@]}" wait --for=condition=Ready pod --all --timeout=120s
expect answered visitor get http://web/
expect answered visitor talk ledger:7000 hello

step "the namespace joins the mesh: the same pods, now with identities"
run "${kubectl[@]}" label namespace "$namespace" istio.io/dataplane-mode=ambient --overwrite
captured() {
  local pods
  pods="$(ask "enabled enabled enabled enabled" "${inside[@]}" get pods -o 'jsonpath={.items[*].metadata.annotations.ambient\.istio\.io/redirection}')"
  [ "$(grep -ow enabled <<<"$pods" | grep -c .)" = 4 ]
}
until_true "$wait_seconds" captured || die "istio-cni did not take the pods into the mesh"
expect answered shop get http://web/
if until_true "$wait_seconds" line_of web 'src.identity='; then
  held "web's proxy saw $(field src.identity)"
elif [ -z "$dry_run" ]; then
  broken "web's proxy saw no identity"
fi

step "allow: only the shop may talk to the ledger"
run "${kubectl[@]}" apply -f "$files/allow.yaml"
expect denied visitor talk ledger:7000 hello
say_reason ledger
expect answered shop talk ledger:7000 hello

step "deny: no visitors at web"
run "${kubectl[@]}" apply -f "$files/deny.yaml"
expect denied visitor get http://web/
say_reason web
expect answered shop get http://web/

step "waypoint: requests are judged by method and path"
if [ -z "$(ask gateways "${kubectl[@]}" get crd gateways.gateway.networking.k8s.io --ignore-not-found -o name)" ]; then
  say "    left out: the Gateway API's definitions are not in the cluster; up.sh --gateway-api FILE brings them"
else
  run "${kubectl[@]}" delete -f "$files/deny.yaml"
  run "${istioctl[@]}" waypoint apply -n "$namespace" --enroll-namespace --overwrite --wait
  run "${kubectl[@]}" apply -f "$files/waypoint.yaml"
  expect answered shop get http://web/public
  # What the waypoint answers; a proxy of a node would close the connection.
  because="RBAC: access denied"
  expect denied shop get http://web/private
  expect denied visitor get http://web/public
fi

if [ -n "$dry_run" ]; then exit; fi
say ""
if [ "$failed" != 0 ]; then
  say "$failed steps did not hold"
  exit 1
fi
say "every step held"
