# Sourced by tools/run and tools/test: packages, configuring, building. Bash; every path may hold spaces.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# install_packages LIST...: installs what the lists beside this file name and the machine lacks. Says exactly what to
# type where it may not.
install_packages() {
  command -v dpkg-query >/dev/null || {
    printf 'not a Debian system: install what these list by yourself: %s\n' "${*/#/tools/}" >&2
    return
  }
  local package missing=() lists=("${@/#/$ROOT/tools/}")
  while read -r package; do
    [[ -z "$package" || "$package" == \#* ]] && continue
    [[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] || missing+=("$package")
  done < <(cat "${lists[@]}")
  [[ ${#missing[@]} -eq 0 ]] && return
  local as_root=()
  if [[ $EUID -ne 0 ]]; then
    if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 ]]; }; then
      as_root=(sudo)
    else
      die "packages are missing and this user may not install them; run as root:
  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
    fi
  fi
  printf 'installing %s\n' "${missing[*]}"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq || printf 'apt-get update failed; trying with the old lists\n' >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
    die "could not install: ${missing[*]}"
}

# build FOLDER TARGET [cmake option...]: configures and builds TARGET in build/FOLDER.
build() {
  local folder="$ROOT/build/$1" target="$2"
  # Paths relative to the root: a second clone finds what the first compiled.
  export CCACHE_BASEDIR="$ROOT" CCACHE_NOHASHDIR=1
  shift 2
  cmake -S "$ROOT" -B "$folder" -G Ninja "$@" >"$ROOT/build/configure.log" 2>&1 || {
    cat "$ROOT/build/configure.log" >&2
    die "cmake failed"
  }
  cmake --build "$folder" --target "$target" || die "the build failed"
}
