#!/usr/bin/env bash
# Made speech: sentences of a small grammar spoken by eSpeak NG, no download. Trains on two CPU cores in minutes. Results: RESULTS.md.
#   ./run.sh                                everything, as `make demo` does
#   ./run.sh --stage 3 --stop-stage 3       only training; when restarted, it continues where it stopped
set -euo pipefail
cd "$(dirname "$0")"

model=conformer-tiny
vocab=480
chunk_ms=640
processes=2
stage=0 stop_stage=99
. ../../recipes/stage.sh # every variable above is now an option

exp=exp/$model

if stage 0 "Speech"; then python prepare.py data; fi
if stage 1 "Check"; then # two at a time
  printf '%s\n' train dev test | xargs -P 2 -I{} asr prepare data/transcripts.tsv --split {} -o data/manifests/made_{}
fi
if stage 2 "Tokenizer"; then
  asr tokenizer data/manifests/made_train.jsonl.gz --kind bpe --vocab "$vocab" -o data/tokens
fi
if stage 3 "Train"; then
  torchrun --standalone --nproc-per-node "$processes" -m recipes.cli train \
    --config conf/train.yaml --config "$model_config" --exp "$exp"
fi
if stage 4 "Average"; then asr average "$exp" --last 3; fi
if stage 5 "Decode"; then
  asr decode "$exp" data/manifests/made_test.jsonl.gz --mode joint --ctc-weight 0.5 --chunk-ms "$chunk_ms"
fi
if stage 6 "Score"; then asr score "$exp"; fi
if stage 7 "Export"; then
  asr export "$exp" --target cpu-int8
  asr decode "$exp/bundle" data/manifests/made_test.jsonl.gz --mode joint --ctc-weight 0.5 --chunk-ms "$chunk_ms" --left-chunks 4
fi
if stage 8 "Live transcript"; then
  asr transcribe "$exp/bundle" data/demo.wav --mode joint --realtime
  cat <<END

Try next, from $PWD:
  asr transcribe $exp/bundle data/demo.wav --format srt
  asr decode $exp/bundle data/manifests/made_test.jsonl.gz --mode rescore
  asr verify $exp data/manifests/made_test.jsonl.gz --searches
  asr bench $exp/bundle data/demo.wav
  asr info $exp/bundle
  asr transcribe $exp/bundle --mic        with a microphone and PortAudio: "wake me at half past seven"
END
fi
