"""What sherpa-onnx hears with the graphs of `asr export --target sherpa-onnx`, and what the checkpoint hears.

For each artefact of the folder: utterances of the same text, and the word error rates of the checkpoint and
of the graphs in float32 and in 8 bits. Needs sherpa-onnx (the extra `bench`), 1.13.4 or newer.

    python tools/compare_sherpa.py exp/NAME exp/NAME/sherpa data/manifests/test.jsonl.gz --utterances 100
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sherpa_onnx

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Floats
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.train.checkpoint import load_model
from asr.wer import total, word_errors
from export.sherpa_evaluation import CHUNK, LEFT, SILENCE_S, zipformer_silence
from export.sherpa_zipformer import fixed_context
from export.verify import Utterance, read_utterances

SEARCHES = {"ctc": "ctc-greedy", "streaming": "ctc-greedy", "zipformer": "ctc-greedy", "aed": "unbounded"}


def offline(recognizer: sherpa_onnx.OfflineRecognizer, samples: Floats) -> str:
    stream = recognizer.create_stream()
    stream.accept_waveform(16000, samples)
    recognizer.decode_stream(stream)
    return str(stream.result.text)


def online(recognizer: sherpa_onnx.OnlineRecognizer, samples: Floats) -> str:
    stream = recognizer.create_stream()
    stream.accept_waveform(16000, samples)
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
    return str(recognizer.get_result(stream))


def recognizer_of(name: str, folder: Path, end: str) -> Callable[[Floats], str]:
    """A recognizer for an artefact of the folder; end: ".onnx" or ".int8.onnx"."""
    tokens = str(folder / name / "tokens.txt")
    files = {stem: str(folder / name / f"{stem}{end}") for stem in ("model", "encoder", "decoder")}
    if name == "streaming":
        stream = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
            model=files["model"], tokens=tokens, chunk_size=CHUNK, num_left_chunks=LEFT
        )
        return lambda samples: online(stream, samples)
    if name == "zipformer":
        stream = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(model=files["model"], tokens=tokens)
        return lambda samples: online(stream, samples)
    if name == "ctc":
        ctc = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model=files["model"], tokens=tokens)
        return lambda samples: offline(ctc, samples)
    aed = sherpa_onnx.OfflineRecognizer.from_moonshine_v2(
        encoder=files["encoder"], decoder=files["decoder"], tokens=tokens
    )
    return lambda samples: offline(aed, samples)


def context_of(name: str, model: HybridModel) -> tuple[Context, int]:
    """The context of an artefact's graph, and the samples of silence that it needs after an utterance."""
    subsampling = model.encoder.subsampling
    if name == "streaming":
        return Context(CHUNK * 4 // subsampling, LEFT), int(16000 * SILENCE_S)
    if name == "zipformer":
        context = fixed_context(model)
        return context, zipformer_silence(context.chunk * subsampling, 16000)
    return WHOLE, 0


def wer(texts: Sequence[str], utterances: Sequence[Utterance]) -> float:
    errors = (word_errors(x.text, text) for x, text in zip(utterances, texts, strict=True))
    return 100 * total(errors).rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--utterances", type=int, default=100)
    arguments = parser.parse_args()
    model, tokenizer, _ = load_model(arguments.experiment, "average")
    scorer = TorchScorer(model.eval(), "cpu")
    utterances = read_utterances(arguments.manifest, arguments.utterances, 16000)
    version = getattr(sherpa_onnx, "__version__", "")
    print(f"sherpa-onnx {version}, {len(utterances)} utterances of {arguments.manifest.name}")
    for name, mode in SEARCHES.items():
        if not (arguments.folder / name).exists():
            continue
        context, num_zeros = context_of(name, model)
        silence = np.zeros(num_zeros, np.float32)
        samples = [np.concatenate([x.samples, silence]) for x in utterances]
        search = SearchConfig(beam=1)
        ours = [tokenizer.decode(decode(scorer, mode, [x], search, context)[0][0].tokens) for x in samples]
        print(f"  {name:<10} checkpoint {wer(ours, utterances):6.2f}", end="")
        for end in (".onnx", ".int8.onnx"):
            recognize = recognizer_of(name, arguments.folder, end)
            theirs = [" ".join(recognize(x).split()) for x in samples]
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            print(f"   {end[1:-5] or 'float32'} {wer(theirs, utterances):6.2f}, same text {same}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
