# shellcheck shell=bash
# What the launchers share; sourced in the root of the checkout.

# The environment that is active, else .venv.
python=python3
if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a script.
usage() {
  sed -n '2,${/^# \{0,1\}/!q; /^#SBATCH/q; s/^# \{0,1\}//p;}' "$1"
}

# check_config SCRIPT [CONFIG ...]: the usage for --help or nothing, an error for a file that is not there.
check_config() {
  case ${2:-} in
    -h | --help) usage "$1" && exit 0 ;;
    '' | -*) usage "$1" >&2 && exit 2 ;;
  esac
  [[ -f $2 ]] || fail "$2: no such configuration (seen from $PWD)"
}

count_gpus() {
  "$python" -c 'import torch; print(torch.cuda.device_count())'
}

check_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2'; it must be a whole number from 1 on"
}

# share_threads PROCESSES CPUS: each process gets its part of the cores, unless the user has chosen.
share_threads() {
  local threads=$(($2 / $1))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}

# Run the command in place of this script, after saying so.
run() {
  echo "+ OMP_NUM_THREADS=$OMP_NUM_THREADS $*" >&2
  exec "$@"
}
