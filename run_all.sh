#!/usr/bin/env bash
# SPA, Algorithm 1.
#
#   bash run_all.sh                     the small world, on a laptop's CPU
#   bash run_all.sh mistral-7b          one of the paper's settings, which `settings` lists
#   bash run_all.sh SETTING --dry-run   print the commands without running them
#   bash run_all.sh test                run the tests (further words go to pytest)
#
# The environment can set every variable of `settings`: SEED=1 LR=1e-6 bash run_all.sh mistral-7b
# Results are in runs/$RUN_NAME here. Run again, the script skips what is complete and resumes the stage that is not.
set -euo pipefail
unset CDPATH PYTHONSAFEPATH          # with these, cd may enter another folder, and a stage does not find common.py
caller=$PWD && cd "$(dirname "$0")"  # a relative path in a variable starts at the caller's folder
source support/launch.sh             # what a reader skips: checks of the settings, how a stage is launched

settings() {
  case $SETTING in
    world)  # 36 tokens a response, not 300: the margin, a sum over tokens, needs a larger beta (README.md)
      default BETA=10 LR=2e-4 BATCH_SIZE=16 MICRO_BATCH_SIZE=16 SEED_SIZE=200 PROMPT_SIZES="800 2000 3000"
      default EVAL_SIZE=500 MAX_NEW_TOKENS=56 ON_LENGTH_LIMIT=drop SAMPLING_BATCH_SIZE=128
      default SOURCE=world SFT_SIZE=8000 SFT_LR=5e-3 SFT_EPOCHS=3 SFT_BATCH_SIZE=32
      default JUDGE_LR=1e-3 JUDGE_EPOCHS=20 JUDGE_BATCH_SIZE=16 ;;
    mistral-7b)   default INIT=alignment-handbook/zephyr-7b-sft-full EMPTY_SYSTEM=1 ;;                 # Section 5.1
    mistral-7b-base) default BASE=mistralai/Mistral-7B-v0.1 INIT_TOKENIZER=alignment-handbook/zephyr-7b-sft-full
                     default EMPTY_SYSTEM=1 ;;                                                         # App. B.1
    phi-2)        default INIT=lole25/phi-2-sft-ultrachat-full LR=5e-6 ITERATIONS=1 EMPTY_SYSTEM=1 ;;  # App. B.3
    phi-2-base)   default BASE=microsoft/phi-2 INIT_TOKENIZER=lole25/phi-2-sft-ultrachat-full SFT_EPOCHS=3
                  default SFT_BATCH_SIZE=64 LR=5e-6 ITERATIONS=1 EMPTY_SYSTEM=1 ;;                     # App. B.1
    llama-3-8b)   default INIT=meta-llama/Meta-Llama-3-8B-Instruct LR=1e-5 SEED_EPOCHS=1 BETA=0.01 ITERATIONS=2 ;;
    phi-3-medium) default INIT=microsoft/Phi-3-medium-4k-instruct LR=1e-5 SEED_EPOCHS=1 BETA=0.01 ITERATIONS=2 ;;
    mistral-7b-no-seed)                                                                                # Figure 4
      default INIT=mistralai/Mistral-7B-v0.1 PI_0=mistralai/Mistral-7B-Instruct-v0.1 SEED_SIZE=0
      default INIT_TOKENIZER="$PI_0"  # a base model has no chat template
      default INIT_NAME="Mistral-7B-v0.1 (pi_init)" PI_0_NAME="Mistral-7B-Instruct-v0.1 (pi_0)" ;;
    *) fail "\"$SETTING\" is not test world mistral-7b[-base|-no-seed] phi-2[-base] llama-3-8b phi-3-medium" ;;
  esac
  default SEED=0 RUN_NAME="$SETTING-seed${SEED:-0}" RUNS="$PWD/runs" SOURCE=ultrafeedback SPLIT=train
  default INIT= INIT_NAME="SFT (pi_init)" INIT_TOKENIZER= PI_0= PI_0_NAME="DPO on the seed (pi_0)"
  default BASE= SFT_LR=2e-5 SFT_EPOCHS=1 SFT_BATCH_SIZE=128  # App. B.1: pi_init is made from BASE, if there is one
  default SEED_SIZE=2000 SEED_SAMPLE=0 PROMPT_SIZES="8000 20000 30000" EVAL_SIZE=200 EMPTY_SYSTEM=0 ITERATIONS=3
  default BETA=0.1 LR=5e-7 SEED_EPOCHS=3 BATCH_SIZE=32 MICRO_BATCH_SIZE=2
  default TEMPERATURE=0.7 MAX_NEW_TOKENS=300 ON_LENGTH_LIMIT=eos SAMPLING_BATCH_SIZE=32 SAVE_EVERY=100
  default REFINE=decoupled MERGE_SEED=0 SEED_REFINE= ALPHA=0.1 K_PERCENT=10 LAMBDAS="0.5 0.25 0.125"
  default EPSILON=0.2 RESOLVE_STEPS=        # of worst-case, not the paper's: the best of three in benchmarks/TABLES.md
  default JUDGE=init REWARD_MODEL= JUDGE_MODEL= LLM_ORDER=both LENGTH_PENALTY=                     # Tables 2, 7, 10
  default JUDGE_LR=2e-5 JUDGE_EPOCHS=3 JUDGE_BATCH_SIZE=32                                             # App. B.2
  default NPROC= NNODES=1 NODE_RANK=0 RDZV_ENDPOINT= MAX_RESTARTS=0      # torchrun's; NPROC: see count_gpus
}

options() {  # of the stages, made from the settings
  local all=60000  # rows of UltraFeedback, as the paper counts
  WORLD= LLM= R=$RUNS/$RUN_NAME sizes=($PROMPT_SIZES) lambdas=($LAMBDAS)
  EMPTY=${EMPTY_SYSTEM#0} MERGED=${MERGE_SEED#0}  # 0 becomes empty, for ${EMPTY:+...}
  [ "$SETTING" != world ] || WORLD=1
  [ "$JUDGE" != llm ] || LLM="--llm-judge $LLM_ORDER"
  [ "$SOURCE" = ultrafeedback ] || all=$(IFS=+; echo $(( SEED_SIZE + ${sizes[*]} )))
  default GOLD_LABEL_SHARE="$(awk "BEGIN { printf $SEED_SIZE ? \"%.1f %%\" : \"0 %%\", 100 * $SEED_SIZE / $all }")"
  shared=(--save-every "$SAVE_EVERY")
  [ -n "$WORLD" ] || shared+=(--gradient-checkpointing --fsdp)  # with one GPU there is nothing to shard
  sampling=(--temperature "$TEMPERATURE" --max-new-tokens "$MAX_NEW_TOKENS" --seed "$SEED"
            --micro-batch-size "$SAMPLING_BATCH_SIZE")
  training=(--beta "$BETA" --lr "$LR" --batch-size "$BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" --seed "$SEED"
            "${shared[@]}")
  smoothing=(--alpha "$ALPHA" --k-percent "$K_PERCENT")
  worst_case=(extras/worst_case_dpo.py --epsilon "$EPSILON" ${RESOLVE_STEPS:+--resolve-steps "$RESOLVE_STEPS"})
}

algorithm_1() {  # `stage` runs a script on all GPUs, `single` in one process
  # Input: pi_init, D_0, {X_t}
  single 00_inputs.py --source "$SOURCE" --split "$SPLIT" --seed-size "$SEED_SIZE" --prompt-sizes "${sizes[@]}" \
    --seed "$SEED" --seed-sample "$SEED_SAMPLE" --eval-size "$EVAL_SIZE" --output "$R/data" \
    ${WORLD:+--all-gold --sft-size "$SFT_SIZE"} $LLM ${EMPTY:+--empty-system}
  [ -z "$WORLD$BASE" ] || make_pi_init

  # Obtaining an initial weakly aligned model pi_0 using DPO with pi_init and D_0
  if [ -z "$PI_0" ]; then
    PI_0=$R/pi_0
    local update=(01_seed_dpo.py)
    [ "$SEED_REFINE" != self ] || update=(04_refined_dpo.py --refine self "${smoothing[@]}" --lam 0)
    [ "$SEED_REFINE" != worst-case ] || update=("${worst_case[@]}")
    stage "${update[@]}" --model "$INIT" --input "$R/data/seed.jsonl" --output "$PI_0" --epochs "$SEED_EPOCHS" \
      ${INIT_TOKENIZER:+--tokenizer "$INIT_TOKENIZER"} "${training[@]}"
  fi
  [ "$JUDGE$JUDGE_MODEL" != llm ] || make_judge

  # for t = 1 to T do: T is ITERATIONS
  local previous=$INIT policy=$PI_0 update judge t
  for (( t = 1; t <= ITERATIONS; t++ )); do
    # Synthesizing preference data D_t with pi_{t-1} and X_t: y_1, y_2 are sampled,
    stage 02_generate.py --model "$policy" --input "$R/data/prompts_$t.jsonl" --output "$R/responses_$t.jsonl" \
      --on-length-limit "$ON_LENGTH_LIMIT" "${sampling[@]}"
    # and labelled by direct preference judgment (Eq. 7, 8)
    judge=(--model "$policy" --init-model "$INIT" --beta "$BETA")
    [ "$JUDGE" = init ] || other_judge
    stage 03_judge.py "${judge[@]}" --input "$R/responses_$t.jsonl" --output "$R/preferences_$t.jsonl" \
      --micro-batch-size "$SAMPLING_BATCH_SIZE" ${LENGTH_PENALTY:+--length-penalty "$LENGTH_PENALTY"}
    # pi_theta, pi_ref <- pi_{t-1}; for mini-batch B in D_t do: de-coupled noise detection, refined labels, update
    update=(04_refined_dpo.py --refine "$REFINE" "${smoothing[@]}" --lam "${lambdas[t-1]}")
    [ "$REFINE" != worst-case ] || update=("${worst_case[@]}")
    stage "${update[@]}" --model "$policy" --output "$R/pi_$t" \
      --input "$R/preferences_$t.jsonl" ${MERGED:+"$R/data/seed.jsonl"} "${training[@]}"
    previous=$policy policy=$R/pi_$t  # pi_t <- pi_theta
  done
}

make_pi_init() {  # App. B.1
  INIT=$R/pi_init
  if [ -n "$WORLD" ]; then
    sft SFT "$R/data/base" "$R/data/sft.jsonl" "$INIT" --micro-batch-size "$SFT_BATCH_SIZE"
  else
    single 00_inputs.py --source ultrachat --output "$R/ultrachat" ${EMPTY:+--empty-system}
    sft SFT "$BASE" "$R/ultrachat/sft.jsonl" "$INIT" --micro-batch-size "$MICRO_BATCH_SIZE" --all-turns \
      ${INIT_TOKENIZER:+--tokenizer "$INIT_TOKENIZER"}
  fi
}

make_judge() {  # App. B.2
  JUDGE_MODEL=$R/judge
  sft JUDGE "$INIT" "$R/data/judge_sft.jsonl" "$JUDGE_MODEL" --micro-batch-size "$MICRO_BATCH_SIZE" \
    --max-prompt-length 4096 --max-length 4100 ${INIT_TOKENIZER:+--tokenizer "$INIT_TOKENIZER"}
}

sft() {  # SFT or JUDGE (whose values are taken), model, examples, output, more options
  local epochs=$1_EPOCHS lr=$1_LR size=$1_BATCH_SIZE
  stage 00_sft.py --model "$2" --input "$3" --output "$4" --epochs "${!epochs}" --lr "${!lr}" --batch-size "${!size}" \
    --seed "$SEED" "${shared[@]}" "${@:5}"
}

other_judge() {  # what the paper compares with
  case $JUDGE in
    previous) judge=(--judge previous --model "$policy" --ref-model "$previous" --beta "$BETA") ;;
    none)     judge=(--judge none --model "$policy" --beta "$BETA") ;;
    pairrm)   judge=(--judge pairrm --reward-model "${REWARD_MODEL:-llm-blender/PairRM-hf}") ;;
    reward)   judge=(--judge reward --reward-model "$REWARD_MODEL") ;;
    llm)      judge=(--judge llm --judge-model "$JUDGE_MODEL" --llm-order "$LLM_ORDER") ;;
  esac
}

evaluation() {  # of pi_T, every model on the way, and in the world DPO on all gold labels
  local samples=() evaluated=() t
  [ -z "$WORLD" ] || stage 01_seed_dpo.py --model "$INIT" --input "$R/data/all_gold.jsonl" --epochs 1 \
    --output "$R/dpo_all_gold" "${training[@]}"
  evaluate sft "$INIT_NAME" "0 %" "$INIT" ${INIT_TOKENIZER:+--tokenizer "$INIT_TOKENIZER"}
  evaluate dpo "$PI_0_NAME" "$GOLD_LABEL_SHARE" "$PI_0"
  for (( t = 1; t <= ITERATIONS; t++ )); do
    evaluate "spa_$t" "SPA, iteration $t (pi_$t)" "$GOLD_LABEL_SHARE" "$R/pi_$t" \
      ${WORLD:+--preferences "$R/preferences_$t.jsonl"}
  done
  [ -z "$WORLD" ] || evaluate dpo_all_gold "DPO on all gold labels" "100 %" "$R/dpo_all_gold"
  # all in one start of Python, which takes seconds; but where torchrun samples, the report needs its own
  (( NPROC <= 1 && NNODES <= 1 )) || { stage 05_eval.py "${samples[@]}"; samples=(); }
  single 05_eval.py ${samples:+"${samples[@]}" --then} report "${evaluated[@]}" --output "$R/report"
}

evaluate() {  # folder, name in the table, share of gold labels, model, more options
  samples+=(${evaluated:+--then} sample --model "$4" --input "$R/data/eval.jsonl" --output "$R/eval/$1" --name "$2"
            --label-share "$3" --init-model "$INIT" "${sampling[@]}"
            ${WORLD:+--gold "$R/data/gold.json"} "${@:5}")
  evaluated+=("$R/eval/$1")
}

main() {
  [ "${1:-}" != --dry-run ] || set -- world "$@"
  SETTING=${1:-world} DRY_RUN= stages=0 child= signal=
  shift $(( $# > 0 ))
  if [ "$SETTING" = test ]; then find_python; exec "$PYTHON" -m pytest tests "$@"; fi
  if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
  [ $# = 0 ] || fail "\"$1\" is not known: only --dry-run can follow a setting"
  GIVEN_INIT=${INIT:-}
  settings
  check_settings
  options
  find_python
  count_gpus
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}  # seconds that a stage has to save
  trap 'signal=INT; kill -s INT $child 2>/dev/null || exit 130' INT
  trap 'signal=TERM; kill -s TERM $child 2>/dev/null || exit 143' TERM HUP
  algorithm_1
  evaluation
}

main "$@"
