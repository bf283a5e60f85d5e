#!/usr/bin/env bash
# SPA, Algorithm 1.
#
#   bash run_all.sh                     the small world, on a laptop's CPU
#   bash run_all.sh mistral-7b          a setting of the paper: mistral-7b, phi-2, llama-3-8b, phi-3-medium,
#                                       mistral-7b-no-seed
#   bash run_all.sh SETTING --dry-run   print the commands and run none
#   bash run_all.sh test                the tests (what follows is for pytest)
#
# Every variable of the block "Settings" can be given from the environment: SEED=1 LR=1e-6 bash run_all.sh mistral-7b
# Results lie in runs/$NAME. Started again, the script leaves finished stages alone and goes on with the one that was
# stopped. A stage that fails stops the script with its status; Ctrl-C and SIGTERM go to the stage, and then do so too.
set -euo pipefail
cd "$(dirname "$0")"

SETTING=${1:-world}
shift $(( $# > 0 ? 1 : 0 ))
DRY_RUN=
if [ "$SETTING" = --dry-run ]; then SETTING=world DRY_RUN=1; fi
if [ "$SETTING" != test ] && [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi

# ---- Settings ---------------------------------------------------------------------------------
case $SETTING in
  world)   # responses of 30 tokens, not 300: the margin, a sum over tokens, needs a larger beta (see README.md)
    : "${BETA:=10}" "${LR:=1e-4}" "${BATCH_SIZE:=16}" "${MICRO_BATCH_SIZE:=16}" "${SAMPLING_BATCH_SIZE:=128}"
    : "${SEED_SIZE:=200}" "${PROMPT_SIZES:=800 2000 3000}" "${EVAL_SIZE:=500}" "${MAX_NEW_TOKENS:=56}" "${CUT:=drop}"
    : "${JUDGE_LR:=1e-3}" "${JUDGE_EPOCHS:=20}" "${JUDGE_BATCH_SIZE:=16}"
    : "${SFT_SIZE:=8000}" "${SFT_LR:=3e-3}" "${SFT_EPOCHS:=3}" "${SFT_BATCH_SIZE:=32}" "${GOLD_LABEL_SHARE:=3.3 %}" ;;
  mistral-7b)         : "${INIT:=alignment-handbook/zephyr-7b-sft-full}" ;;                                # Section 5.1
  phi-2)              : "${INIT:=lole25/phi-2-sft-ultrachat-full}" "${LR:=5e-6}" "${ITERATIONS:=1}" ;;     # App. B.3
  llama-3-8b)         : "${INIT:=meta-llama/Meta-Llama-3-8B-Instruct}"
                      : "${LR:=1e-5}" "${SEED_EPOCHS:=1}" "${BETA:=0.01}" "${ITERATIONS:=2}" ;;            # App. B.3
  phi-3-medium)       : "${INIT:=microsoft/Phi-3-medium-4k-instruct}"
                      : "${LR:=1e-5}" "${SEED_EPOCHS:=1}" "${BETA:=0.01}" "${ITERATIONS:=2}" ;;            # App. B.3
  mistral-7b-no-seed) : "${INIT:=mistralai/Mistral-7B-v0.1}" "${PI_0:=mistralai/Mistral-7B-Instruct-v0.1}" # Figure 4
                      : "${SEED_SIZE:=0}" "${INIT_TOKENIZER:=$PI_0}"  # a base model has no chat template
                      : "${INIT_NAME:=Mistral-7B-v0.1 (pi_init)}" "${PI_0_NAME:=Mistral-7B-Instruct-v0.1 (pi_0)}" ;;
  test) ;;
  *) echo "run_all.sh: no setting \"$SETTING\": world, mistral-7b, phi-2, llama-3-8b, phi-3-medium, mistral-7b-no-seed or test" >&2
     exit 2 ;;
esac
: "${SEED:=0}" "${NAME:=$SETTING-seed$SEED}" "${RUNS:=runs}" "${SOURCE:=ultrafeedback}"
: "${SEED_SIZE:=2000}" "${PROMPT_SIZES:=8000 20000 30000}" "${EVAL_SIZE:=200}" "${ITERATIONS:=3}"
: "${BETA:=0.1}" "${LR:=5e-7}" "${SEED_EPOCHS:=3}" "${BATCH_SIZE:=32}" "${MICRO_BATCH_SIZE:=2}"
: "${TEMPERATURE:=0.7}" "${MAX_NEW_TOKENS:=300}" "${CUT:=eos}" "${SAMPLING_BATCH_SIZE:=32}"
: "${REFINE:=decoupled}" "${ALPHA:=0.1}" "${K_PERCENT:=10}" "${LAMBDAS:=0.5 0.25 0.125}"
: "${JUDGE:=init}" "${REWARD_MODEL:=}" "${JUDGE_MODEL:=}" "${LENGTH_PENALTY:=}"  # what SPA is compared with
: "${JUDGE_LR:=2e-5}" "${JUDGE_EPOCHS:=3}" "${JUDGE_BATCH_SIZE:=32}"                             # App. B.2
: "${INIT_NAME:=SFT (pi_init)}" "${PI_0_NAME:=DPO on the seed (pi_0)}" "${INIT_TOKENIZER:=}"
: "${GOLD_LABEL_SHARE:=$(awk -v seed="$SEED_SIZE" -v sets="$PROMPT_SIZES" -v source="$SOURCE" 'BEGIN {
  for (n = split(sets, size); n > 0; n--) all += size[n]
  all = source == "ultrafeedback" ? 60000 : seed + all  # the paper counts all of UltraFeedback
  printf seed ? "%.1f %%" : "0 %%", 100 * seed / (all ? all : 1) }')}"
: "${PYTHON:=}"
: "${NPROC:=}" "${NNODES:=1}" "${NODE_RANK:=0}" "${RDZV_ENDPOINT:=}" "${MAX_RESTARTS:=0}"  # processes a node, nodes: torchrun's
: "${SAVE_EVERY:=100}"  # steps between the states that training goes on from
for path in RUNS SOURCE INIT PI_0 INIT_TOKENIZER REWARD_MODEL JUDGE_MODEL; do
  case ${!path:-} in -*) printf -v "$path" './%s' "${!path}" ;; esac  # or it would be read as an option
done

if [ "$NNODES" -gt 1 ] && ! [[ $RDZV_ENDPOINT =~ ^.+:[0-9]+$ ]]; then
  echo "run_all.sh: RDZV_ENDPOINT is \"$RDZV_ENDPOINT\": with NNODES=$NNODES it must be the host:port of one of them" >&2
  exit 2
fi
if [ "$SETTING" != test ] && [ $# -gt 0 ]; then
  echo "run_all.sh: what is \"$1\"? After a setting comes nothing or --dry-run" >&2
  exit 2
fi

# ---- Python -----------------------------------------------------------------------------------
if [ -z "$PYTHON" ]; then
  PYTHON=.venv/bin/python
  if [ -z "$DRY_RUN" ] && ! cmp -s requirements.txt .venv/requirements.txt; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "run_all.sh: $(python3 --version) is too old: Python 3.11 or newer is needed" >&2; exit 2; }
    echo "run_all.sh: installing requirements.txt into .venv"
    python3 -m venv .venv
    $PYTHON -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt
  fi
fi
if [ "$SETTING" = test ]; then exec "$PYTHON" -m pytest tests "$@"; fi
if [ -z "$NPROC" ]; then
  NPROC=$(tr , '\n' <<< "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2>/dev/null)}" | grep -c . || true)
fi
launch() {  # how a stage is started; each meets at a port of its own, so that none meets the one before
  LAUNCH=("$PYTHON")
  if [ "$NNODES" -gt 1 ]; then
    LAUNCH+=(-m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$(( NPROC > 1 ? NPROC : 1 ))"
             --rdzv-backend c10d --rdzv-id "spa-$stages" --rdzv-endpoint "${RDZV_ENDPOINT%:*}:$(( ${RDZV_ENDPOINT##*:} + stages ))"
             --rdzv-conf join_timeout=86400,read_timeout=86400 --max-restarts "$MAX_RESTARTS")
  elif [ "$NPROC" -gt 1 ]; then
    LAUNCH+=(-m torch.distributed.run --standalone --local-addr localhost --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS")
  fi
  # processes that are started again must not meet at the old store: it names those that are gone
  [ "$MAX_RESTARTS" = 0 ] || LAUNCH=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "${LAUNCH[@]}")
  stages=$(( stages + 1 ))
}
stages=0
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}  # seconds for a stage to save when it is stopped

child= signal=
forward() { signal=$1; [ -n "$child" ] && kill -s "$1" "$child" 2>/dev/null || exit "$2"; }
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM HUP
run() {  # the script of a stage, then its command
  local script=$1 status=0
  shift
  if [ -n "$DRY_RUN" ]; then printf '%q ' "$@"; echo; return; fi
  set -m  # in a process group of its own the stage has Ctrl-C once: from `forward`, not from the terminal as well
  "$@" &
  child=$!
  set +m
  wait "$child" || status=$?
  while [ -n "$signal" ]; do signal= status=0; wait "$child" || status=$?; done  # it ended the wait, not the stage
  child=
  [ "$status" != 0 ] || return 0
  echo "run_all.sh: $script ended with status $status (see above): the same command goes on from what is kept" >&2
  exit "$status"
}
stage() { launch; run "$1" "${LAUNCH[@]}" "$@"; }                     # on all GPUs of all nodes
alone() { [ "$NODE_RANK" != 0 ] || run "$1" "$PYTHON" "$@"; }         # what has no work to share

# ---- Algorithm 1 ------------------------------------------------------------------------------
R=$RUNS/$NAME
read -ra sizes <<< "$PROMPT_SIZES"
read -ra lambdas <<< "$LAMBDAS"
sampling=(--temperature "$TEMPERATURE" --max-new-tokens "$MAX_NEW_TOKENS" --seed "$SEED"
          --micro-batch-size "$SAMPLING_BATCH_SIZE")
safety=(--save-every "$SAVE_EVERY")  # and memory
[ "$SETTING" = world ] || safety+=(--activation-checkpointing --fsdp)  # with one GPU there is nothing to shard
training=(--beta "$BETA" --lr "$LR" --batch-size "$BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" --seed "$SEED"
          "${safety[@]}")
inputs=(--seed-size "$SEED_SIZE" --prompt-sizes "${sizes[@]}" --eval-size "$EVAL_SIZE" --seed "$SEED" --output "$R/data")

# Input: pi_init, D_0, {X_t}
if [ "$SETTING" = world ]; then
  [ "$JUDGE" != llm ] || inputs+=(--judge-words)
  alone 00_inputs.py --source world --all-gold --sft-size "$SFT_SIZE" "${inputs[@]}"
  INIT=$R/pi_init
  stage 00_sft.py --model "$R/data/base" --input "$R/data/sft.jsonl" --output "$INIT" --lr "$SFT_LR" \
    --epochs "$SFT_EPOCHS" --batch-size "$SFT_BATCH_SIZE" --micro-batch-size "$SFT_BATCH_SIZE" --seed "$SEED" \
    "${safety[@]}"
else
  alone 00_inputs.py --source "$SOURCE" "${inputs[@]}"
fi

# Obtaining an initial weakly aligned model pi_0 using DPO with pi_init and D_0
if [ -z "${PI_0:-}" ]; then
  PI_0=$R/pi_0
  stage 01_seed_dpo.py --model "$INIT" --input "$R/data/seed.jsonl" --output "$PI_0" --epochs "$SEED_EPOCHS" "${training[@]}"
fi

judging() {  # how the pairs are labelled: init is the paper's, Eq. 7; the others are what it is compared with
  case $JUDGE in
    init)     judge=(--model "$policy" --init-model "$INIT" --beta "$BETA") ;;
    previous) judge=(--judge previous --model "$policy" --ref-model "$previous" --beta "$BETA") ;;  # Table 7
    none)     judge=(--judge none --model "$policy" --beta "$BETA") ;;                              # Table 7
    reward)   judge=(--judge reward --reward-model "$REWARD_MODEL") ;;                              # Table 2
    llm)      judge=(--judge llm --judge-model "$JUDGE_MODEL") ;;                                   # Table 2
    *) echo "run_all.sh: JUDGE is \"$JUDGE\": it must be init, previous, none, reward or llm" >&2; exit 2 ;;
  esac
}
if [ "$JUDGE" = llm ] && [ -z "$JUDGE_MODEL" ]; then  # App. B.2
  JUDGE_MODEL=$R/judge
  stage 00_sft.py --model "$INIT" --input "$R/data/judge_sft.jsonl" --output "$JUDGE_MODEL" --lr "$JUDGE_LR" \
    --epochs "$JUDGE_EPOCHS" --batch-size "$JUDGE_BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" --seed "$SEED" \
    --max-prompt-length 4096 --max-length 4100 "${safety[@]}"
fi

# for t = 1 to T do
previous=$INIT policy=$PI_0
for (( t = 1; t <= ITERATIONS; t++ )); do
  # Synthesizing preference data D_t with pi_{t-1} and X_t
  stage 02_generate.py --model "$policy" --input "$R/data/prompts_$t.jsonl" --output "$R/responses_$t.jsonl" \
    --cut "$CUT" "${sampling[@]}"
  judging
  stage 03_judge.py "${judge[@]}" --input "$R/responses_$t.jsonl" --output "$R/preferences_$t.jsonl" \
    --micro-batch-size "$SAMPLING_BATCH_SIZE" ${LENGTH_PENALTY:+--length-penalty "$LENGTH_PENALTY"}
  # pi_theta, pi_ref <- pi_{t-1}; de-coupled noise detection, refined labels, update; pi_t
  stage 04_refined_dpo.py --model "$policy" --input "$R/preferences_$t.jsonl" --output "$R/pi_$t" --refine "$REFINE" \
    --alpha "$ALPHA" --k-percent "$K_PERCENT" --lam "${lambdas[t-1]}" "${training[@]}"
  previous=$policy policy=$R/pi_$t
done

# return pi_T, and what each model on the way is worth
evaluated=()
evaluate() {  # name of the folder, name in the table, share of gold labels, model, more options
  local options=("${@:5}")
  [ "$SETTING" != world ] || options+=(--gold "$R/data/gold.json")
  stage 05_eval.py --model "$4" --input "$R/data/eval.jsonl" --output "$R/eval/$1" --name "$2" --gold-labels "$3" \
    "${sampling[@]}" "${options[@]}"
  evaluated+=("$R/eval/$1")
}
evaluate sft "$INIT_NAME" "0 %" "$INIT" ${INIT_TOKENIZER:+--tokenizer "$INIT_TOKENIZER"}
evaluate dpo "$PI_0_NAME" "$GOLD_LABEL_SHARE" "$PI_0"
for (( t = 1; t <= ITERATIONS; t++ )); do
  preferences=()
  [ "$SETTING" != world ] || preferences=(--preferences "$R/preferences_$t.jsonl")
  evaluate "spa_$t" "SPA, iteration $t (pi_$t)" "$GOLD_LABEL_SHARE" "$R/pi_$t" "${preferences[@]}"
done
if [ "$SETTING" = world ]; then
  stage 01_seed_dpo.py --model "$INIT" --input "$R/data/all_gold.jsonl" --output "$R/dpo_all_gold" --epochs 1 "${training[@]}"
  evaluate dpo_all_gold "DPO on all gold labels" "100 %" "$R/dpo_all_gold"
fi
alone 05_eval.py --report "${evaluated[@]}" --output "$R/report"
