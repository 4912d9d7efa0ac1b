#!/usr/bin/env bash
# Start unified_finetune.py with everything it needs: ./run_finetuning.sh [its arguments]
#
#   ./run_finetuning.sh                  all five stages, with the R2 keys of .env
#   ./run_finetuning.sh check            any command and flag of the program (--help lists them)
#   ./run_finetuning.sh --demo           all five stages on sample data: no account, no GPU needed
#   ./run_finetuning.sh --demo chat      any command, on the demo's model; flags after it win
#
# The first start makes venv_finetune beside this file and installs requirements-finetuning.txt;
# later ones go straight to the program. Relative paths mean the folder you are in.
# Written for bash 3.2, which is what macOS has: no associative arrays, no empty arrays, no mapfile.
set -euo pipefail

say() { printf '%s\n' "$@" >&2; }

fail() { # what happened, then what to do; 11 is the program's exit code for "preflight"
  say "$@"
  exit 11
}

# Print the folder that this script really is in, when it was called through a symbolic link too.
own_folder() {
  local file=${BASH_SOURCE[0]} target
  while [ -L "$file" ]; do
    target=$(readlink "$file")
    case $target in
      /*) file=$target ;;
      *) file=$(dirname -- "$file")/$target ;;
    esac
  done
  (CDPATH='' cd -P -- "$(dirname -- "$file")" && pwd)
}

root=$(own_folder)
program=$root/unified_finetune.py
requirements=$root/requirements-finetuning.txt
venv=$root/venv_finetune
stamp=$venv/installed.txt # written last: without it the venv is half-made

# "Darwin arm64" is a Mac with an Apple chip, "Darwin x86_64" one with Intel's. PyTorch left those
# behind: they have packages of their own (see the requirements), made for older systems.
system=$(uname -sm)
newest_python=3.14
oldest_macos=14
if [ "$system" = "Darwin x86_64" ]; then
  newest_python=3.12
  oldest_macos=12
fi

# --- is the venv ready? -------------------------------------------------------------------------

# Print what a venv is made for: after a move from an Intel Mac to another, or when its Python was
# replaced by the next one, its packages are the wrong ones.
describe_venv() {
  "$venv/bin/python" -I -S -c \
    'import sys; print("%s, Python %d.%d" % (sys.argv[1], *sys.version_info[:2]))' "$system"
}

# Tell whether the venv was finished here, as the stamp's two first lines say. A venv that was moved
# has scripts that point nowhere; the same folder under another spelling (macOS takes a path in any
# case) is the same place.
venv_is_whole() {
  local made_for='' place=''
  [ -f "$stamp" ] && { IFS= read -r made_for && IFS= read -r place; } <"$stamp" &&
    [ "$place" -ef "$venv" ] && [ "$(describe_venv 2>/dev/null)" = "$made_for" ]
}

venv_is_ready() { venv_is_whole && tail -n +3 "$stamp" | cmp -s - "$requirements"; }

# --- a Python -----------------------------------------------------------------------------------

# Runs in whatever Python there is, so it is written for all of them.
probe='
import os, sys
version = "is %d.%d.%d" % sys.version_info[:3]
if not (3, 11) <= sys.version_info[:2] <= (3, int(sys.argv[1][2:])):
    sys.exit(version)
if sys.platform == "darwin" and os.uname()[4] not in sys.argv[2]:
    sys.exit(version + ", built for Intel Macs; this one has an Apple chip")
try:
    import ensurepip, venv
except ImportError:
    package = "python%d.%d-venv" % sys.version_info[:2]
    sys.exit(version + ", without venv (Debian, Ubuntu: sudo apt install %s)" % package)
libraries = {"bz2": "bzip2", "ctypes": "libffi", "lzma": "xz", "ssl": "openssl"}
for module in libraries: # a Python that was made from source does without what it did not find
    try:
        __import__(module)
    except ImportError:
        need = (module, libraries[module])
        sys.exit(version + ", without %s (install %s, then this Python again)" % need)
'

# Tell whether calling this path would only open a window that offers Apple's developer tools.
is_apples_placeholder() {
  [ "${system% *}:$1" = Darwin:/usr/bin/python3 ] && ! xcode-select -p >/dev/null 2>&1
}

get_python_from_uv() {
  # Only its own, for those on PATH were looked at before; and no links to it in ~/.local/bin.
  export UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_INSTALL_BIN=0
  uv python install 3.12 >&2 && uv python find 3.12
}

# Set `python` to an interpreter that the packages accept, or say how to get one.
find_python() {
  local candidate path answer seen='' newline=$'\n'
  # 3.14 comes last: all packages are made for it, but the tests have not run there.
  for candidate in python3.13 python3.12 python3.11 python3.14 python3; do
    if ! path=$(command -v "$candidate"); then
      answer="is not there"
    elif is_apples_placeholder "$path"; then
      answer="($path) is Apple's placeholder"
    elif answer=$("$path" -c "$probe" "$newest_python" "$system" 2>&1); then
      python=$path
      return
    else
      # The first line: version managers put scripts on PATH that explain at length why they fail.
      answer="($path) ${answer%%"$newline"*}"
    fi
    seen="$seen  $candidate $answer$newline"
  done
  if command -v uv >/dev/null; then
    say "No Python on PATH fits; asking uv for one."
    if python=$(get_python_from_uv); then
      return
    fi
    seen="$seen  uv could not get one (its message is above)$newline"
  fi
  fail "This program needs Python 3.11 to $newest_python. Looked at:" "$seen$(how_to_get_python)"
}

how_to_get_python() {
  echo "-> Get one, then start again in a new terminal:"
  if [ "${system% *}" = Darwin ]; then
    echo "     brew install python@3.12             with Homebrew"
    echo "     https://www.python.org/downloads/    the installer for macOS"
  else
    echo "     sudo apt install python3 python3-venv    Debian 12 or newer, Ubuntu 24.04 or newer"
    echo "     sudo dnf install python3.12              Fedora, Red Hat"
  fi
  echo "   or, on any system and without administrator rights, uv, which brings a Python:"
  echo "     curl -LsSf https://astral.sh/uv/install.sh | sh"
}

# Better said here than by pip, minutes later and in other words.
refuse_unfit_macs() {
  local version
  [ "${system% *}" = Darwin ] || return 0
  if [ "$(sysctl -n sysctl.proc_translated 2>/dev/null)" = 1 ]; then
    fail "This terminal runs Intel programs on an Apple chip (Rosetta)." \
      "-> Start with: arch -arm64 $root/run_finetuning.sh"
  fi
  version=$(SYSTEM_VERSION_COMPAT=0 sw_vers -productVersion 2>/dev/null) || return 0
  if [ "${version%%.*}" -lt "$oldest_macos" ]; then
    fail "This Mac has macOS $version, and PyTorch is made for macOS $oldest_macos and newer." \
      "-> Update macOS (System Settings, General), or use another machine: the folder can be" \
      "   copied there as it is."
  fi
}

# --- making the venv ----------------------------------------------------------------------------

# Two launchers must not work on one venv. The lock belongs to this shell's open file: the system
# gives it back however this shell ends, and keeps it while a pip that outlives it is at work.
lock_venv() {
  if ! { mkdir -p -- "$root/cache" && : >>"$root/cache/launcher.lock"; } 2>/dev/null; then
    fail "The folder $root cannot be written, and the packages go there." \
      "-> Make it yours, or copy the project to a folder that is."
  fi
  exec 9>>"$root/cache/launcher.lock"
  "$python" -c '
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.stderr.write("Another start is making venv_finetune; waiting for it.\n")
    fcntl.flock(9, fcntl.LOCK_EX)
'
}

make_venv() {
  if [ -e "$venv" ] && [ ! -d "$venv" ]; then
    fail "$venv is in the way: it is no folder." "-> Move it elsewhere, then start again."
  fi
  if [ -e "$venv" ]; then
    say "venv_finetune is unfinished, broken or was moved: making it anew."
  fi
  "$python" -m venv --clear "$venv" >&2 ||
    fail "$python could not make $venv (its message is above)." \
      "-> Delete that folder, check the free disk space, then start again."
}

# Print PyTorch's index of CPU builds where it serves better than PyPI, whose torch for Linux brings
# gigabytes of CUDA libraries. Not where an index was chosen (for AMD's ROCm, say), and not where
# that server does not answer: PyPI, or a local folder, has all that is needed.
torch_index() {
  local url=https://download.pytorch.org/whl/cpu
  if [ "${system% *}" = Linux ] && [ -z "${PIP_EXTRA_INDEX_URL-}" ] &&
    ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidiactl ] &&
    curl --silent --fail --head --max-time 5 --output /dev/null "$url/torch/" 2>/dev/null; then
    echo "$url"
  fi
}

install_requirements() {
  local index
  index=$(torch_index)
  set -- --prefer-binary --disable-pip-version-check --requirement "$requirements"
  if [ -n "$index" ]; then
    set -- "$@" --extra-index-url "$index"
  fi
  say "Installing the packages into venv_finetune; this takes some minutes, once."
  # PIP_USER: a pip.conf that says "user" would send the packages past the venv.
  PIP_USER=0 "$venv/bin/python" -m pip install "$@" >&2 ||
    fail "pip could not install requirements-finetuning.txt (its message is above)." \
      "-> Check the network and the free disk space (5 GB), then start again: downloads are kept." \
      "   Behind a proxy set HTTPS_PROXY, for a company's package index PIP_INDEX_URL."
}

prepare_venv() {
  refuse_unfit_macs
  find_python
  lock_venv
  if ! venv_is_ready; then # it may have become so while waiting
    if venv_is_whole && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      say "requirements-finetuning.txt has changed."
    else
      make_venv
    fi
    rm -f -- "$stamp"
    install_requirements
    { describe_venv && printf '%s\n' "$venv" && cat -- "$requirements"; } >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
  fi
  exec 9>&-
}

# --- start --------------------------------------------------------------------------------------

# pip answers Ctrl-C with an ordinary failure, which would read as a broken network.
trap 'say "Stopped. The same command begins again where it can."; exit 130' INT

# --demo may stand anywhere; everything else stays as it is, in its order, empty arguments included.
demo=no
wants_text=no
for argument in ${1+"$@"}; do
  shift
  case $argument in
    --demo) demo=yes ;;
    *)
      case $argument in --help | -h | --version) wants_text=yes ;; esac
      set -- ${1+"$@"} "$argument"
      ;;
  esac
done

if ! venv_is_ready; then
  if [ "$wants_text" = yes ]; then # answered without any package: nobody waits for an install
    find_python
    exec "$python" "$program" "$@"
  fi
  prepare_venv
fi

if [ "$demo" = yes ]; then
  # A model this small learns at a higher rate, and has no use for a GPU.
  "$venv/bin/python" "$root/tests/make_demo_model.py" "$root/cache/demo_model" ||
    fail "The demo's model could not be built (the reason is above)."
  command=train
  case ${1-} in
    '' | -*) ;;
    *)
      command=$1
      shift
      ;;
  esac
  set -- "$command" \
    --model_name "$root/cache/demo_model" \
    --data_path "$root/tests/data/college_advisor_sample.json" \
    --output_dir demo_model \
    --device cpu --min_disk_gb 1 --max_seq_length 512 \
    --learning_rate 3e-3 --num_train_epochs 4 --warmup_steps 5 --eval_steps 20 --save_steps 40 \
    ${1+"$@"}
fi

exec "$venv/bin/python" "$program" ${1+"$@"}
