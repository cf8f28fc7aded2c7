"""A training step of our model beside one written plainly with torch's and torchaudio's own layers.

Same sizes, same data, same losses; processor time of forward, backward and optimizer, the two in turns, and
the median of the ratio over the rounds. Dropout off, so that both do the same.

    python tools/bench_train.py --config recipes/conf/conformer-m.yaml --rounds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.models import Conformer

from asr.config import ExperimentConfig, load_config
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.optim import build_optimizer

REPO = Path(__file__).parents[1]
SOS_EOS = 1
Step = Callable[[], None]


class Reference(nn.Module):
    """Two strided convolutions, torchaudio's Conformer, torch's TransformerDecoder; CTC and cross-entropy."""

    def __init__(self, config: ExperimentConfig, num_tokens: int) -> None:
        super().__init__()
        encoder, decoder = config.encoder, config.decoder
        assert isinstance(encoder, ConformerConfig)
        channels = encoder.subsampling_channels
        self.front = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1), nn.SiLU(), nn.Conv2d(channels, channels, 3, 2, 1), nn.SiLU()
        )
        self.out = nn.Linear(channels * -(-config.features.num_bins // 4), encoder.dim)
        self.encoder = Conformer(
            encoder.dim, encoder.num_heads, encoder.ff_dim, encoder.num_layers, encoder.kernel_size, 0.0, True
        )
        self.ctc = nn.Linear(encoder.dim, num_tokens)
        self.embed = nn.Embedding(num_tokens, decoder.dim)
        layer = nn.TransformerDecoderLayer(
            decoder.dim, decoder.num_heads, decoder.ff_dim, 0.0, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, decoder.num_layers)
        self.head = nn.Linear(decoder.dim, num_tokens)

    def forward(self, x: Tensor, x_lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
        y = self.out(self.front(x[:, None]).transpose(1, 2).flatten(2))
        y, y_lens = self.encoder(y, (x_lens + 3) // 4)
        log_probs = self.ctc(y).float().log_softmax(-1)
        ctc = F.ctc_loss(log_probs.transpose(0, 1), tokens, y_lens, token_lens, reduction="sum")
        sos = torch.full_like(tokens[:, :1], SOS_EOS)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] + 1)
        padding = torch.arange(y.shape[1]) >= y_lens[:, None]
        z = self.decoder(
            self.embed(torch.cat([sos, tokens], 1)),
            y,
            causal,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        targets = torch.cat([tokens, sos], 1)
        attention = F.cross_entropy(
            self.head(z).float().transpose(1, 2), targets, reduction="sum", label_smoothing=0.1
        )
        return 0.3 * ctc + 0.7 * attention


def steps_of(config: ExperimentConfig, batch: tuple[Tensor, ...], num_tokens: int, bf16: bool) -> list[Step]:
    """A training step of ours, and one of the reference."""
    ours = build_model(config.features, config.encoder, config.decoder, config.loss, num_tokens)
    reference = Reference(config, num_tokens)
    return [
        _step(ours, lambda: ours(*batch).total, config, bf16),
        _step(reference, lambda: reference(*batch), config, bf16),
    ]


def _step(model: nn.Module, loss: Callable[[], Tensor], config: ExperimentConfig, bf16: bool) -> Step:
    optimizer = build_optimizer(model, config.optim)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = loss()
        (total / 1000).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: list[Step], rounds: int) -> list[list[float]]:
    """Processor seconds of each step in each round; the first round is a warm-up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, measured in zip(steps, seconds, strict=True):
            start = time.process_time()
            step()
            if number:
                measured.append(time.process_time() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=REPO / "recipes" / "conf" / "conformer-m.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--utterances", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = load_config([options.config], ["encoder.dropout=0.0", "decoder.dropout=0.0"])
    n, frames, num_tokens = options.utterances, int(options.seconds * 100), 500
    x_lens = torch.full((n,), frames)
    tokens = torch.randint(3, num_tokens, (n, int(options.seconds * 4)))
    batch = (
        torch.randn(n, frames, config.features.num_bins),
        x_lens,
        tokens,
        torch.full((n,), tokens.shape[1]),
    )
    for name, bf16 in (("fp32", False), ("bf16", True)):
        ours, reference = measure(steps_of(config, batch, num_tokens, bf16), options.rounds)
        ratio = statistics.median(a / b for a, b in zip(ours, reference, strict=True))
        print(
            f"{name}  ours {statistics.median(ours):.2f} s  reference {statistics.median(reference):.2f} s  "
            f"ratio {ratio:.2f}  ({n} x {options.seconds:g} s, one thread)"
        )


if __name__ == "__main__":
    main()
