# What run_all.sh needs and its reader skips: the settings are checked before the first stage, and stages are launched.

check_settings() {
  must_be "a whole number" "$WHOLE|" SEED SEED_SIZE SEED_SAMPLE ITERATIONS NODE_RANK MAX_RESTARTS NPROC  # or none
  must_be "a whole number, not 0" "$COUNT|" EVAL_SIZE SEED_EPOCHS BATCH_SIZE MICRO_BATCH_SIZE MAX_NEW_TOKENS NNODES \
    SAMPLING_BATCH_SIZE SAVE_EVERY SFT_EPOCHS SFT_BATCH_SIZE JUDGE_EPOCHS JUDGE_BATCH_SIZE RESOLVE_STEPS
  must_be "a number" "$NUMBER" BETA LR TEMPERATURE ALPHA K_PERCENT EPSILON SFT_LR JUDGE_LR
  awk "BEGIN { exit !($TEMPERATURE > 0 && $ALPHA <= 1 && $K_PERCENT <= 100) }" || fail \
    "TEMPERATURE is \"$TEMPERATURE\", ALPHA \"$ALPHA\", K_PERCENT \"$K_PERCENT\": above 0, at most 1, at most 100"
  must_be "0 or 1" "0|1" EMPTY_SYSTEM MERGE_SEED
  must_be "a whole number for each of $ITERATIONS iterations" "( *$COUNT( |\$)){${ITERATIONS/#0/1},} *" PROMPT_SIZES
  must_be "a number for each of $ITERATIONS iterations" "( *$NUMBER( |\$)){$ITERATIONS,} *" LAMBDAS
  must_be "a number or auto" "-?$NUMBER|auto|" LENGTH_PENALTY
  must_be "eos, open or drop" "eos|open|drop" ON_LENGTH_LIMIT
  must_be "decoupled, self, none or worst-case" "decoupled|self|none|worst-case" REFINE
  must_be "self or worst-case" "self|worst-case|" SEED_REFINE
  must_be "init, previous, none, pairrm, reward or llm" "init|previous|none|pairrm|reward|llm" JUDGE
  must_be "both or one" "both|one" LLM_ORDER
  [ "$JUDGE" != reward ] || must_be "a model for JUDGE=reward" ".+" REWARD_MODEL
  [ -z "$REWARD_MODEL" ] || must_be "pairrm or reward, which take a REWARD_MODEL" "pairrm|reward" JUDGE
  [ -z "$JUDGE_MODEL" ] || must_be "llm, which takes a JUDGE_MODEL" llm JUDGE
  [ -z "$PI_0" ] || must_be "left out, since PI_0 is given" "" SEED_REFINE
  [ "$SEED_SIZE" != 0 ] || must_be "a model, since SEED_SIZE is 0" ".+" PI_0
  [ "$SEED_SIZE$JUDGE" != 0llm ] || must_be "a model, since SEED_SIZE is 0" ".+" JUDGE_MODEL
  [ "$SEED_SIZE" != 0 ] || must_be "0, since SEED_SIZE is 0" 0 MERGE_SEED
  [ "$NNODES" -gt "$NODE_RANK" ] || fail "NODE_RANK is \"$NODE_RANK\": the first of $NNODES machines has 0"
  [ "$NNODES" -le 1 ] || must_be "the host:port of one of the $NNODES nodes" ".+:[0-9]+" RDZV_ENDPOINT
  local name path
  for name in RUNS SOURCE BASE INIT PI_0 INIT_TOKENIZER REWARD_MODEL JUDGE_MODEL; do
    case ${!name} in "" | ultrafeedback | world) continue ;; /*) path=${!name} ;; *) path=$caller/${!name} ;; esac
    [[ $name = RUNS || -e $path || ! -e ${!name} && ! ${!name} =~ $PATH_LIKE ]] || fail "$name: there is no $path"
    path=${path#"$PWD/"}
    [[ $name != RUNS && ! -e $path ]] || printf -v "$name" %s "${path/#-/./-}"  # or it would be read as an option
  done
  [ "$SETTING" != world ] || must_be "left out: the small world has its own" "world|" SOURCE BASE
  [[ $SETTING != world && -z $BASE || -z $GIVEN_INIT ]] || must_be "left out: SFT makes pi_init here" "" INIT
}

COUNT='[1-9][0-9]{0,17}' WHOLE='(0|[1-9][0-9]{0,17})' PATH_LIKE='^[-./~]|/.*/|/$'
NUMBER='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?'

default() {  # NAME=VALUE...: where the environment gives none
  local pair
  for pair in "$@"; do
    local name=${pair%%=*}
    [ -n "${!name:-}" ] || printf -v "$name" %s "${pair#*=}"
  done
}

must_be() {  # what, its pattern, names of variables
  local name
  for name in "${@:3}"; do
    [[ ${!name} =~ ^($2)$ ]] || fail "$name is \"${!name}\": it must be $1"
  done
}

fail() { echo "run_all.sh: $1" >&2; exit "${2:-2}"; }  # message, status

find_python() {  # $PYTHON, else that of .venv, with requirements.txt installed
  [ -z "${PYTHON:=}" ] || { [[ $PYTHON != [^/]*/* ]] || PYTHON=$caller/$PYTHON; return 0; }
  PYTHON=.venv/bin/python
  if [ -n "$DRY_RUN" ] || cmp -s requirements.txt .venv/requirements.txt; then return; fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$(python3 --version) is older than 3.11"
  echo "run_all.sh: installing requirements.txt into .venv"
  python3 -m venv .venv
  $PYTHON -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.txt
}

count_gpus() {  # into NPROC, where it is not given, those that CUDA can use; nvidia-smi lists MIG slices, errors too
  local count='import torch.cuda as gpu; gpu.is_available() and gpu.init(); print(gpu.device_count())'
  local why="$PYTHON -c 'import torch; torch.cuda.init()' says why"
  [ -n "$NPROC" ] || NPROC=$("$PYTHON" -c "$count" 2>/dev/null) || NPROC=${DRY_RUN:+1}  # before it is installed
  [ -n "$NPROC" ] || fail "$PYTHON cannot count the GPUs: $why"
  [ "$NPROC$WORLD" != 0 ] || echo "run_all.sh: CUDA finds no GPU, so $SETTING runs on the CPU: $why" >&2
}

single() { [ "$NODE_RANK" != 0 ] || run "$1" "$PYTHON" "$@"; }

stage() {
  local launch=("$PYTHON") torchrun=(-m torch.distributed.run --max-restarts "$MAX_RESTARTS")
  if (( NNODES > 1 )); then  # one rendezvous port per stage
    launch+=("${torchrun[@]}" --nproc-per-node "${NPROC/#0/1}" --nnodes "$NNODES" --rdzv-id "spa-$stages"
             --rdzv-backend c10d --rdzv-conf join_timeout=86400,read_timeout=86400
             --rdzv-endpoint "${RDZV_ENDPOINT%:*}:$(( ${RDZV_ENDPOINT##*:} + stages ))")
  elif (( NPROC > 1 )); then
    launch+=("${torchrun[@]}" --nproc-per-node "$NPROC" --standalone --local-addr localhost)
  fi
  # after a restart the processes need a new store: the old one still lists those that died
  [ "$MAX_RESTARTS" = 0 ] || launch=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "${launch[@]}")
  stages=$(( stages + 1 ))
  run "$1" "${launch[@]}" "$@"
}

run() {  # name of the script, command
  local status=0
  if [ -n "$DRY_RUN" ]; then printf '%q ' "${@:2}"; echo; return; fi
  set -m  # in a process group of its own, a stage gets Ctrl-C once: from the trap, not from the terminal as well
  "${@:2}" &
  child=$!
  set +m
  wait "$child" || status=$?
  while [ -n "$signal" ]; do signal= status=0; wait "$child" || status=$?; done  # a signal had ended the wait
  child=
  [ "$status" = 0 ] || fail "$1 ended with status $status (see above): run the same command again to resume" "$status"
}
