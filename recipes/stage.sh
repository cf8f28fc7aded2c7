# Sourced by every egs/*/run.sh, in the folder of the run.sh, after its variables and before its stages:
#   every variable set so far becomes an option: stop_stage=99 is --stop-stage N
#   --help           prints the comment at the top of run.sh, and the options
#   asr              is taken from the repository's .venv if it is not on the PATH
#   $model_config    is conf/MODEL.yaml of the recipe, or else that of recipes/conf, for the option --model
#   stage N "Title"  is true if stage N is to run; prints its title and the time of the previous stage

_options=$(comm -23 <(compgen -v | grep '^[a-z][a-z0-9_]*$' | sort) <(compgen -e | sort) | tr _ -)
_stop() { echo "run.sh: $1; options: $(sed 's/^/--/' <<<"$_options" | paste -sd ' ')" >&2; exit 2; }

while (($#)); do
  [[ $1 == --* ]] || _stop "not an option: $1"
  if [[ $1 == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${0##*/}"
    for _name in $_options; do _value=${_name//-/_}; echo "  --$_name ${!_value}"; done
    exit 0
  fi
  [[ $1 == *=* ]] && set -- "${1%%=*}" "${1#*=}" "${@:2}"
  grep -qxF -e "${1#--}" <<<"$_options" || _stop "no such option: $1"
  (($# > 1)) || _stop "$1 needs a value"
  _name=${1#--}
  printf -v "${_name//-/_}" %s "$2"
  shift 2
done
[[ $stage =~ ^[0-9]+$ && $stop_stage =~ ^[0-9]+$ ]] || _stop "--stage $stage --stop-stage $stop_stage: not numbers"

model_config=conf/${model-}.yaml
[ -e "$model_config" ] || model_config=../../recipes/$model_config

command -v asr >/dev/null || PATH=$PWD/../../.venv/bin:$PATH

_title=
_finish() { [ -z "$_title" ] || echo "-- $_title: $1 after $((SECONDS / 60)) min $((SECONDS % 60)) s" >&2; _title=; }
trap '(($?)) && _finish failed || _finish done' EXIT

stage() {
  _finish done
  (($1 >= stage && $1 <= stop_stage)) || return 1
  _title="stage $1, $2" SECONDS=0
  echo "== $_title" >&2
}
