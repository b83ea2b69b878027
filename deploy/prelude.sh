# shellcheck shell=bash
# Sourced by the scripts of deploy/: strict mode, --help, --dry-run, and errors that say what to do.
set -euo pipefail

program="${0##*/}"
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  printf '%s: bash %s is too old, 4.4 is needed\n' "$program" "$BASH_VERSION" >&2
  exit 1
fi
# `print` only prints commands; `server` (swap.sh) asks, and lets the API server check what it would change.
dry_run=""
# What a function prints into $(…) must not hide what it shows to the user.
exec 3>&1

# The first comment of the script.
print_help() {
  sed -n '2,/^[^#]/{/^# shellcheck/d;s/^# \{0,1\}//p}' "$0"
}

die() {
  printf '%s: %s\n' "$program" "$*" >&2
  exit 1
}

wrong_usage() {
  printf '%s: %s\ntry: %s --help\n' "$program" "$*" "$program" >&2
  exit 2
}

# need TOOL HINT: the program must be there, or HINT says what it is and where it comes from. A dry run needs none.
need() {
  [ "$dry_run" != print ] || return 0
  command -v "$1" >/dev/null && return 0
  printf '%s: %s is missing: %s\n' "$program" "$1" "$2" >&2
  exit 127
}

# A command as one could type it.
command_line() {
  local word quote="'"
  printf '+'
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) printf ' %s' "'${word//$quote/$quote\\$quote$quote}'" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
}

# run COMMAND…: shows the command, and runs it.
run() {
  printf '%s\n' "$(command_line "$@")" >&3
  [ "$dry_run" = print ] || "$@"
}

# run_with FILE COMMAND…: the same, with a file as standard input.
run_with() {
  local file="$1"
  shift
  printf '%s < %s\n' "$(command_line "$@")" "$file" >&3
  [ "$dry_run" = print ] || "$@" <"$file"
}

# ask INSTEAD COMMAND…: what the command prints; a dry run shows the command and goes on with INSTEAD.
ask() {
  local instead="$1"
  shift
  if [ "$dry_run" = print ]; then
    printf '%s\n' "$(command_line "$@")" >&3
    printf '%s' "$instead"
  else
    "$@"
  fi
}

# run_text TEXT COMMAND…: the same, with a text as standard input.
run_text() {
  local text="$1"
  shift
  printf '%s < (%s lines)\n' "$(command_line "$@")" "$(grep -c '' <<<"$text")" >&3
  [ "$dry_run" = print ] || "$@" <<<"$text"
}

# until_true SECONDS COMMAND…: asks again until the command succeeds, at most so long, every POLL_SECONDS. A dry
# run asks once.
until_true() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    if [ "$SECONDS" -ge "$deadline" ] || [ -n "$dry_run" ]; then return 1; fi
    sleep "${POLL_SECONDS:-1}"
  done
}

say() {
  printf '%s\n' "$*" >&3
}

# The cluster that kubectl and istioctl talk to; KUBECONFIG says where it is known from.
# shellcheck disable=SC2034 # used by those who source this
kubectl=(kubectl) istioctl=(istioctl)
# shellcheck disable=SC2034
use_context() {
  kubectl=(kubectl --context "$1")
  istioctl=(istioctl --context "$1")
}

need_kubectl() {
  need kubectl "the client of Kubernetes, of the cluster's version or one minor version beside it; from the Kubernetes release or your distribution"
}

need_istioctl() {
  need istioctl "Istio's client, 1.24 or newer, of the version that the cluster is to run; from the Istio release"
}
