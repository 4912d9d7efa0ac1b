#!/usr/bin/env bash
# Run the tests in environments of their own, which are made on the first run (1.7 GB).
#   tests/run.sh                         everything
#   tests/run.sh tests/test_cli.py -x    what pytest is told
#   tests/run.sh --setup                 only make the environments
#   tests/run.sh --intel [...]           the same with the packages of Intel Macs, on Linux x86-64
#                                        (2.5 GB more): what depends on them, or what pytest is told
# PYTHON names the interpreter to make them with, if not the first fitting one on PATH.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
newest_python=3.14

find_python() {
  local candidate range="(3, 11) <= sys.version_info[:2] <= (3, ${newest_python#3.})"
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3.14 python3; do
    if "$candidate" -c "import ensurepip, sys; sys.exit(not $range)" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "tests/run.sh needs Python 3.11 to $newest_python with venv; PYTHON can name one." >&2
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
  if [ "$venv" = "$root/tests/.venv-intel" ]; then
    install_old_torch "$venv" "$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' "$1")"
  fi
  local arguments=(--quiet --prefer-binary --disable-pip-version-check)
  for file in "$@"; do
    arguments+=(--requirement "$file")
  done
  "$venv/bin/python" -m pip install "${arguments[@]}" >&2
  cat "$@" >"$stamp"
}

# install_old_torch VENV PIN: from PyTorch's own index, where that answers, a build for the CPU.
# PyPI's is one for CUDA 12.1, which drags in 2 GB of libraries. They are loaded with it, but called
# only where there is a GPU: the three small ones are installed, and libraries with the same names
# and empty functions stand in for the others, which needs gcc and binutils.
install_old_torch() {
  local venv=$1 pin=$2 url=https://download.pytorch.org/whl/cpu packages name
  local install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  if curl --silent --fail --head --max-time 5 --output /dev/null "$url/torch/"; then
    "${install[@]}" --extra-index-url "$url" "$pin+cpu" >&2
    return
  fi
  "${install[@]}" --no-deps "$pin" >&2
  "${install[@]}" --no-deps nvidia-{cuda-runtime,cuda-cupti,nvtx}-cu12==12.1.105 >&2
  packages=$(echo "$venv"/lib/python3.*/site-packages)
  sed -i '/^Requires-Dist: \(nvidia\|triton\)/d' "$packages/torch-${pin#torch==}.dist-info/METADATA"
  for name in libcublas.so.12 libcublasLt.so.12 libcudnn.so.8 libcufft.so.11 libcurand.so.10 \
    libcusolver.so.11 libcusparse.so.12 libnccl.so.2; do
    nm -D --undefined-only "$packages"/torch/lib/libtorch*.so |
      sed -n -e "s/.* U \(.*\)@$name\$/void \1(void) {}/p" -e 's/.* U \(nccl.*\)/void \1(void) {}/p' |
      sort -u |
      gcc -w -x c - -shared -fPIC -nostdlib -o "$packages/torch/lib/$name" \
        -Wl,-soname,"$name" -Wl,--default-symver
  done
}

venv=$root/tests/.venv
requirements=$root/requirements-finetuning.txt
if [ "${1-}" = --intel ]; then
  shift
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "tests/run.sh --intel needs Linux on x86-64; on an Intel Mac leave --intel out." >&2
    exit 1
  fi
  export CUDA_VISIBLE_DEVICES=''
  newest_python=3.12
  venv=$root/tests/.venv-intel
  requirements=$root/cache/requirements-intel.txt
  mkdir -p "$root/cache"
  # The lines of Intel Macs lose their marker; those that still have one are for other machines.
  sed -e 's/; sys_platform == "darwin" and platform_machine == "x86_64"//' \
    -e '/; sys_platform [!=]=/d' "$root/requirements-finetuning.txt" >"$requirements"
  if [ $# = 0 ]; then
    set -- tests/test_{pipeline,train,save,chat,export}.py
  fi
fi
ensure_venv "$venv" "$requirements" "$root/tests/requirements.txt"
if [ "$(uname -s)" = Linux ]; then # Swift runs nowhere else; without it the S3 tests are skipped
  ensure_venv "$root/tests/.venv-swift" "$root/tests/requirements-swift.txt"
  export UNIFIED_FINETUNE_SWIFT_PYTHON=$root/tests/.venv-swift/bin/python
fi
if [ "${1-}" = --setup ]; then
  exit
fi
cd "$root"
exec "$venv/bin/python" -m pytest "$@"
