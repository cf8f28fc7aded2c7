#!/usr/bin/env bash
# Your own recordings: DIR/train, DIR/dev and DIR/test with NAME.wav (or flac, ogg, opus, mp3) and NAME.txt beside it.
#   ./run.sh --corpus DIR                       everything
#   ./run.sh --corpus DIR --vocab 100           for an hour of speech or less
set -euo pipefail
cd "$(dirname "$0")"

corpus=download
model=conformer-s
vocab=300
chunk_ms=640
stage=0 stop_stage=99
. ../../recipes/stage.sh # every variable above is now an option

exp=exp/${model}_unigram$vocab

if stage 0 "Decode compressed audio once"; then
  for split in train dev test; do
    asr prepare "$corpus/$split" --from folder --store-audio "data/wav/$split" -o "data/manifests/$split"
  done
fi
if stage 1 "Tokenizer"; then asr tokenizer data/manifests/train.jsonl.gz --vocab "$vocab" -o "data/unigram$vocab"; fi
if stage 2 "Check what fits the units, and that no speaker is in train and test"; then
  asr prepare data/manifests/train.jsonl.gz --headers-only --tokens "data/unigram$vocab" --test data/manifests/test.jsonl.gz
fi
if stage 3 "Train"; then
  asr train --config conf/train.yaml --config "$model_config" --exp "$exp" --set "data.tokens=data/unigram$vocab"
fi
if stage 4 "Average"; then asr average "$exp" --last 10; fi
if stage 5 "Decode"; then asr decode "$exp" data/manifests/test.jsonl.gz --mode rescore --chunk-ms "$chunk_ms"; fi
if stage 6 "Score"; then asr score "$exp" --ignore-case --ignore-punctuation; fi
if stage 7 "Export"; then
  asr export "$exp" --target cpu-int8
  asr verify "$exp" data/manifests/test.jsonl.gz
fi
