#!/usr/bin/env bash
# LibriSpeech, 960 h of read books, streaming Conformer. For GPUs. Results: RESULTS.md.
#   ./run.sh --stage 0                          everything, from the download (60 GB) on
#   ./run.sh --corpus DIR                       with the corpus in another folder
#   ./run.sh --launch "torchrun --nproc-per-node 8 -m recipes.cli" --stage 4     on eight GPUs
set -euo pipefail
cd "$(dirname "$0")"

corpus=download/LibriSpeech
train="train-clean-100 train-clean-360 train-other-500"
dev="dev-clean dev-other"
test="test-clean test-other"
launch=asr
config=conf/train.yaml
model=conformer-m
vocab=500
chunk_ms=640
stage=1 stop_stage=99
. ../../recipes/stage.sh # every variable above is now an option

exp=exp/${model}_bpe$vocab
manifests() { printf 'data/manifests/%s.jsonl.gz\n' "$@"; } # of the given parts of the corpus

if stage 0 "Download"; then lhotse download librispeech --full download; fi
if stage 1 "Manifests"; then
  for part in $train $dev $test; do
    asr prepare "$corpus/$part" --from folder --headers-only --max-s 40 -o "data/manifests/$part"
  done
fi
if stage 2 "Tokenizer"; then
  asr tokenizer $(manifests $train) --kind bpe --vocab "$vocab" -o "data/bpe$vocab"
fi
if stage 3 "Check what fits the units"; then
  for part in $train; do asr prepare "data/manifests/$part.jsonl.gz" --headers-only --tokens "data/bpe$vocab"; done
fi
if stage 4 "Train"; then
  $launch train --config "$config" --config "$model_config" --exp "$exp" \
    --set "data.train=[$(manifests $train | paste -sd ,)]" --set "data.valid=[$(manifests $dev | paste -sd ,)]" \
    --set "data.tokens=data/bpe$vocab"
fi
if stage 5 "Average"; then asr average "$exp" --last 10; fi
if stage 6 "Decode"; then
  for mode in ctc-greedy ctc-prefix attention joint rescore; do
    asr decode "$exp" $(manifests $test) --mode "$mode"
  done
fi
if stage 7 "Decode as a stream"; then asr decode "$exp" $(manifests $test) --mode rescore --chunk-ms "$chunk_ms"; fi
if stage 8 "Score"; then asr score "$exp"; fi
if stage 9 "Export"; then
  asr export "$exp" --target cpu-int8
  asr verify "$exp" $(manifests ${test%% *})
fi
