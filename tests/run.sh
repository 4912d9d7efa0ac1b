#!/usr/bin/env bash
# Run the tests in environments of their own, which are made on the first run (1.7 GB).
#   tests/run.sh                         everything
#   tests/run.sh tests/test_cli.py -x    what pytest is told
#   tests/run.sh --setup                 only make the environments
# PYTHON names the interpreter to make them with, if not the first fitting one on PATH.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "tests/run.sh needs Python 3.11, 3.12 or 3.13 with venv; PYTHON can name one." >&2
  return 1
}

# ensure_venv FOLDER REQUIREMENTS...: make or update a venv; instant when nothing has changed.
# The stamp is a copy of the requirements, written last, so that a killed install starts over.
ensure_venv() {
  local venv=$1 stamp=$1/installed-requirements.txt python file
  shift
  if cat "$@" | cmp -s - "$stamp" && "$venv/bin/python" -c '' 2>/dev/null; then
    return
  fi
  echo "Making $venv" >&2
  python=$(find_python)
  "$python" -m venv --clear "$venv"
  local arguments=(--quiet --prefer-binary --disable-pip-version-check)
  for file in "$@"; do
    arguments+=(--requirement "$file")
  done
  "$venv/bin/python" -m pip install "${arguments[@]}" >&2
  cat "$@" >"$stamp"
}

ensure_venv "$root/tests/.venv" "$root/requirements-finetuning.txt" "$root/tests/requirements.txt"
if [ "$(uname -s)" = Linux ]; then # Swift runs nowhere else; without it the S3 tests are skipped
  ensure_venv "$root/tests/.venv-swift" "$root/tests/requirements-swift.txt"
  export UNIFIED_FINETUNE_SWIFT_PYTHON=$root/tests/.venv-swift/bin/python
fi
if [ "${1-}" = --setup ]; then
  exit
fi
cd "$root"
exec tests/.venv/bin/python -m pytest "$@"
