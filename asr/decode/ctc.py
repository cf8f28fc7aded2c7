"""Frame-synchronous CTC search: the best path, and the prefix beam search, both fed in chunks of any length.

The probability of a token sequence is the sum over its alignments. A prefix beam search keeps, for each of
the B best prefixes, the sums over the alignments that end in a blank and over those that end in the
prefix's last token, since only the former may be followed by that token again. Alongside the sums it keeps
the same two numbers for the single best alignment (Viterbi), which gives the frame of each token.

A prefix is identified by a 64-bit hash of its tokens. An extension whose hash matches a prefix already in the
beam is merged into it; this compares B parents with B prefixes and never looks at token sequences. Tokens are
read on demand from a tree of (parent node, token, frame), with one node per beam slot and frame.

N streams · B beam · K tokens considered per frame · T frames · V units, blank is 0. Log-probabilities in
nats.

Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional Recurrent
DNNs", arXiv:1408.2873.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import BLANK, Floats, Hypothesis, Ints

Doubles = NDArray[np.float64]

# rows of CtcPrefixBeam._floats: sums over alignments, the best alignment, and the highest log-probability
# that the last token reached on it; each for alignments ending in blank, and in the last token
SUM, PATH, PEAK = slice(0, 2), slice(2, 4), slice(4, 6)
# rows of CtcPrefixBeam._ints; the tree node of the best alignment has two, as above
LAST, HASH, PARENT_HASH, NODE = 0, 1, 2, slice(3, 5)

ROOT_HASH, NO_HASH, NO_PARENT = 0x2545F4914F6CDD1D, -1, -2
MIX = np.array((0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB), np.uint64).astype(np.int64)


class CtcGreedy:
    """The best path: the likeliest symbol of each frame, repeats merged, blanks dropped."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next frame is the first of an utterance."""
        self.num_frames = 0
        self._symbol = BLANK
        self._score = 0.0
        self._tokens: list[int] = []
        self._frames: list[int] = []
        self._peaks: list[float] = []

    def advance(self, log_probs: Floats) -> None:
        """Take the next frames, log_probs (t, V)."""
        if not len(log_probs):
            return
        symbols = log_probs.argmax(1)
        values = log_probs[np.arange(len(symbols)), symbols].astype(np.float64)
        starts = np.flatnonzero(np.diff(symbols, prepend=-1))
        peaks = np.maximum.reduceat(values, starts)
        for start, peak in zip(starts.tolist(), peaks.tolist(), strict=True):
            self._run(int(symbols[start]), self.num_frames + start, peak)
        self._score += float(values.sum())
        self.num_frames += len(symbols)

    def _run(self, symbol: int, frame: int, peak: float) -> None:
        """Take a run of equal symbols, which may continue the last run of the previous chunk."""
        if symbol != BLANK and symbol == self._symbol:
            self._peaks[-1] = max(self._peaks[-1], peak)
        elif symbol != BLANK:
            self._tokens.append(symbol)
            self._frames.append(frame)
            self._peaks.append(peak)
        self._symbol = symbol

    def best(self) -> Hypothesis:
        """The tokens so far; the score is the log-probability of the one path."""
        return Hypothesis(
            tuple(self._tokens),
            self._score,
            {"ctc": self._score},
            tuple(self._frames),
            tuple(np.exp(self._peaks).tolist()),
        )

    def nbest(self, count: int = 1) -> list[Hypothesis]:
        """A single hypothesis, whatever `count`."""
        return [self.best()]


class CtcPrefixBeam:
    """Prefix beam search of one stream.

    beam: prefixes kept after each frame. tokens_per_frame: only this many of a frame's most likely tokens
    may be emitted in it; blank always may. With both large enough the scores are exact.

    A hypothesis' score is the log-probability of its tokens, its `frames` are those of the best alignment,
    and its confidences the highest probability of each token in the frames that this alignment gives it.
    """

    def __init__(self, beam: int = 10, tokens_per_frame: int = 10) -> None:
        self.beam = beam
        self.tokens_per_frame = tokens_per_frame
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next frame is the first of an utterance."""
        self.num_frames = 0
        self._floats = np.full((6, self.beam), -np.inf)
        self._floats[[0, 2, 4], 0] = 0.0
        self._ints = np.full((5, self.beam), -1, np.int64)
        self._ints[HASH], self._ints[PARENT_HASH] = NO_HASH, NO_PARENT
        self._ints[HASH, 0] = ROOT_HASH
        self._tree = _Tree(self.beam)

    def advance(self, log_probs: Floats) -> None:
        """Take the next frames, log_probs (t, V)."""
        advance_all([self], [log_probs])

    def best(self) -> Hypothesis:
        """The most probable tokens so far."""
        return self.nbest(1)[0]

    def nbest(self, count: int) -> list[Hypothesis]:
        """At most `count` different token sequences, the most probable first."""
        scores = np.logaddexp(*self._floats[SUM])
        order = np.argsort(-scores, kind="stable")[:count]
        return [self._hypothesis(int(b), float(scores[b])) for b in order if scores[b] > -np.inf]

    def _hypothesis(self, slot: int, score: float) -> Hypothesis:
        """Read the tokens of one slot, and their best alignment, from the tree."""
        end = int(np.argmax(self._floats[PATH, slot]))
        tokens, frames, peaks = self._tree.trace(int(self._ints[NODE][end, slot]))
        peaks = [*peaks[1:], float(self._floats[PEAK][end, slot])]
        confidence = np.exp(peaks[: len(tokens)]).tolist()
        return Hypothesis(tuple(tokens), score, {"ctc": score}, tuple(frames), tuple(confidence))


def advance_all(beams: Sequence[CtcPrefixBeam], log_probs: Sequence[Floats]) -> None:
    """Advance N streams of equal beam by their next frames, log_probs (t_n, V) each, in one pass over time.

    The same as `advance` on each, bit for bit, and several times faster.
    """
    order = sorted(range(len(beams)), key=lambda n: -len(log_probs[n]))
    beams, log_probs = [beams[n] for n in order], [log_probs[n] for n in order]
    lens = np.array([len(x) for x in log_probs])
    if not lens.any():
        return
    tokens, values, blanks = _likeliest(log_probs, int(lens[0]), beams[0].tokens_per_frame)
    floats = np.stack([b._floats for b in beams], 1)
    ints = np.stack([b._ints for b in beams], 1)
    first = np.array([b.num_frames for b in beams])
    nodes = np.empty((2, lens[0], *ints.shape[1:]), np.int64)
    peaks = np.empty((lens[0], *ints.shape[1:]))

    for t in range(lens[0]):
        n = int(np.count_nonzero(lens > t))  # the streams that still have frames come first
        now = _Frame(tokens[t, :n], values[t, :n], blanks[t, :n], first[:n, None] + t)
        nodes[:, t, :n], peaks[t, :n] = _step(floats[:, :n], ints[:, :n], now)

    for n, (beam, count) in enumerate(zip(beams, lens.tolist(), strict=True)):
        beam._floats, beam._ints = floats[:, n].copy(), ints[:, n].copy()
        beam._tree.append(nodes[:, :count, n], peaks[:count, n])
        beam.num_frames += count


def _likeliest(log_probs: Sequence[Floats], num_frames: int, count: int) -> tuple[Ints, Doubles, Doubles]:
    count = min(count, log_probs[0].shape[1] - 1)
    tokens = np.zeros((num_frames, len(log_probs), count), np.int64)
    values = np.full(tokens.shape, -np.inf)
    blanks = np.zeros((num_frames, len(log_probs), 1))
    for n, frames in enumerate(log_probs):
        top = np.argpartition(frames[:, 1:], -count, axis=1)[:, -count:] + 1
        tokens[: len(frames), n] = top
        values[: len(frames), n] = np.take_along_axis(frames, top, 1)
        blanks[: len(frames), n, 0] = frames[:, BLANK]
    return tokens, values, blanks


class _Frame(NamedTuple):
    """One frame of N streams."""

    tokens: Ints
    """The most likely tokens (N, K)."""
    values: Doubles
    """Their log-probabilities (N, K)."""
    blank: Doubles
    """Log-probability of blank (N, 1)."""
    number: Ints
    """Index of the frame within its stream (N, 1)."""


class _Kept(NamedTuple):
    """Where the B survivors of a frame come from, (N, B) each; slots are numbered across all streams."""

    is_new: NDArray[np.bool_]
    """A token was appended; otherwise the prefix is unchanged, by blank or by its last token again."""
    slot: Ints
    """The slot of its prefix before this frame, without any appended token."""
    enters: NDArray[np.bool_]
    """Whether some alignments enter the last token in this frame; an unchanged prefix needs its parent in the
    beam for that."""
    parent: Ints
    """The slot of the prefix without the last token, where `enters`."""
    token: Ints
    log_prob: Doubles
    """The last token's log-probability in this frame."""


def _step(floats: Doubles, ints: Ints, frame: _Frame) -> tuple[Ints, Doubles]:
    """Advance N streams by one frame, in place.

    floats (6, N, B) and ints (5, N, B) as named above. Returns the parent and token of this frame's tree
    nodes (2, N, B), and the highest log-probability of the parent's token (N, B).
    """
    _, num, beam = floats.shape
    tokens, values, blank, _ = frame
    width = tokens.shape[1]
    base = np.arange(num)[:, None]
    total = np.logaddexp(floats[0], floats[1])

    # each prefix with each token, (N, B, K)
    same = ints[LAST][:, :, None] == tokens[:, None]
    extended = np.where(same, floats[0][:, :, None], total[:, :, None]) + values[:, None]
    again = np.where(same, values[:, None], -np.inf).max(2)
    # a prefix whose parent is in the beam is also an extension of it: add that here, and drop it there
    child = ints[PARENT_HASH][:, :, None] == ints[HASH][:, None]
    parent = base * beam + child.argmax(2)
    merged = child.any(2) & same.any(2)
    place = parent * width + same.argmax(2)
    gain = np.where(merged, extended.ravel()[place], -np.inf)
    extended.ravel()[place[merged]] = -np.inf
    in_blank, in_token = total + blank, np.logaddexp(floats[1] + again, gain)
    scores = np.concatenate((np.logaddexp(in_blank, in_token), extended.reshape(num, -1)), 1)

    index = np.argpartition(scores, -beam, axis=1)[:, -beam:]
    is_new = index >= beam
    slot = base * beam + np.where(is_new, (index - beam) // width, index)
    choice = base * width + (index - beam) % width
    score = scores.ravel()[base * scores.shape[1] + index]
    kept = _Kept(
        is_new,
        slot,
        is_new | merged.ravel()[slot],
        np.where(is_new, slot, parent.ravel()[slot]),
        np.where(is_new, tokens.ravel()[choice], ints[LAST].ravel()[slot]),
        np.where(is_new, values.ravel()[choice], again.ravel()[slot]),
    )
    nodes = _viterbi(floats, ints, kept, frame)
    floats[0] = np.where(is_new, -np.inf, in_blank.ravel()[slot])
    floats[1] = np.where(is_new, score, in_token.ravel()[slot])
    _rehash(ints, kept, score > -np.inf)
    return nodes


def _viterbi(floats: Doubles, ints: Ints, kept: _Kept, frame: _Frame) -> tuple[Ints, Doubles]:
    """Update the best alignment of each survivor (PATH, PEAK, NODE): `_step` with max instead of sum.

    Returns what `_step` returns.
    """
    paths, peaks = floats[PATH].reshape(2, -1), floats[PEAK].reshape(2, -1)
    nodes = ints[NODE].reshape(2, -1)
    in_blank = paths[0] >= paths[1]
    # into the last token from its parent; through a blank if the parent ends in the same token
    from_blank = (ints[LAST].ravel()[kept.parent] == kept.token) | in_blank[kept.parent]
    source = np.where(from_blank, kept.parent, kept.parent + paths.shape[1])
    enter = np.where(kept.enters, paths.ravel()[source] + kept.log_prob, -np.inf)
    tree_nodes, tree_peaks = np.array((nodes.ravel()[source], kept.token)), peaks.ravel()[source]
    # within the last token, and from either end into blank
    path_blank, path_token = paths[:, kept.slot]
    peak_blank, peak_token = peaks[:, kept.slot]
    node_blank, node_token = nodes[:, kept.slot]
    stay = np.where(kept.is_new, -np.inf, path_token + kept.log_prob)
    entered, in_blank = enter > stay, in_blank[kept.slot]
    node = frame.number * floats.shape[2] + np.arange(floats.shape[2])
    rest = np.maximum(path_blank, path_token) + frame.blank
    floats[2] = np.where(kept.is_new, -np.inf, rest)
    floats[3] = np.maximum(enter, stay)
    floats[4] = np.where(in_blank, peak_blank, peak_token)
    floats[5] = np.where(entered, kept.log_prob, np.maximum(peak_token, kept.log_prob))
    ints[3] = np.where(in_blank, node_blank, node_token)
    ints[4] = np.where(entered, node, node_token)
    return tree_nodes, tree_peaks


def _rehash(ints: Ints, kept: _Kept, alive: NDArray[np.bool_]) -> None:
    """Update the last tokens and hashes of the survivors; a slot that nothing could fill matches no other."""
    own, parent = ints[HASH].ravel()[kept.slot], ints[PARENT_HASH].ravel()[kept.slot]
    ints[LAST] = kept.token
    ints[HASH] = np.where(kept.is_new, extend_hash(own, kept.token), own)
    ints[PARENT_HASH] = np.where(kept.is_new, own, parent)
    if not alive.all():
        ints[HASH] = np.where(alive, ints[HASH], NO_HASH)
        ints[PARENT_HASH] = np.where(alive, ints[PARENT_HASH], NO_PARENT)


def extend_hash(prefix: Ints, token: Ints) -> Ints:
    """Hashes of token sequences -> hashes of the sequences extended by one token."""
    mixed = (prefix ^ (token * MIX[0])) * MIX[1]  # wraps around
    mixed = (mixed ^ (mixed >> 29)) * MIX[2]
    return mixed ^ (mixed >> 32)


class _Tree:
    """Nodes (parent, token, peak of the parent's token): `beam` per frame, so a node's number gives its
    frame."""

    def __init__(self, beam: int) -> None:
        self.beam = beam
        self.num_frames = 0
        self.nodes = np.empty((2, 64, beam), np.int64)
        self.peaks = np.empty((64, beam))

    def append(self, nodes: Ints, peaks: Doubles) -> None:
        """Append the nodes of the next frames, (2, t, B) and (t, B)."""
        end = self.num_frames + len(peaks)
        if end > len(self.peaks):
            room = max(end, 2 * len(self.peaks)) - len(self.peaks)
            self.nodes = np.pad(self.nodes, ((0, 0), (0, room), (0, 0)))
            self.peaks = np.pad(self.peaks, ((0, room), (0, 0)))
        self.nodes[:, self.num_frames : end] = nodes
        self.peaks[self.num_frames : end] = peaks
        self.num_frames = end

    def trace(self, node: int) -> tuple[list[int], list[int], list[float]]:
        """From the root (-1) to `node`: tokens, frames, and the peak of the token before each."""
        steps = []
        while node >= 0:
            frame, slot = divmod(node, self.beam)
            parent, token = self.nodes[:, frame, slot].tolist()
            steps.append((token, frame, float(self.peaks[frame, slot])))
            node = parent
        tokens, frames, peaks = zip(*reversed(steps), strict=True) if steps else ((), (), ())
        return list(tokens), list(frames), list(peaks)
