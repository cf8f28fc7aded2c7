"""The int8 bundle of a configuration beside its float32 bundle: bytes, and streaming by turns on made sound.

The weights are fresh: they decide words, not speed. Blank is as frequent as in speech. With --keep, all of it
stays in a folder, and the same weights as sherpa-onnx streams them, for

    python tools/bench_export.py --config recipes/conf/conformer-m.yaml --rounds 10 --keep fresh
    asr bench fresh/cpu-int8 --against fresh/sherpa
"""

import argparse
import tempfile
from pathlib import Path

import torch

from asr.config import load_config
from asr.model.build import build_model
from asr.model.hybrid import HybridModel
from asr.runtime import Bundle, StreamConfig
from export.bench import bench_against
from export.bundle import Origin, describe, write_bundle
from export.onnx import export_graphs
from export.peers import RECOGNIZERS
from export.quantize import quantize
from export.sherpa_bundle import write_sherpa
from export.verify import made_sound

REPO = Path(__file__).parents[1]
SOUND_S = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=REPO / "recipes/conf/conformer-m.yaml")
    parser.add_argument("--units", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunk-ms", type=int, default=640)
    parser.add_argument("--keep", type=Path, help="folder to write, with bundles and sherpa/")
    args = parser.parse_args()

    config = load_config([args.config])
    model = build_model(config.features, config.encoder, config.decoder, config.loss, args.units).eval()
    make_blank_frequent(model)
    with tempfile.TemporaryDirectory() as folder:
        tokens = args.keep or Path(folder)
        tokens.mkdir(parents=True, exist_ok=True)
        symbols = ["<blk>", "<sos/eos>", "<unk>", *(chr(0x4E00 + i) for i in range(args.units - 3))]
        lines = "".join(f"{symbol} {number}\n" for number, symbol in enumerate(symbols))
        (tokens / "tokens.txt").write_text(lines, encoding="utf-8")
        graphs = export_graphs(model)
        quantized = {name: quantize(graph) for name, graph in graphs.items()}
        for target, built in (("cpu-fp32", graphs), ("cpu-int8", quantized)):
            info = describe(model, tokens, target, Origin("fresh weights", ""))
            write_bundle(built, info, tokens, tokens / target)
        if args.keep:
            origin = Origin("fresh weights", "")
            write_sherpa(model, tokens, origin, tokens / "sherpa", only=list(RECOGNIZERS))
        ours, theirs = (Bundle.load(tokens / target) for target in ("cpu-int8", "cpu-fp32"))
        sounds = [made_sound(SOUND_S, config.features.sample_rate)] * args.rounds
        stream = StreamConfig(mode="ctc-greedy", chunk_ms=args.chunk_ms)
        ours_found, theirs_found, ratio = bench_against(ours, theirs, sounds, stream)
    print(f"{args.config.stem}: {ours.info.parameters / 1e6:.1f} M parameters, chunks of {args.chunk_ms} ms")
    for bundle, found in ((ours, ours_found), (theirs, theirs_found)):
        size, chunk_ms = total_size(bundle) / 1e6, found.chunk_ms_p50_p95[0]
        print(f"{bundle.info.target}: {size:.1f} MB, chunk {chunk_ms:.1f} ms, real-time factor {found.rtf}")
    low, high = ratio.quartiles
    print(
        f"int8: {total_size(ours) / total_size(theirs):.2f} of the size, {ratio.median:.2f} times as fast "
        f"(median of {ratio.utterances}, half of them {low:.2f} to {high:.2f})"
    )


@torch.inference_mode()
def make_blank_frequent(model: HybridModel, share: float = 0.85) -> None:
    """Make this share of the frames of made sound blank."""
    samples = torch.from_numpy(made_sound(SOUND_S, model.fbank.config.sample_rate))[None]
    y, _ = model.encode(*model.features(samples, torch.tensor([samples.shape[1]])))
    assert model.ctc is not None
    blank, others = model.ctc(y).split([1, model.num_tokens - 1], dim=-1)
    model.ctc.bias[0] += (others.max(-1).values - blank[..., 0]).quantile(share)


def total_size(bundle: Bundle) -> int:
    return sum(file.size for file in bundle.info.files.values())


if __name__ == "__main__":
    main()
