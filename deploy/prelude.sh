# shellcheck shell=bash
# Sourced by the scripts of deploy/: strict mode, --help, --dry-run, and errors that say what to do.
set -euo pipefail

program="${0##*/}"
# `print` prints what changes something instead of running it; `server` (where a script offers it) lets the API server check it.
dry_run=""
# What a function prints into $(…) must not hide what it shows to the user.
exec 3>&1

# The first comment of the script.
print_help() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
}

die() {
  printf '%s: %s\n' "$program" "$*" >&2
  exit 1
}

wrong_usage() {
  printf '%s: %s\ntry: %s --help\n' "$program" "$*" "$program" >&2
  exit 2
}

# need TOOL HINT: the program must be there, or HINT says what it is and where it comes from.
need() {
  [ -z "$dry_run" ] || [ "$dry_run" = server ] || return 0
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

say() {
  printf '%s\n' "$*" >&3
}
