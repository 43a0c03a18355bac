# Messages, and commands whose output goes to the log. Sourced by setup_env.sh.
# shellcheck shell=bash
TOTAL_STAGES=6
stage_number=0
child='' build_tmp='' log='' log_shown='' ended=''

die() {  # one line that says what to do
  printf 'setup_env: %s\n' "$1" >&2
  ended=yes
  exit 1
}

say() { printf '%s\n' "$*"; }

stage() {
  stage_number=$((stage_number + 1))
  say "[$stage_number/$TOTAL_STAGES] $*"
}

minutes() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

shown() {  # a path, relative to the project's root where it lies inside
  case $1 in
    "$root"/*) printf '%s' "${1#"$root"/}" ;;
    *) printf '%s' "$1" ;;
  esac
}

stop_child() {
  [ -n "$child" ] || return 0
  # The child leads its own process group (setsid), so its compilers end with it.
  kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || true
  wait "$child" 2>/dev/null || true
  child=''
}

on_exit() {
  local code=$?
  trap - EXIT
  stop_child
  [ -z "$build_tmp" ] || rm -rf -- "$build_tmp"
  if [ "$code" -ne 0 ] && [ -z "$ended" ]; then
    printf 'setup_env: stopped before the end%s; run it again to go on from there\n' \
      "${log_shown:+ (log: $log_shown)}" >&2
  fi
  exit "$code"
}

pip_progress() {  # the last [n/m] of ninja, if there is one
  tail -n "+$log_mark" -- "$log" | tail -c 300000 | grep -aoE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 \
    | tr -d ' []' || true
}

explain_failure() {  # explain_failure WHAT: why the last command in the log failed, in one line
  local what=$1 part last
  part=$(tail -n "+$log_mark" -- "$log" | tail -c 2000000)
  if grep -qaiE 'No space left on device|Disk quota exceeded' <<<"$part"; then
    die "the disk ran full while installing $what: free about 12 GB and run this again"
  elif grep -qaE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Max retries exceeded|Temporary failure in name resolution|Network is unreachable|Connection (reset|aborted|refused)|IncompleteRead|Failed to establish a new connection' <<<"$part"; then
    die "no network while installing $what: check the connection and the proxy (HTTPS_PROXY, pip\
 config list), then run this again; it goes on from there (log: $log_shown)"
  elif grep -qaE 'No matching distribution found' <<<"$part"; then
    last=$(grep -aE 'No matching distribution found' <<<"$part" | tail -n 1)
    die "${last#ERROR: }: the package index that pip uses has none for this Python and system; check\
 pip config list (log: $log_shown)"
  elif grep -qaE 'Killed signal|fatal error: Killed|internal compiler error: Killed|out of memory' <<<"$part"; then
    die "the memory ran out while installing $what: run this again with MAX_JOBS=1 (log: $log_shown)"
  fi
  last=$({ grep -aE '(^|[^a-z])error: ' <<<"$part" || grep -aE '^ *ERROR: ' <<<"$part"; } | head -n 1 \
    | cut -c1-200 | sed 's/^ *//') || true
  die "installing $what failed${last:+ ($last)}: see the end of $log_shown"
}

run_logged() {  # run_logged WHAT COMMAND...: output to the log, a sign of life every 30 seconds
  local what=$1 began=$SECONDS next done_of code=0
  shift
  printf '\n### %s\n' "$*" >>"$log"
  log_mark=$(wc -l <"$log")
  log_mark=$((log_mark + 1))
  if command -v setsid >/dev/null; then setsid "$@" >>"$log" 2>&1 & else "$@" >>"$log" 2>&1 & fi
  child=$!
  next=$((began + 30))
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.5
    if [ "$SECONDS" -ge "$next" ]; then
      done_of=$(pip_progress)
      say "      $what: $(minutes $((SECONDS - began)))${done_of:+, file ${done_of/\// of }}"
      next=$((next + 30))
    fi
  done
  wait "$child" || code=$?
  child=''
  [ "$code" -eq 0 ] || explain_failure "$what"
}

pip_install() {  # pip_install WHAT ARGS...
  local what=$1
  shift
  run_logged "$what" "$py" -m pip install -c "$constraints" "$@"
}
