#!/usr/bin/env bash
# Mini LibriSpeech, five hours of read books: too little for good results, enough to see that everything works. Results: RESULTS.md.
#   lhotse download librispeech --mini download
#   ./run.sh                                    everything
#   ./run.sh --corpus DIR                       with the corpus in another folder
#   ./run.sh --model conformer-s --config conf/gpu.yaml --vocab 500            a larger model, on a GPU
set -euo pipefail
cd "$(dirname "$0")"

corpus=download/LibriSpeech
model=conformer-tiny
config=conf/train.yaml
vocab=200
chunk_ms=640
stage=0 stop_stage=99
. ../../recipes/stage.sh # every variable above is now an option

exp=exp/${model}_unigram$vocab

if stage 0 "Table"; then python prepare.py "$corpus" data; fi
if stage 1 "Decode compressed audio once"; then
  for split in train dev test; do
    asr prepare data/transcripts.tsv --split "$split" --store-audio data/wav -o "data/manifests/$split"
  done
fi
if stage 2 "Tokenizer"; then asr tokenizer data/manifests/train.jsonl.gz --vocab "$vocab" -o "data/unigram$vocab"; fi
if stage 3 "Train"; then
  asr train --config "$config" --config "$model_config" --exp "$exp" --set "data.tokens=data/unigram$vocab"
fi
if stage 4 "Average"; then asr average "$exp" --last 5; fi
if stage 5 "Decode"; then
  asr decode "$exp" data/manifests/test.jsonl.gz --mode ctc-prefix --chunk-ms "$chunk_ms"
  asr decode "$exp" data/manifests/test.jsonl.gz --mode rescore --chunk-ms "$chunk_ms"
fi
if stage 6 "Score"; then asr score "$exp"; fi
if stage 7 "Export"; then
  asr export "$exp" --target cpu-int8
  asr verify "$exp" data/manifests/test.jsonl.gz
fi
