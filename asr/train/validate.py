"""Validation: loss and greedy word error rate on held-out utterances."""

import torch
from torch import Tensor

from asr.config import ExperimentConfig
from asr.data.loader import Batch, Loader
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy
from asr.decode.joint import search
from asr.decode.prompt import with_prompt
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import Memory, TorchScorer
from asr.tokens import Tokenizer
from asr.train import distributed
from asr.train.step import num_targets
from asr.wer import ErrorCount, align, count_errors


@torch.no_grad()
def validate(
    model: HybridModel, loader: Loader, tokenizer: Tokenizer, config: ExperimentConfig
) -> dict[str, float]:
    """Loss per token (total, ctc, attention), and WER in per cent of the best CTC path or, without a CTC
    head, of greedy decoding, with full context. Words are those that the units spell, also in the reference;
    each ideograph is a word. Every rank processes a share of data.valid and gets the overall result."""
    model.eval()
    device = model.cmvn.mean.device
    sums = torch.zeros(6, dtype=torch.float64)
    for batch in loader.validation(limit=config.train.valid_utterances):
        if not batch.is_empty:
            sums += _one(model, batch.to(device), tokenizer)
    model.train()
    total, ctc, attention, tokens, errors, words = distributed.gather(sums).sum(0).tolist()
    rates = {
        "loss": total / max(1, tokens),
        "ctc": ctc / max(1, tokens),
        "attention": attention / max(1, tokens),
    }
    return {**rates, "wer": 100 * errors / max(1, words), "words": words}


def _one(model: HybridModel, batch: Batch, tokenizer: Tokenizer) -> torch.Tensor:
    """Sums over a batch: total, ctc and attention loss, tokens, word errors, words."""
    x, x_lens = model.features(batch.samples, batch.sample_lens)
    ends = model.frames_behind(batch.token_ends_s)
    loss = model(x, x_lens, batch.tokens, batch.token_lens, token_ends=ends)
    written = _written(model, *model.encode(x, x_lens), tokenizer)
    errors = ErrorCount()
    for tokens, num_tokens, found in zip(batch.tokens, batch.token_lens.tolist(), written, strict=True):
        spoken = tokens[:num_tokens].tolist()
        ref, hyp = ([word for word, _, _ in tokenizer.words(ids)] for ids in (spoken, found))
        errors += count_errors(align(ref, hyp))
    losses = [float(value) for value in (loss.total, loss.ctc, loss.attention)]
    return torch.tensor([*losses, num_targets(batch), errors.total, errors.ref], dtype=torch.float64)


def _written(model: HybridModel, y: Tensor, y_lens: Tensor, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each utterance by greedy decoding, with CTC or else with the decoder."""
    log_probs = model.ctc_log_probs(y).cpu().numpy()
    frames = [x[:length] for x, length in zip(log_probs, y_lens.tolist(), strict=True)]
    if model.ctc is None:
        scorer = TorchScorer(model, y.device, symbols=tokenizer.symbols)
        memory = Memory(*model.decoder.memory(y), y, y_lens)
        config = with_prompt(scorer, SearchConfig(beam=1, ctc_weight=0.0))
        return [nbest[0].tokens for nbest in search(scorer, frames, memory, config)]
    greedy = [CtcGreedy() for _ in frames]
    for one, x in zip(greedy, frames, strict=True):
        one.advance(x)
    return [one.best().tokens for one in greedy]
