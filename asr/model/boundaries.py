"""Segment boundaries of a known text that a segmental decoder finds likeliest (arXiv:2210.14742).

A segmental decoder learns from the alignment of another model, and can then realign the data itself. This is
a Viterbi search over the end of each token, near the known end:

    score(u, t) = max over t' < t of score(u - 1, t') + log p(t | t', a_{u-1}) + log p(a_u | segment (t', t])

The tokens are given, so the search state is only where the last segment ended. A decoder of several layers
also has a state, which is taken from the best path to that end.

N utterances · U tokens · T encoder frames, counted from 1 where they end a segment · K ends of each token
that are tried · W tokens before this one
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asr.model.decoder import SOS_EOS, DecoderState, Order, Window, in_order
from asr.model.segmental import SegmentalDecoder, fit_ends, label_log_probs
from asr.model.state import select

REACH = 6
"""Frames by which an end may move, earlier or later. The cost grows with the square."""


class Ends(NamedTuple):
    """The segment ends of N utterances, (N, U) each; undefined after the last token."""

    end: Tensor
    """One past the last frame of the segment."""

    score: Tensor
    """Log-probability of the token and of the length of its segment."""


class Lattice(NamedTuple):
    """The candidate segments of one token of each utterance: any start with any later end."""

    start: Tensor
    """(N, K)."""

    end: Tensor
    """(N, K)."""

    y_lens: Tensor
    """(N,)."""

    @property
    def durations(self) -> Tensor:
        """(N, K starts, K ends); 0 or less where the end is not after the start."""
        return self.end[:, None] - self.start[:, :, None]


@torch.no_grad()
def likeliest_ends(
    decoder: SegmentalDecoder,
    y: Tensor,
    y_lens: Tensor,
    tokens: Tensor,
    token_lens: Tensor,
    near: Tensor,
    reach: int = REACH,
) -> Ends:
    """The ends that maximise p(tokens, ends | y) among those within `reach` frames of near (N, U).

    y (N, T, C), y_lens (N,), tokens (N, U), token_lens (N,). Every utterance needs at least one frame, and
    at least as many frames as tokens. Exact for a decoder of one layer; with more, paths that reach an end
    with a lower score are dropped although their state differs.
    """
    order = token_lens.argsort(descending=True)  # utterances that still go on stay in front
    y, y_lens, tokens, token_lens, near = (x[order] for x in (y, y_lens, tokens, token_lens, near))
    ends = _candidates(near, token_lens, y_lens, reach)
    inputs = F.pad(tokens, (1, 0), value=SOS_EOS)
    targets = F.pad(tokens, (0, 1)).scatter(1, token_lens[:, None], SOS_EOS)
    keys, values = (x.repeat_interleave(ends.shape[2], 0) for x in decoder.memory(y))
    state = decoder.init_state(len(keys))
    score = torch.zeros_like(ends[:, 0], dtype=torch.float32)
    start = torch.zeros_like(ends[:, 0])
    scores, ways = [], []
    for u in range(inputs.shape[1]):
        n = int((token_lens >= u).sum())
        rows = n * ends.shape[2]
        lattice = Lattice(start[:n], ends[:n, u], y_lens[:n])
        state = state.of([x[:rows] for x in state.tensors()])
        label, target, memory = inputs[:n, u], targets[:n, u], (keys[:rows], values[:rows])
        said, state = _labels(decoder, lattice, label, target, memory, state)
        total = score[:n, :, None] + said + _lengths(decoder, lattice, label, y[:n])
        score, way = total.max(1)
        state, start = _arrived(state, way), lattice.end
        scores.append(score)
        ways.append(way)
    found = _walk_back(ends, scores, ways, token_lens)
    back = order.argsort()
    return Ends(found.end[back], found.score[back])


def _candidates(near: Tensor, token_lens: Tensor, y_lens: Tensor, reach: int) -> Tensor:
    """Candidate ends (N, U + 1, K) of the tokens, and of sos/eos at the last frame; duplicates may occur."""
    middle = fit_ends(near, token_lens, y_lens)
    u = torch.arange(middle.shape[1], device=near.device)
    is_token = u < token_lens[:, None]
    first = torch.where(is_token, u + 1, y_lens[:, None])
    last = torch.where(is_token, y_lens[:, None] - (token_lens[:, None] - 1 - u), y_lens[:, None])
    moved = middle[:, :, None] + torch.arange(-reach, reach + 1, device=near.device)
    return moved.clamp(first[:, :, None], last[:, :, None])


def _labels(
    decoder: SegmentalDecoder,
    lattice: Lattice,
    inputs: Tensor,
    targets: Tensor,
    memory: tuple[Tensor, Tensor],
    state: DecoderState,
) -> tuple[Tensor, DecoderState]:
    """Log-probability of targets (N,) for every segment (N, K, K), -inf for an impossible one, and the state
    with a token for each end. State and memory have N * K rows, one for each start."""
    n, num_ends = lattice.end.shape
    ends = lattice.end.repeat_interleave(num_ends, 0)
    starts = torch.minimum(lattice.start.flatten()[:, None], ends - 1)
    window = Window(torch.maximum(starts, ends - decoder.config.max_segment_frames), ends)
    y_lens = lattice.y_lens.repeat_interleave(num_ends)
    width = state.keys.shape[3]
    positions, visible = in_order(inputs[:1, None], width, decoder.config.left_tokens)
    alone = torch.eye(num_ends, dtype=torch.bool, device=ends.device)[None]
    visible = torch.cat([visible[:, :, :width].expand(1, num_ends, width), alone], 2)
    order = Order(positions.expand(1, num_ends), visible)
    tokens = inputs.repeat_interleave(num_ends)[:, None].expand(-1, num_ends)
    logits, _, state = decoder(tokens, *memory, y_lens, state, window, order=order)
    log_probs = label_log_probs(logits.float(), is_last=ends == y_lens[:, None]).unflatten(0, (n, num_ends))
    said = log_probs.gather(3, targets[:, None, None, None].expand(n, num_ends, num_ends, 1))[..., 0]
    said = said.masked_fill(lattice.durations <= 0, -torch.inf)
    over = (targets == SOS_EOS)[:, None, None] & (lattice.durations == 0)  # the last token ended there
    return said.masked_fill(over, 0.0), state


def _lengths(decoder: SegmentalDecoder, lattice: Lattice, inputs: Tensor, y: Tensor) -> Tensor:
    """Log-probability of the length of every segment (N, K, K) that follows inputs (N,); 0 for an impossible
    one."""
    durations = lattice.durations.clamp(min=0)
    lasting = torch.arange(1, int(durations.max()) + 1, device=y.device)
    frames = (lattice.start[:, :, None] + lasting - 1).clamp(max=y.shape[1] - 1)
    heard = y[torch.arange(len(y), device=y.device)[:, None, None], frames]
    log_odds = decoder.length(heard, inputs[:, None, None], lasting)
    waiting = F.pad(F.logsigmoid(-log_odds).cumsum(2), (1, 0)).gather(2, (durations - 1).clamp(min=0))
    ending = F.pad(F.logsigmoid(log_odds), (1, 0)).gather(2, durations)
    is_last = (lattice.end == lattice.y_lens[:, None])[:, None]
    return waiting + torch.where(is_last, 0.0, ending)


def _arrived(state: DecoderState, way: Tensor) -> DecoderState:
    """From N * K rows with W + K tokens, the best row for each end, way (N, K), with W + 1 tokens."""
    n, num_ends = way.shape
    row = (torch.arange(n, device=way.device)[:, None] * num_ends + way).flatten()
    end = torch.arange(num_ends, device=way.device).repeat(n)
    width = state.keys.shape[3] - num_ends
    past = select(state, row)
    new = (x[row, :, :, width + end][:, :, :, None] for x in state.tensors())
    pairs = zip(past.tensors(), new, strict=True)
    return state.of([torch.cat([x[:, :, :, :width], latest], 3) for x, latest in pairs])


def _walk_back(ends: Tensor, scores: list[Tensor], ways: list[Tensor], token_lens: Tensor) -> Ends:
    """Backtrack from the end of each utterance: which of `ends` (N, U + 1, K) lie on the best path."""
    place = torch.zeros_like(token_lens)
    end, total = torch.zeros_like(ends[:, :, 0]), torch.zeros_like(ends[:, :, 0], dtype=torch.float32)
    for u in reversed(range(len(ways))):
        n = len(ways[u])
        end[:n, u] = ends[:n, u].gather(1, place[:n, None])[:, 0]
        total[:n, u] = scores[u].gather(1, place[:n, None])[:, 0]
        place[:n] = ways[u].gather(1, place[:n, None])[:, 0]
    return Ends(end[:, :-1], total.diff(dim=1, prepend=total.new_zeros(len(total), 1))[:, :-1])
