#!/usr/bin/env bash
# Google Speech Commands: 35 words, joined into utterances of one to eight; test speakers are not in train. Results: RESULTS.md.
#   ./run.sh --corpus DIR                       everything
#   ./run.sh --corpus DIR --noise DIR           with noise from a folder of audio files in training
#   ./run.sh --stage 4 --stop-stage 4           only training
set -euo pipefail
cd "$(dirname "$0")"

corpus=download/speech_commands_v0.02
noise=
model=conformer-tiny
vocab=120
chunk_ms=640
stage=0 stop_stage=99
. ../../recipes/stage.sh # every variable above is now an option

exp=exp/$model

if stage 0 "Table"; then python prepare.py "$corpus" data; fi
if stage 1 "Decode compressed audio once"; then
  for split in train dev test; do
    asr prepare data/transcripts.tsv --split "$split" --store-audio data/wav -o "data/words/$split"
  done
fi
if stage 2 "Join words of dev and test"; then
  asr join data/words/dev.jsonl.gz -o data/manifests/dev.jsonl.gz --words 1 8
  asr join data/words/test.jsonl.gz -o data/manifests/test.jsonl.gz --words 1 8
  asr join data/words/test.jsonl.gz -o data/manifests/test-long.jsonl.gz --words 40 80 --max-s 180
fi
if stage 3 "Tokenizer"; then asr tokenizer data/words/train.jsonl.gz --kind bpe --vocab "$vocab" -o data/tokens; fi
if stage 4 "Train"; then
  asr train --config conf/train.yaml --config "$model_config" --exp "$exp" --set "augment.noise=$noise"
fi
if stage 5 "Average"; then asr average "$exp" --last 5; fi
if stage 6 "Decode"; then
  asr decode "$exp" data/manifests/{test,test-long}.jsonl.gz --mode ctc-prefix --chunk-ms "$chunk_ms"
  asr decode "$exp" data/manifests/test.jsonl.gz --mode rescore --chunk-ms "$chunk_ms"
fi
if stage 7 "Score"; then asr score "$exp"; fi
if stage 8 "Export"; then
  asr export "$exp" --target cpu-int8
  asr verify "$exp" data/manifests/test.jsonl.gz
fi
