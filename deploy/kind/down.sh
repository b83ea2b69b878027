#!/usr/bin/env bash
# Ends the cluster that up.sh made, with everything in it.
#
#   deploy/kind/down.sh [--name NAME] [--dry-run]
#
#   --name NAME   the cluster's name [default: culvert]
#   --dry-run     only prints the command
# shellcheck source=deploy/prelude.sh
source "$(dirname "$0")/../prelude.sh"

name=culvert
while [ $# -gt 0 ]; do
  case "$1" in
    --name)
      [ $# -ge 2 ] || wrong_usage "$1 needs a value"
      name="$2"
      shift
      ;;
    --dry-run) dry_run=print ;;
    -h | --help) print_help && exit 0 ;;
    *) wrong_usage "unknown argument $1" ;;
  esac
  shift
done

need kind "Kubernetes in containers, 0.23 or newer; from the kind release or your distribution"
# A cluster that is gone is no error for kind either.
run kind delete cluster --name "$name"
