#!/usr/bin/env bash
# Puts Culvert in ztunnel's place on nodes of an Istio ambient mesh, or ztunnel back; istiod and istio-cni stay as they are.
#
#   deploy/kind/swap.sh culvert|ztunnel|status [--node NODE]… [--image NAME] [--wait SECONDS] [--name NAME | --context CONTEXT]
#                       [--dry-run[=server]]
#
#   culvert             Culvert serves the nodes: it starts beside ztunnel, and ztunnel goes when Culvert is ready
#   ztunnel             the same the other way; when no node is left to Culvert, Istio's DaemonSet is again what it was
#   status              who serves which node
#
#   --node NODE         this node; may be given again [default: all nodes of Linux]
#   --image NAME        Culvert's image [default: culvert:dev]
#   --wait SECONDS      for a proxy to come or go [default: 180]
#   --name NAME         the kind cluster's name [default: culvert]
#   --context CONTEXT   another cluster's context, out of KUBECONFIG
#   --dry-run           only prints the commands
#   --dry-run=server    asks the cluster, and lets its API server check every change without making it
#
# New connections do not fail meanwhile; those that the leaving proxy carries may go on for its grace period and are then cut.
# shellcheck source=deploy/prelude.sh
source "$(dirname "$0")/../prelude.sh"
manifest="$(cd "$(dirname "$0")/.." && pwd)/ztunnel-replacement/labelled-nodes/daemonset.yaml"

target="" nodes=() image=culvert:dev context=kind-culvert wait_seconds=180
while [ $# -gt 0 ]; do
  case "$1" in
    culvert | ztunnel | status)
      [ -z "$target" ] || wrong_usage "$target or $1?"
      target="$1"
      ;;
    --node | --image | --wait | --name | --context)
      [ $# -ge 2 ] || wrong_usage "$1 needs a value"
      case "$1" in
        --node) nodes+=("$2") ;;
        --image) image="$2" ;;
        --wait) wait_seconds="$2" ;;
        --name) context="kind-$2" ;;
        --context) context="$2" ;;
      esac
      shift
      ;;
    --dry-run) dry_run=print ;;
    --dry-run=server) dry_run=server ;;
    -h | --help) print_help && exit 0 ;;
    *) wrong_usage "unknown argument $1" ;;
  esac
  shift
done
[ -n "$target" ] || wrong_usage "say culvert, ztunnel or status"
[[ "$wait_seconds" =~ ^[0-9]{1,5}$ ]] || wrong_usage "--wait $wait_seconds is not a number of seconds"
need_kubectl
use_context "$context"
istio=("${kubectl[@]}" -n istio-system)

# Both, one after the other, so that a node is never without: `both` adds a proxy, its own name takes the other one away.
readonly label=culvert/node-proxy
readonly of_culvert=app.kubernetes.io/name=culvert
readonly of_ztunnel="app=ztunnel,app.kubernetes.io/name!=culvert"
# Where the way back is kept.
readonly kept=culvert/update-strategy

server_dry_run=()
if [ "$dry_run" = server ]; then server_dry_run=(--dry-run=server); fi
change() { run "$@" "${server_dry_run[@]}"; }
change_text() {
  local text="$1"
  shift
  run_text "$text" "$@" "${server_dry_run[@]}"
}

ready() {
  local conditions
  conditions="$(ask True "${istio[@]}" get pods -l "$1" --field-selector "spec.nodeName=$2" -o 'jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}')"
  [[ " $conditions " == *" True "* ]]
}
gone() {
  [ -z "$(ask "" "${istio[@]}" get pods -l "$1" --field-selector "spec.nodeName=$2" -o name)" ]
}
mark_node() {
  change "${kubectl[@]}" label node "$1" "$label${2:+=}${2:--}" --overwrite
}

# replace NODE NEW NEW_SELECTOR OLD_SELECTOR LABEL: one proxy for another; LABEL is the node's when it is done (nothing: none).
replace() {
  local node="$1" new="$2" new_selector="$3" old_selector="$4" final="$5" before
  before="$(ask "" "${kubectl[@]}" get node "$node" -o "jsonpath={.metadata.labels.${label//./\\.}}")"
  if [ "$before" = "$final" ] && { [ "$dry_run" = server ] || ready "$new_selector" "$node"; } && [ "$dry_run" != print ]; then
    say "$node: $new serves it already"
    return
  fi
  mark_node "$node" both
  if [ "$dry_run" = server ]; then
    say "$node: here it would wait until $new is ready, and then until the other one is gone"
  elif ! until_true "$wait_seconds" ready "$new_selector" "$node"; then
    "${istio[@]}" logs -l "$new_selector" --prefix --tail=20 >&2 || true
    mark_node "$node" "$before"
    die "$new is not ready on $node within $wait_seconds s; the node is left to the other one. Pods that started meanwhile may need to be started again"
  fi
  mark_node "$node" "$final"
  if [ "$dry_run" != server ]; then
    until_true "$wait_seconds" gone "$old_selector" "$node" || die "the other proxy does not leave $node within $wait_seconds s"
  fi
  say "$node: $new serves it"
}

if [ "$target" = status ]; then
  run "${kubectl[@]}" get nodes -L "$label"
  run "${istio[@]}" get pods -l app=ztunnel -o wide
  exit
fi

affinity="$(ask "" "${istio[@]}" get daemonset ztunnel -o 'jsonpath={.spec.template.spec.affinity}')" ||
  die "cannot read the DaemonSet istio-system/ztunnel: is this the right cluster ($context), with Istio in ambient mode? Where Istio was installed without ztunnel, apply deploy/ztunnel-replacement/every-node"
prepared=""
if [[ "$affinity" == *"\"$label\""* ]]; then prepared=yes; fi
if [ -n "$affinity" ] && [ -z "$prepared" ]; then
  die "the DaemonSet ztunnel has an affinity of its own, which this script would have to change: $affinity"
fi
for node in "${nodes[@]}"; do
  ask "$node" "${kubectl[@]}" get node "$node" -o name >/dev/null || die "there is no node $node"
done

if [ "$target" = culvert ]; then
  if [ ${#nodes[@]} = 0 ]; then
    names="$(ask NODE "${kubectl[@]}" get nodes -l kubernetes.io/os=linux -o 'jsonpath={.items[*].metadata.name}')"
    read -ra nodes <<<"$names"
  fi
  # What this mesh told ztunnel about itself holds for Culvert.
  variables="$(ask NETWORK=NETWORK "${istio[@]}" get daemonset ztunnel -o 'jsonpath={range .spec.template.spec.containers[0].env[*]}{.name}={.value}{"\n"}{end}')"
  mapfile -t variables < <(grep -E '^(XDS_ADDRESS|CA_ADDRESS|XDS_ROOT_CA|CA_ROOT_CA|NETWORK|CLUSTER_ID|ISTIO_META_CLUSTER_ID|TRUST_DOMAIN|IPV6_ENABLED)=.' <<<"$variables" || true)
  object="$(ask OBJECT kubectl set image --local -f "$manifest" "istio-proxy=$image" -o yaml)"
  if [ ${#variables[@]} != 0 ]; then
    object="$(ask OBJECT kubectl set env --local -f - "${variables[@]}" -o yaml <<<"$object")"
  fi
  change_text "$object" "${kubectl[@]}" apply -f -
  if [ -z "$prepared" ]; then
    strategy="$(ask '{}' "${istio[@]}" get daemonset ztunnel -o 'jsonpath={.spec.updateStrategy}')"
    change "${istio[@]}" annotate daemonset ztunnel "$kept=$strategy" --overwrite
    # OnDelete: on the other nodes nothing is started again because of it.
    expression="{\"key\":\"$label\",\"operator\":\"NotIn\",\"values\":[\"culvert\"]}"
    node_affinity="{\"requiredDuringSchedulingIgnoredDuringExecution\":{\"nodeSelectorTerms\":[{\"matchExpressions\":[$expression]}]}}"
    change "${istio[@]}" patch daemonset ztunnel --type=merge -p \
      "{\"spec\":{\"updateStrategy\":{\"type\":\"OnDelete\",\"rollingUpdate\":null},\"template\":{\"spec\":{\"affinity\":{\"nodeAffinity\":$node_affinity}}}}}"
  fi
  for node in "${nodes[@]}"; do replace "$node" Culvert "$of_culvert" "$of_ztunnel" culvert; done
  exit
fi

if [ ${#nodes[@]} = 0 ]; then
  names="$(ask NODE "${kubectl[@]}" get nodes -l "$label" -o 'jsonpath={.items[*].metadata.name}')"
  read -ra nodes <<<"$names"
fi
for node in "${nodes[@]}"; do replace "$node" ztunnel "$of_ztunnel" "$of_culvert" ""; done
left="$(ask "" "${kubectl[@]}" get nodes -l "$label" -o 'jsonpath={.items[*].metadata.name}')"
if [ -n "$left" ] && [ "$dry_run" != server ]; then
  say "still Culvert's: $left"
  exit
fi
if [ -n "$prepared" ] || [ "$dry_run" = print ]; then
  strategy="$(ask '{}' "${istio[@]}" get daemonset ztunnel -o "jsonpath={.metadata.annotations.${kept//./\\.}}")"
  # Istio's default, should the note be lost.
  if [ -z "$strategy" ]; then strategy='{"type":"RollingUpdate","rollingUpdate":{"maxSurge":1,"maxUnavailable":0}}'; fi
  # The template is again the one that ztunnel's pods of other nodes were made from: they stay.
  change "${istio[@]}" patch daemonset ztunnel --type=merge -p \
    "{\"metadata\":{\"annotations\":{\"$kept\":null}},\"spec\":{\"updateStrategy\":$strategy,\"template\":{\"spec\":{\"affinity\":null}}}}"
  if [ "$dry_run" != server ]; then run "${istio[@]}" rollout status daemonset/ztunnel "--timeout=${wait_seconds}s"; fi
fi
change "${istio[@]}" delete daemonset culvert --ignore-not-found
