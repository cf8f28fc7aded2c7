"""What decoding by attention costs beside CTranslate2, on one core, with random weights of the size of
Whisper base: 6 layers of 512 channels, 51,865 units, 1,500 encoder frames; in 8 bits.

    python tools/bench_decoder.py build /tmp/decoder
    python tools/bench_decoder.py run /tmp/decoder --rounds 7
    python tools/bench_decoder.py memory
    python tools/bench_decoder.py share exp/NAME/bundle data/manifests/test.jsonl.gz --limit 40

build    our bundle, which takes minutes, and the model of CTranslate2 (the extra `bench`), once
run      one process each, pinned to one core and driven in turns; processor time of `--tokens` tokens from
         the encoder's output on, and how many times faster than others each is: medians over rounds of the
         ratios of neighbours, with the smallest and the largest. Drafts are what the decoder writes, with
         every tenth token replaced. Texts are alike as in an n-best list, a tree of which has 0.45 of their
         tokens, or differ from the first token on
memory   cross-attention of one layer: keys and values cached, or keys alone, or nothing but the encoder's
         output, with the other products moved to the queries (arXiv:2503.05840); time, bytes, exactness
share    the share of the tokens that is left in trees (asr/decode/trie.py) of real n-best lists, of the CTC
         prefix beam search of a bundle
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIM, HEADS, LAYERS, NUM_TOKENS, NUM_FRAMES, BEAM = 512, 8, 6, 51865, 1500, 5
WRONG_EVERY = 10
BRANCHES = (0.5, 0.6, 0.75, 0.9)
"""Where texts that are alike begin to differ."""

PEER = "CTranslate2, beam 5"
OURS = {
    "beam 5, step by step": ("beam", BEAM),
    "rescoring of 5 alike": ("alike", BEAM),
    "rescoring of 5 unlike": ("unlike", BEAM),
    "greedy, step by step": ("beam", 1),
    "greedy, from drafts": ("draft", 1),
}
PAIRS = [(name, PEER) for name in list(OURS)[:3]] + [tuple(reversed(list(OURS)[3:]))]


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build_ours(folder)
    build_peer(folder / "ctranslate2")


def build_ours(folder: Path) -> None:
    """Write our bundle. Its encoder is not used, so a copy of another graph takes its place."""
    import torch

    from asr.features import FbankConfig
    from asr.losses import LossConfig
    from asr.model.build import build_model
    from asr.model.conformer import ConformerConfig
    from asr.model.decoder import DecoderConfig
    from export.bundle import Origin, describe, write_bundle
    from export.onnx import decoder_trace, export, memory_trace, with_best
    from export.quantize import quantize

    torch.manual_seed(0)
    size: dict[str, Any] = {"dim": DIM, "num_heads": HEADS, "ff_dim": 4 * DIM}
    encoder, decoder = ConformerConfig(**size, num_layers=1), DecoderConfig(**size, num_layers=LAYERS)
    model = build_model(FbankConfig(), encoder, decoder, LossConfig(), NUM_TOKENS).eval()
    with torch.no_grad():
        # after each unit it predicts the one before, with enough margin for 8 bits, and does not end
        model.decoder.out.weight.copy_(model.decoder.embedding.weight.roll(-1, 0) * DIM**0.5)
        model.decoder.out.bias[1] -= 100
    units = ["<blk>", "<sos/eos>", "<unk>", *(f"▁{i}" for i in range(3, NUM_TOKENS))]
    (folder / "tokens.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)), "utf-8")
    memory = quantize(export(memory_trace(model), "memory"))
    graphs = {"encoder": memory, "memory": memory}
    graphs["decoder"] = quantize(with_best(export(decoder_trace(model), "decoder")))
    write_bundle(
        graphs, describe(model, folder, "cpu-int8", Origin("random", "none")), folder, folder / "ours"
    )


def build_peer(folder: Path) -> None:
    from ctranslate2.specs import WhisperSpec

    rng = np.random.default_rng(0)

    def linear(spec: Any, rows: int, columns: int, *more: int) -> None:
        spec.weight = rng.normal(0, columns**-0.5, (rows, columns, *more)).astype(np.float32)
        spec.bias = np.zeros(rows, np.float32)

    def norm(spec: Any) -> None:
        spec.gamma, spec.beta = np.ones(DIM, np.float32), np.zeros(DIM, np.float32)

    def block(spec: Any, sizes: Sequence[int]) -> None:
        norm(spec.layer_norm)
        for part, size in zip(spec.linear, sizes, strict=True):
            linear(part, size, DIM)

    spec = WhisperSpec(1, HEADS, LAYERS, HEADS)
    linear(spec.encoder.conv1, DIM, 80, 3)
    linear(spec.encoder.conv2, DIM, DIM, 3)
    for part, length in ((spec.encoder, NUM_FRAMES), (spec.decoder, 448)):
        part.position_encodings.encodings = rng.normal(0, 0.1, (length, DIM)).astype(np.float32)
        norm(part.layer_norm)
        for layer in part.layer:
            block(layer.self_attention, (3 * DIM, DIM))
            norm(layer.ffn.layer_norm)
            linear(layer.ffn.linear_0, 4 * DIM, DIM)
            linear(layer.ffn.linear_1, DIM, 4 * DIM)
    for layer in spec.decoder.layer:
        block(layer.attention, (DIM, 2 * DIM, DIM))
    spec.decoder.embeddings.weight = rng.normal(0, 1, (NUM_TOKENS, DIM)).astype(np.float32)
    linear(spec.decoder.projection, NUM_TOKENS, DIM)
    special = ["endoftext", "startoftranscript", "transcribe", "notimestamps", "nospeech", "startofprev"]
    units = [f"<|{x}|>" for x in (*special, "translate", "startoflm", "en")]
    spec.register_vocabulary([*units, *(f"t{i}" for i in range(len(units), NUM_TOKENS))])
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir(exist_ok=True)
    spec.save(str(folder))


Pass = Callable[[], int]
"""Decode once; returns how many tokens were written."""


def peer(folder: Path, num_tokens: int) -> Pass:
    import ctranslate2

    model = ctranslate2.models.Whisper(
        str(folder / "ctranslate2"), compute_type="int8", intra_threads=1, inter_threads=1
    )
    noise = np.random.default_rng(0).normal(0, 1, (1, 80, 2 * NUM_FRAMES)).astype(np.float32)
    heard = model.encode(ctranslate2.StorageView.from_array(noise))

    def decode() -> int:
        found = model.generate(
            heard, [[1, 2, 3]], beam_size=BEAM, max_length=2 * num_tokens, suppress_tokens=[0],
            suppress_blank=False, repetition_penalty=1, length_penalty=1,
        )  # fmt: skip
        return len(found[0].sequences_ids[0])

    return decode


def ours(folder: Path, num_tokens: int, kind: str, beam: int) -> Pass:
    from asr.decode.config import SearchConfig
    from asr.decode.joint import search
    from asr.decode.speculative import Text, write
    from asr.runtime import Bundle
    from asr.runtime.onnx_scorer import OnnxScorer

    scorer = OnnxScorer(Bundle.load(folder / "ours"))
    y = np.random.default_rng(0).normal(0, 1, (NUM_FRAMES, DIM)).astype(np.float32)
    limits: dict[str, Any] = {"max_tokens": num_tokens, "extra_tokens": num_tokens, "max_repeats": 1000}
    config = SearchConfig(beam=beam, ctc_weight=0, **limits)
    nothing = np.zeros((NUM_FRAMES, 0), np.float32)

    def stepwise() -> int:
        return len(search(scorer, [nothing], scorer.memory([y]), config)[0][0].tokens)

    if kind == "beam":
        return stepwise
    text = search(scorer, [nothing], scorer.memory([y]), SearchConfig(beam=1, ctc_weight=0, **limits))[0][0]
    if kind in ("alike", "unlike"):
        texts = [list(text.tokens) for _ in range(beam)]
        for i, (other, branch) in enumerate(zip(texts[1:], BRANCHES, strict=True)):
            other[int(branch * len(other)) if kind == "alike" else 0] = 3 + i

        def score() -> int:
            scorer.score(scorer.memory([y]), np.zeros(beam, np.int64), texts)
            return len(text.tokens)

        return score
    draft = [3 if i % WRONG_EVERY == WRONG_EVERY // 2 else token for i, token in enumerate(text.tokens)]
    path = np.full((2 * len(draft), NUM_TOKENS), -20, np.float32)
    path[range(len(path)), [unit for token in draft for unit in (token, 0)]] = 0

    def drafted() -> int:
        written = Text.begin(0, path, config)
        write(scorer, [written], scorer.memory([y]), config)
        return len(written.tokens)

    return drafted


def work(folder: Path, name: str, num_tokens: int) -> None:
    """Run one pass for every input line; report its processor time and its tokens."""
    decode = peer(folder, num_tokens) if name == PEER else ours(folder, num_tokens, *OURS[name])
    decode()
    for _ in sys.stdin:
        start = time.process_time()
        count = decode()
        print(json.dumps([time.process_time() - start, count]), flush=True)


def run(folder: Path, num_tokens: int, rounds: int, core: int) -> None:
    names = [PEER, *OURS]
    command = [sys.executable, __file__, "work", str(folder), "--tokens", str(num_tokens), "--name"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = {
        name: subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        for name in names
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in names}
    counts = {}
    for _ in range(rounds):
        for name, worker in workers.items():
            assert worker.stdin
            assert worker.stdout
            print(file=worker.stdin, flush=True)
            took, counts[name] = json.loads(worker.stdout.readline())
            seconds[name].append(took)
    for name, worker in workers.items():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
        took = statistics.median(seconds[name])
        each = 1000 * took / counts[name]
        print(f"{name:22} {counts[name]:4} tokens  {took:7.3f} s  {each:6.2f} ms each")
    for name, other in PAIRS:
        ratios = [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
        spread = f"[{min(ratios):.2f}..{max(ratios):.2f}]"
        print(f"{name:22} {statistics.median(ratios):5.2f} times as fast {spread} as {other}")


def share(bundle: Path, manifest: Path, limit: int) -> None:
    from lhotse import load_manifest_lazy

    from asr.decode.config import SearchConfig
    from asr.decode.modes import ctc_prefix
    from asr.decode.trie import tries
    from asr.runtime import Bundle
    from asr.runtime.onnx_scorer import OnnxScorer

    scorer = OnnxScorer(Bundle.load(bundle))
    cuts = itertools.islice(load_manifest_lazy(manifest), limit)
    encoded = [scorer.encode([cut.load_audio()[0]])[0] for cut in cuts]
    for beam in (BEAM, 2 * BEAM):
        found = [ctc_prefix(scorer, x, None, SearchConfig(beam=beam, nbest=beam))[0] for x in encoded]
        lists = [[list(x.tokens) for x in nbest] for nbest in found]
        num_tokens = sum(len(text) + 1 for nbest in lists for text in nbest)
        shares = []
        for texts in (lists, [[text[::-1] for text in nbest] for nbest in lists]):
            trees = [tree for nbest in texts for tree in tries(nbest, range(len(nbest)), scorer.sos_eos)]
            shares.append(sum(len(tree.tokens) for tree in trees) / num_tokens)
        length = statistics.mean(len(nbest[0]) for nbest in lists)
        print(
            f"beam {beam:2}, {len(lists)} utterances of {length:.1f} tokens: trees have {shares[0]:.2f} of "
            f"them, {shares[1]:.2f} from right to left"
        )


def memory(rounds: int) -> None:
    """y_h = softmax(q_h K_h') V_h of B queries, computed in three ways."""
    rng, size = np.random.default_rng(0), DIM // HEADS
    e, wk, wv = (
        rng.normal(0, shape[0] ** -0.5, shape) for shape in ((NUM_FRAMES, DIM), (DIM, DIM), (DIM, DIM))
    )
    e *= NUM_FRAMES**0.5
    q = rng.normal(0, 1, (HEADS, BEAM, size)) * size**-0.5
    heads = (DIM, HEADS, size)
    k, v = ((e @ w).reshape(NUM_FRAMES, HEADS, size).transpose(1, 0, 2) for w in (wk, wv))
    moved = np.einsum("hbd,chd->hbc", q, wk.reshape(heads))
    from_keys = np.linalg.solve(wk, wv)
    forms: dict[str, tuple[Any, ...]] = {
        "keys and values": (q, k.transpose(0, 2, 1), v, None, 2),
        "keys alone": (q, k.transpose(0, 2, 1), e @ wk, from_keys, 1),
        "encoder output": (moved, e.T, e, wv, 1 / LAYERS),
    }
    exact = _attend(*forms["keys and values"][:4])
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    single = {
        name: [x if x is None else np.ascontiguousarray(x, np.float32) for x in form[:4]]
        for name, form in forms.items()
    }
    for _ in range(rounds):
        for name, arrays in single.items():
            start = time.process_time()
            for _ in range(20):
                _attend(*arrays)
            seconds[name].append((time.process_time() - start) / 20)
    for name, form in forms.items():
        double, float32 = (np.abs(_attend(*x) - exact).max() for x in (form[:4], single[name]))
        ratio = statistics.median(
            b / a for a, b in zip(seconds["keys and values"], seconds[name], strict=True)
        )
        cached = form[4] * NUM_FRAMES * DIM * 4 / 1e6
        print(
            f"{name:16} {1000 * statistics.median(seconds[name]):6.2f} ms ({ratio:4.2f} times)  "
            f"{cached:5.2f} MB a layer  error {double:.0e} in float64, {float32:.0e} in float32"
        )


def _float32(x: Any) -> Any:
    return x if x is None else np.ascontiguousarray(x, np.float32)


def _attend(q: Any, k: Any, v: Any, back: Any) -> Any:
    """q (H, B, .), k (., T) and v (T, .) of all heads or of each; back (C, C): what is left of the values."""
    weights = np.exp(_product(q, k))
    y = _product(weights / weights.sum(-1, keepdims=True), v)
    return y if back is None else y @ back.reshape(DIM, HEADS, -1).transpose(1, 0, 2)


def _product(x: Any, y: Any) -> Any:
    """x (H, B, .) times y: one product of all heads, where y is the same in each."""
    return x @ y if y.ndim == 3 else (x.reshape(-1, x.shape[-1]) @ y).reshape(HEADS, BEAM, -1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("what", choices=["build", "run", "work", "memory", "share"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="a bundle for share")
    parser.add_argument("manifest", type=Path, nargs="?", default=Path(), help="for share")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--limit", type=int, default=40, help="utterances, for share")
    parser.add_argument("--name", default=PEER, help="for work, which run starts itself")
    args = parser.parse_args()
    match args.what:
        case "build":
            build(args.folder)
        case "run":
            run(args.folder, args.tokens, args.rounds, args.core)
        case "work":
            work(args.folder, args.name, args.tokens)
        case "share":
            share(args.folder, args.manifest, args.limit)
        case _:
            memory(args.rounds)
