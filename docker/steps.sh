#!/bin/sh
# The steps of the Dockerfile, whose RUN lines are calls of this script and nothing else. The tests run them too, into a
# folder of their own, where there is no Docker.
#
#   steps.sh packages NAME...     install Debian's packages (root)
#   steps.sh wheel [OPTION...]    build the wheel of $SRC into $DIST; options are pip's
#   steps.sh install [OPTION...]  install that wheel, with the extras $EXTRAS, into a new environment $PREFIX
#   steps.sh check                does what is installed run?
#   steps.sh user                 add the user that the image runs as (root)
set -eu
: "${SRC:=/src}" "${DIST:=/dist}" "${PREFIX:=/opt/ktcompile}" "${PYTHON:=python3}" "${EXTRAS:=serve}"
# The index that has torch for the variant. PyPI's own has CUDA's libraries, some gigabytes, which a CPU does not need.
: "${TORCH_INDEX:=}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT="$SRC/constraints.txt"

step=$1
shift
case $step in
packages)
  apt-get update
  apt-get install -y --no-install-recommends "$@"
  rm -rf /var/lib/apt/lists/*
  ;;
wheel)
  "$PYTHON" -m pip wheel --no-cache-dir --no-deps --wheel-dir "$DIST" "$@" "$SRC"
  ;;
install)
  "$PYTHON" -m venv "$PREFIX"
  # torch with CUDA brings the Triton that it was made with; tests have a later one.
  grep -v '^triton==' "$SRC/constraints.txt" >"$PREFIX/constraints.txt"
  export PIP_CONSTRAINT="$PREFIX/constraints.txt"
  if [ -n "$TORCH_INDEX" ]; then
    "$PREFIX/bin/pip" install --no-cache-dir --index-url "$TORCH_INDEX" torch
  fi
  set -- "$@" "$(echo "$DIST"/ktcompile-*.whl)${EXTRAS:+[$EXTRAS]}"
  "$PREFIX/bin/pip" install --no-cache-dir "$@"
  ;;
check)
  cd /  # where no sources are that Python would import instead
  "$PREFIX/bin/ktc" --version
  "$PREFIX/bin/ktc" doctor --quick
  ;;
user)
  useradd --system --uid 10001 --create-home --home-dir /var/lib/ktcompile --shell /usr/sbin/nologin ktcompile
  ;;
*)
  echo "steps.sh: there is no step '$step'" >&2
  exit 2
  ;;
esac
