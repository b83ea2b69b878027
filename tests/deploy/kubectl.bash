# A cluster of two nodes, n1 and n2, as files of a folder: what kubectl says and does, as far as swap.sh and bench.sh ask for it.
state="$(dirname "$0")/../state"
arguments="$*"
arguments="${arguments#--context kind-culvert }"
read -ra words <<<"$arguments"

not_found() {
  echo "Error from server (NotFound): $1 not found" >&2
  exit 1
}

# Whose pod is on a node, by the node's label.
is_on() {
  local label
  label="$(cat "$state/label-$2" 2>/dev/null)"
  [ "$label" = both ] || [ "$label" = "$1" ] || { [ -z "$label" ] && [ "$1" = ztunnel ]; }
}

case "$arguments" in
  *--dry-run=server*) cat >/dev/null </dev/null ;;
  *"get daemonset ztunnel"*) [ ! -e "$state/no-ztunnel" ] || not_found ztunnel ;;&
  *"get daemonset ztunnel"*spec.affinity*) cat "$state/affinity" 2>/dev/null || true ;;
  *"get daemonset ztunnel"*spec.updateStrategy*) printf '{"rollingUpdate":{"maxSurge":1,"maxUnavailable":0},"type":"RollingUpdate"}' ;;
  *"get daemonset ztunnel"*culvert/update-strategy*) cat "$state/strategy" ;;
  *"get daemonset ztunnel"*"env[*]"*) printf 'XDS_ADDRESS=istiod-blue.istio-system.svc:15012\nNETWORK=east\nRUST_LOG=debug\nNODE_NAME=\n' ;;
  "get nodes -l culvert/node-proxy "*)
    for node in n1 n2; do [ ! -e "$state/label-$node" ] || printf '%s ' "$node"; done
    ;;
  "get nodes -l "*) printf 'n1 n2' ;;
  "get node n1 -o name" | "get node n2 -o name") echo node ;;
  "get node "*" -o name") not_found "${words[2]}" ;;
  "get node n"*) cat "$state/label-${words[2]}" 2>/dev/null || true ;;
  "label node "*" culvert/node-proxy=both "*) printf both >"$state/label-${words[2]}" ;;
  "label node "*" culvert/node-proxy=culvert "*) printf culvert >"$state/label-${words[2]}" ;;
  "label node "*" culvert/node-proxy- "*) rm -f "$state/label-${words[2]}" ;;
  *"get pods -l "*spec.nodeName=n*)
    node="${arguments#*spec.nodeName=}" node="${node%% *}" whose=ztunnel
    case "$arguments" in *"-l app.kubernetes.io/name=culvert "*) whose=culvert ;; esac
    if is_on "$whose" "$node"; then
      case "$arguments" in
        *"-o name") echo "pod/$whose" ;;
        *) if [ -e "$state/broken-$whose" ]; then printf False; else printf True; fi ;;
      esac
    fi
    ;;
  "set image "*) echo "the object with ${words[5]#istio-proxy=}" ;;
  "set env "*) cat && echo "${arguments#set env }" ;;
  "apply "*"-f -"*) cat >"$state/applied" ;;
  *"annotate daemonset ztunnel"*)
    value="${arguments#*culvert/update-strategy=}"
    printf '%s' "${value% --overwrite*}" >"$state/strategy"
    ;;
  *"patch daemonset ztunnel"*'"affinity":null'*) rm -f "$state/affinity" ;;
  *"patch daemonset ztunnel"*) printf '{"key":"culvert/node-proxy"}' >"$state/affinity" ;;
  *" logs "*) echo "what the proxy said last" ;;
  *"get pods "*redirection*) printf 'enabled enabled enabled' ;;
  *"get pod server-"*) printf '127.0.0.1' ;;
  *"exec client -- /culvert lab load 127.0.0.1:9000 "*)
    # The last word is the length of the trial.
    words[${#words[@]} - 1]=0.1
    exec "$(cat "$state/culvert")" lab load "127.0.0.1:$(cat "$state/port")" "${words[@]:9}"
    ;;
esac
