#!/usr/bin/env bash
# Free Spoken Digit Dataset: 8 kHz, six speakers; tested on single and on joined digits. Results: RESULTS.md.
#   ./run.sh --corpus DIR                       the official split: test speakers are in train
#   ./run.sh --corpus DIR --split speakers      the test speaker is not in train
set -euo pipefail
cd "$(dirname "$0")"

corpus=download/free-spoken-digit-dataset
split=official
model=conformer-tiny
vocab=70
stage=0 stop_stage=99
. ../../recipes/stage.sh # every variable above is now an option

exp=exp/${model}_$split
words=data/$split

if stage 0 "Tables"; then python prepare.py "$corpus" data; fi
if stage 1 "Resample once"; then
  for part in train dev test; do
    asr prepare "data/$split.tsv" --split "$part" --store-audio data/wav -o "$words/$part"
  done
fi
if stage 2 "Join digits of dev and test"; then
  asr join "$words/dev.jsonl.gz" -o "$words/dev-joined.jsonl.gz" --words 1 6
  asr join "$words/test.jsonl.gz" -o "$words/test-joined.jsonl.gz" --words 1 6
fi
if stage 3 "Tokenizer"; then asr tokenizer "$words/train.jsonl.gz" --kind bpe --vocab "$vocab" -o data/tokens; fi
if stage 4 "Train"; then
  asr train --config conf/train.yaml --config "$model_config" --exp "$exp" \
    --set "data.train=[$words/train.jsonl.gz]" --set "data.valid=[$words/dev-joined.jsonl.gz]"
fi
if stage 5 "Average"; then asr average "$exp" --last 5; fi
if stage 6 "Decode"; then asr decode "$exp" "$words"/{test,test-joined}.jsonl.gz --mode ctc-prefix; fi
if stage 7 "Score"; then asr score "$exp"; fi
if stage 8 "Export"; then
  asr export "$exp" --target cpu-int8
  asr verify "$exp" "$words/test.jsonl.gz"
fi
