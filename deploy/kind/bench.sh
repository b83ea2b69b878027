#!/usr/bin/env bash
# Measures pod to pod, on one node and across two: without a mesh, through ztunnel, through Culvert; prints a table.
#
#   deploy/kind/bench.sh [--rounds N] [--seconds S] [--only FIGURE,…] [--samples FILE] [--image NAME] [--name NAME] [--engine TOOL] [--keep]
#                        [--dry-run]
#   deploy/kind/bench.sh --table FILE
#
#   --rounds N       rounds that count; one more comes first and does not [default: 4]
#   --seconds S      length of a trial [default: 5]
#   --only FIGURE,…  of bulk-up, bulk-down, requests-1, requests-32, connections-16 [default: all]
#   --samples FILE   also keeps every trial's numbers, as --table reads them
#   --image NAME     the image of load and of Culvert [default: culvert:dev]
#   --name NAME      the kind cluster's name [default: culvert]
#   --engine TOOL    what runs kind's nodes: docker, podman or nerdctl [default: docker]
#   --keep           leaves its pods
#   --table FILE     only prints the table of kept numbers
#   --dry-run        only prints the commands of a first round
#
# The proxies take turns on the same two nodes, in the opposite order each round, so that what the machine does besides meets all alike. Figures
# are medians over rounds; the last column is the median of the ratios within a round. CPU is the proxies' own, by the kernel's account of their
# threads. All nodes share one machine: compare figures of one table, not of two.
# shellcheck source=deploy/prelude.sh
source "$(dirname "$0")/../prelude.sh"
here="$(cd "$(dirname "$0")" && pwd)"

rounds=4 seconds=5 figures=bulk-up,bulk-down,requests-1,requests-32,connections-16 samples="" image=culvert:dev name=culvert engine=docker keep="" table=""
while [ $# -gt 0 ]; do
  case "$1" in
    --rounds | --seconds | --only | --samples | --image | --name | --engine | --table)
      [ $# -ge 2 ] || wrong_usage "$1 needs a value"
      case "$1" in
        --rounds) rounds="$2" ;;
        --seconds) seconds="$2" ;;
        --only) figures="$2" ;;
        --samples) samples="$2" ;;
        --image) image="$2" ;;
        --name) name="$2" ;;
        --engine) engine="$2" ;;
        --table) table="$2" ;;
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
for number in "$rounds" "$seconds"; do
  [[ "$number" =~ ^[1-9][0-9]{0,3}$ ]] || wrong_usage "$number is not a number of rounds or seconds"
done
IFS=, read -ra figures <<<"$figures"
for figure in "${figures[@]}"; do
  [[ "$figure" =~ ^(bulk-up|bulk-down|requests-[1-9][0-9]*|connections-[1-9][0-9]*)$ ]] || wrong_usage "there is no figure $figure"
done

# print_table FILE: lines of round, contestant, place, figure, quantity, value, with tabs between; round 0 does not count.
print_table() {
  awk -F '\t' -f "$here/bench-table.awk" "$1"
}
if [ -n "$table" ]; then
  [ -f "$table" ] || die "there is no file $table"
  print_table "$table"
  exit
fi

need_kubectl
need "$engine" "the container engine that runs kind's nodes; the proxies' CPU time is read through it"
use_context "kind-$name"

# Nanoseconds that each thread of a node's proxies has been on a CPU, waited for one, and how often it got one.
# shellcheck disable=SC2016 # the node's shell expands it
readonly cpu_script='for process in /proc/[0-9]*; do
  set -- $(tr "\0" " " <"$process/cmdline" 2>/dev/null)
  case "${1##*/} $2" in "ztunnel proxy" | "culvert proxy") cat "$process"/task/*/schedstat ;; esac
done'
# shellcheck disable=SC2016
readonly machine_script='echo "$(nproc) CPUs, Linux $(uname -r), $(cat /proc/sys/net/ipv4/tcp_congestion_control)"'
cpu_of() {
  local node text total=0 of_one
  for node in "$@"; do
    text="$(ask "1 0 0" "$engine" exec "$node" sh -c "$cpu_script")"
    of_one="$(awk '{ sum += $1 } END { printf "%.0f", sum }' <<<"$text")"
    [ "$of_one" != 0 ] || die "no proxy runs on node $node"
    total=$((total + of_one))
  done
  printf '%s' "$total"
}

names="$(ask "NODE1 NODE2" "${kubectl[@]}" get nodes -l '!node-role.kubernetes.io/control-plane' -o 'jsonpath={.items[*].metadata.name}')"
read -ra nodes <<<"$names"
[ ${#nodes[@]} -ge 2 ] || die "the cluster has ${#nodes[@]} nodes beside its control plane, two are needed: up.sh --workers 2"
near="${nodes[0]}" far="${nodes[1]}"

records="$samples"
if [ -n "$dry_run" ]; then
  records=/dev/null rounds=0 figures=("${figures[0]}")
elif [ -z "$records" ]; then
  records="$(mktemp)"
fi
: >"$records"

run "${kubectl[@]}" label node "$near" culvert/bench=near --overwrite
run "${kubectl[@]}" label node "$far" culvert/bench=far --overwrite
run_text "$(sed "s|image: culvert:dev|image: $image|" "$here/bench.yaml")" "${kubectl[@]}" apply -f -
for namespace in culvert-bench culvert-bench-plain; do
  run "${kubectl[@]}" -n "$namespace" wait --for=condition=Ready pod --all --timeout=120s
done
captured() {
  local pods
  pods="$(ask "enabled enabled enabled" "${kubectl[@]}" -n culvert-bench get pods -o 'jsonpath={.items[*].metadata.annotations.ambient\.istio\.io/redirection}')"
  [ "$(grep -ow enabled <<<"$pods" | grep -c .)" = 3 ]
}
until_true 60 captured || die "istio-cni did not take the pods into the mesh"

declare -A address
for namespace in culvert-bench culvert-bench-plain; do
  for server in server-near server-far; do
    found="$(ask "$server" "${kubectl[@]}" -n "$namespace" get pod "$server" -o 'jsonpath={.status.podIP}')"
    if [[ "$found" == *:* ]]; then found="[$found]"; fi
    address[$namespace/$server]="$found"
  done
done

# take ROUND CONTESTANT PLACE FIGURE: one trial.
take() {
  local namespace=culvert-bench server=server-near of=("$near") kind="$4" connections=1 before=0 after=0 said target
  if [ "$2" = none ]; then namespace=culvert-bench-plain; fi
  if [ "$3" = across ]; then server=server-far of=("$near" "$far"); fi
  case "$4" in requests-* | connections-*) kind="${4%-*}" connections="${4##*-}" ;; esac
  target="${address[$namespace/$server]}"
  if [ "$2" != none ]; then before="$(cpu_of "${of[@]}")"; fi
  said="$(ask "" "${kubectl[@]}" -n "$namespace" exec client -- /culvert lab load "$target:9000" "$kind" --connections "$connections" --seconds "$seconds")"
  # What the trial left to do is still its own.
  if [ -z "$dry_run" ]; then sleep "${POLL_SECONDS:-1}"; fi
  if [ "$2" != none ]; then after="$(cpu_of "${of[@]}")"; fi
  awk -v OFS='\t' -v round="$1" -v who="$2" -v place="$3" -v figure="$4" -v used=$((after - before)) '
    { value[$1] = $2; if ($1 ~ /^(gbit_per_s|per_s|p50_us|p99_us)$/) print round, who, place, figure, $1, $2 }
    END {
      if (who == "none") exit
      if (value["gigabytes"] > 0) print round, who, place, figure, "cpu_s_per_gb", used / 1e9 / value["gigabytes"]
      if (value["requests"] > 0) print round, who, place, figure, "cpu_s_per_1000", used / 1e6 / value["requests"]
    }' <<<"$said" >>"$records"
}

take_all() {
  local place figure
  for place in same across; do
    for figure in "${figures[@]}"; do
      if [ -t 2 ] && [ -z "$dry_run" ]; then printf '\rround %s of %s: %-8s %-7s %-15s' "$1" "$rounds" "$2" "$place" "$figure" >&2; fi
      take "$1" "$2" "$place" "$figure"
    done
  done
}

# A proxy that has just come has no certificates and no tunnels yet.
warmed_up() {
  local server
  for server in server-near server-far; do
    ask "" "${kubectl[@]}" -n culvert-bench exec client -- /culvert lab load "${address[culvert-bench/$server]}:9000" requests --seconds 1 >/dev/null || return 1
  done
}

serve_with() {
  run "$here/swap.sh" "$1" --node "$near" --node "$far" --name "$name" --image "$image" >&2
}

# As it was found, whatever happened.
found="$(ask "" "${kubectl[@]}" get node "$near" -o 'jsonpath={.metadata.labels.culvert/node-proxy}')"
clean_up() {
  serve_with "${found:-ztunnel}" || say "the nodes are not served as before: see $here/swap.sh status"
  if [ -z "$keep" ]; then
    run "${kubectl[@]}" delete namespace culvert-bench culvert-bench-plain --wait=false
    run "${kubectl[@]}" label node "$near" "$far" culvert/bench-
  fi
  if [ -z "$samples$dry_run" ]; then rm -f "$records"; fi
}
trap clean_up EXIT

for ((round = 0; round <= rounds; round++)); do
  order=(ztunnel culvert)
  if ((round % 2)); then order=(culvert ztunnel); fi
  take_all "$round" none
  for contestant in "${order[@]}"; do
    serve_with "$contestant"
    until_true 60 warmed_up || die "through $contestant, the pods do not reach each other"
    take_all "$round" "$contestant"
  done
done

if [ -n "$dry_run" ]; then exit; fi
machine="$("$engine" exec "$near" sh -c "$machine_script")"
say "" && say "$machine; $rounds rounds of $seconds s, interleaved" && say ""
print_table "$records"
