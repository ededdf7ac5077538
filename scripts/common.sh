# Sourced by the scripts of this folder: messages, and how a preset is built.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '==> %s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The comment block at the head of the calling script: its help text.
print_help() {
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$0"
}

# Compilers to run at once: one a core, but never more than the memory carries (a file that
# includes gRPC takes up to 1.5 GB, twice that with sanitizers).
build_jobs() {
  local preset=$1 per_job_mb=1500 memory_mb jobs limit
  case $preset in asan | tsan) per_job_mb=3000 ;; esac
  memory_mb=$(awk '/MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)
  jobs=$(nproc)
  limit=$((memory_mb / per_job_mb))
  if ((limit < 1)); then limit=1; fi
  if ((jobs > limit)); then jobs=$limit; fi
  echo "$jobs"
}

# build_preset PRESET [TARGET...]: configures and builds into build/PRESET; no target: everything.
build_preset() {
  local preset=$1 jobs log
  shift
  jobs=$(build_jobs "$preset")
  mkdir -p "$ROOT/build/$preset"
  log=$ROOT/build/$preset/configure.log
  say "configuring build/$preset"
  if ! (cd "$ROOT" && cmake --preset "$preset") >"$log" 2>&1; then
    cat "$log" >&2
    fail "cmake could not configure the preset '$preset' (the lines above; also in $log)"
  fi
  say "building build/$preset with $jobs compilers at once (the first build takes minutes)"
  (cd "$ROOT" && NINJA_STATUS='[%f/%t, %es] ' cmake --build --preset "$preset" -j "$jobs" \
    ${1:+--target "$@"}) || fail "the build of preset '$preset' failed (see above)"
}
