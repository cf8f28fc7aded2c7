"""Unit times survive operations on cuts, and an alignment that does not fit is refused."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut
from lhotse.supervision import AlignmentItem, SupervisionSegment

from asr.data.alignment import KIND, token_ends, with_alignment
from asr.data.augment import AugmentConfig
from asr.data.cuts import cut_text, join_cuts, open_cuts, save_cuts
from asr.data.loader import Batch, DataConfig, Loader, build_loader
from asr.errors import ManifestError
from asr.tokens import Tokenizer, train_tokenizer

from .conftest import Corpus

DURATIONS = [0.6 + 0.02 * n for n in range(24)]
PLAIN = AugmentConfig(speed=[])
STEP_S = 0.05
"""Unit number n of an utterance is spoken from n to n + 1 steps."""


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"word {number}" for number in range(24)] * 3
    return train_tokenizer(texts, "bpe", 20, tmp_path_factory.mktemp("pieces"))


@pytest.fixture(params=["char", "bpe"])
def units(request: pytest.FixtureRequest, tokenizer: Tokenizer, pieces: Tokenizer) -> Tokenizer:
    """Units with a separate space, and units that begin with one."""
    return tokenizer if request.param == "char" else pieces


def symbols(tokenizer: Tokenizer, cut: Cut) -> list[str]:
    return [tokenizer.symbols[token] for token in tokenizer.encode(cut_text(cut))]


def aligned(cut: Cut, tokenizer: Tokenizer) -> Cut:
    count = len(symbols(tokenizer, cut))
    spans = [(STEP_S * n, STEP_S * (n + 1), -0.5) for n in range(count)]
    return with_alignment(cut, tokenizer, spans)


def ends(cut: Cut, tokenizer: Tokenizer) -> list[float]:
    return token_ends([cut], [symbols(tokenizer, cut)])[0]


Manifest = Callable[..., Path]


@pytest.fixture
def manifest(corpus: Corpus) -> Manifest:
    """manifest(tokenizer, name) -> a corpus with alignments."""

    def make(tokenizer: Tokenizer, name: str = "train") -> Path:
        path = corpus(DURATIONS, name)
        save_cuts([aligned(cut, tokenizer) for cut in open_cuts(path)], path)
        return path

    return make


def loader(
    path: Path | Sequence[Path], tokenizer: Tokenizer, speed: Sequence[float] = (), **data: object
) -> Loader:
    paths = [path] if isinstance(path, Path) else path
    fields = {"train": [str(p) for p in paths], "max_batch_s": 6.0, "max_utterance_s": 6.0, "num_workers": 0}
    config = DataConfig(**fields | data)  # type: ignore[arg-type]
    return build_loader(config, replace(PLAIN, speed=list(speed)), tokenizer, 16000)


def epoch(from_loader: Loader) -> list[Batch]:
    batches = []
    for batch in from_loader.forever():
        if batch.position["epoch"] > 0:
            return batches
        batches.append(batch)
    return batches


def close(actual: torch.Tensor, expected: Sequence[float], atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=atol)


def test_an_alignment_is_read_as_it_was_written_and_by_lhotse_too(
    manifest: Manifest, units: Tokenizer
) -> None:
    path = manifest(units)
    cuts = list(open_cuts(path))
    assert list(CutSet.from_file(path)) == cuts
    items = cuts[7].supervisions[0].alignment[KIND]
    assert [item.symbol for item in items] == symbols(units, cuts[7])
    assert items[2] == AlignmentItem(items[2].symbol, pytest.approx(2 * STEP_S), STEP_S, -0.5)
    assert ends(cuts[7], units) == pytest.approx([STEP_S * (n + 1) for n in range(len(items))])


def test_other_alignments_of_a_supervision_stay(corpus: Corpus, tokenizer: Tokenizer) -> None:
    (cut,) = open_cuts(corpus([1.0]))
    words = {"word": [AlignmentItem("word", 0.0, 0.4)]}
    cut.supervisions[0].alignment = words
    assert set(aligned(cut, tokenizer).supervisions[0].alignment) == {"word", KIND}
    assert set(words) == {"word"}


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_scales_the_times(manifest: Manifest, units: Tokenizer, factor: float) -> None:
    for batch in epoch(loader(manifest(units), units, speed=[factor])):
        for row, num_tokens in enumerate(batch.token_lens):
            expected = [STEP_S * (n + 1) / factor for n in range(num_tokens)]
            close(batch.token_ends_s[row, :num_tokens], expected, atol=2e-4)


def test_another_rate_changes_no_time(corpus: Corpus, tokenizer: Tokenizer) -> None:
    path = corpus([0.6, 0.7], "low", 8000)
    save_cuts([aligned(cut, tokenizer) for cut in open_cuts(path)], path)
    (batch,) = epoch(loader(path, tokenizer))
    close(batch.token_ends_s[0], [STEP_S * (n + 1) for n in range(6)])


def parts(cut: Cut) -> list[SupervisionSegment]:
    return sorted(cut.supervisions, key=lambda segment: segment.start)


def test_joined_words_bring_their_times_along(manifest: Manifest, units: Tokenizer) -> None:
    joined = join_cuts(open_cuts(manifest(units)), random.Random(0), (2, 4))
    for cut in joined:
        found = ends(cut, units)
        assert len(found) == len(symbols(units, cut)) == len(units.encode(cut_text(cut)))
        for segment in parts(cut):
            number = len(segment.alignment[KIND])
            own = [segment.start + STEP_S * (n + 1) for n in range(number)]
            if units.kind == "char" and segment.start > 0:
                own.insert(0, segment.start)  # the pause before it
            assert found[: len(own)] == pytest.approx(own)
            found = found[len(own) :]
        assert not found


def test_times_are_of_the_sound_that_is_heard(manifest: Manifest, units: Tokenizer) -> None:
    """Joined, sped up, in noise: each word begins after silence, at the time of its first unit."""
    path = manifest(units)
    batches = epoch(loader(path, units, speed=[0.9, 1.1], join_words=[2, 3], join_pause_s=[0.2, 0.3]))
    assert any(len(text.split()) == 6 for batch in batches for text in batch.texts)
    checked = 0
    for batch in batches:
        for row, text in enumerate(batch.texts):
            ids = batch.tokens[row, : batch.token_lens[row]].tolist()
            end_s = batch.token_ends_s[row, : len(ids)].tolist()
            assert end_s == sorted(end_s)
            starts = [first for word, first, _ in units.words(ids) if word == "word"]
            assert len(starts) == text.count("word")
            for first in starts[1:]:
                end = round(end_s[first] * 16000)
                step = round(STEP_S * 16000 / 0.9)
                heard = batch.samples[row, :].abs()
                assert heard[end - 160 : end].max() > 0.05
                assert heard[end - step - 1200 : end - step - 160].max() < 0.01
                checked += 1
    assert checked > 5


def test_workers_change_no_time(manifest: Manifest, tokenizer: Tokenizer) -> None:
    path = manifest(tokenizer)
    options = {"speed": [0.9, 1.1], "join_words": [1, 3]}
    ours = epoch(loader(path, tokenizer, **options))  # type: ignore[arg-type]
    theirs = epoch(loader(path, tokenizer, num_workers=2, **options))  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        assert a.ids == b.ids
        assert a.token_ends_s.shape == a.tokens.shape
        assert a.token_ends_s.dtype == torch.float32
        assert torch.equal(a.token_ends_s, b.token_ends_s)
        assert torch.equal(a.to("cpu").token_ends_s, a.token_ends_s)
        inside = torch.arange(a.tokens.shape[1]) < a.token_lens[:, None]
        assert (a.token_ends_s[inside] > 0).all()
        assert not a.token_ends_s[~inside].any()


def test_without_alignments_there_are_no_times(corpus: Corpus, tokenizer: Tokenizer) -> None:
    for batch in epoch(loader(corpus(DURATIONS), tokenizer)):
        assert batch.token_ends_s.shape == (len(batch.ids), 0)


def test_a_batch_that_lost_everything_has_no_times(manifest: Manifest, tokenizer: Tokenizer) -> None:
    path = manifest(tokenizer)
    reader = loader(path, tokenizer).reader
    for file in (path.parent / "train").glob("*.wav"):
        file.unlink()
    batch = reader.batch(list(open_cuts(path))[:3], {})
    assert batch.is_empty
    assert batch.token_ends_s.shape == batch.tokens.shape == (1, 0)


def test_an_utterance_without_text_needs_no_alignment(manifest: Manifest, tokenizer: Tokenizer) -> None:
    first, second = list(open_cuts(manifest(tokenizer)))[:2]
    first = replace(first, supervisions=[])
    assert [len(row) for row in token_ends([first, second], [[], symbols(tokenizer, second)])] == [0, 6]
    assert with_alignment(first, tokenizer, []) == first


def test_joined_utterances_are_aligned_as_a_whole(corpus: Corpus, units: Tokenizer) -> None:
    """Each unit keeps its time, stored relative to the start of its part; the cut itself does not change."""
    for cut in join_cuts(open_cuts(corpus(DURATIONS)), random.Random(1), (2, 3), max_s=4.0):
        before = cut.to_dict()
        expected = [STEP_S * (n + 1) for n in range(len(symbols(units, cut)))]
        changed = aligned(cut, units)
        assert cut.to_dict() == before
        assert ends(changed, units) == pytest.approx(expected, abs=1e-5)
        assert isinstance(changed, MixedCut)
        faster = changed.perturb_speed(1.25)
        assert ends(faster, units) == pytest.approx([end / 1.25 for end in expected], abs=2e-4)
        assert ends(changed.pad(duration=10.0, direction="left"), units)[0] > 10.0 - changed.duration


def test_a_truncated_cut_keeps_the_times_of_its_text(manifest: Manifest, tokenizer: Tokenizer) -> None:
    cut = next(iter(open_cuts(manifest(tokenizer)))).pad(duration=1.0, direction="left")
    later = cut.truncate(offset=0.3)
    expected = [end - 0.3 for end in ends(cut, tokenizer)]
    assert ends(later, tokenizer) == pytest.approx(expected)


def test_units_that_span_words_cannot_be_aligned_part_by_part(corpus: Corpus, tokenizer: Tokenizer) -> None:
    class Spanning:
        symbols = ("whole", "half")

        def encode(self, text: str) -> list[int]:
            return [0] if text.count("word") > 1 else [1]

    cut = next(iter(join_cuts(open_cuts(corpus(DURATIONS)), random.Random(1), (2, 2))))
    message = f"^{cut.id.replace('+', '.')}: .* from unit 0 on half half, expected whole; use a tokenizer"
    with pytest.raises(ManifestError, match=message):
        with_alignment(cut, Spanning(), [(0, 1, 0)])  # type: ignore[arg-type]


def spoil(path: Path, change: Callable[[list[AlignmentItem]], list[AlignmentItem]]) -> None:
    """Change the alignment of every utterance."""
    cuts = list(open_cuts(path))
    for cut in cuts:
        segment = cut.supervisions[0]
        segment.alignment = {KIND: change(segment.alignment[KIND])}
    save_cuts(cuts, path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda items: [*items[:4], items[4]._replace(symbol="@"), *items[5:]],
            r"train\d+: alignment does not fit its text: from unit 4 on @.*, expected ▁.*; run asr align",
        ),
        (lambda items: items[:5], r"from unit 5 on nothing, expected \d"),
        (lambda items: [*items, items[-1]], r"from unit \d on \d, expected nothing"),
        (lambda items: [], r"from unit 0 on nothing, expected w o r d ▁;"),
        (
            lambda items: [*items[:2], items[2]._replace(start=0.0), *items[3:]],
            r"unit 2 of its alignment, r, ends at 0.050 s, expected 0.100 to .* s; run asr align again",
        ),
        (
            lambda items: [*items[:-1], items[-1]._replace(duration=2.0)],
            r"unit \d of its alignment, \d, ends at 2.\d+ s, expected 0.\d+ to [01].\d+ s",
        ),
        (lambda items: [item._replace(start=item.start - 0.1) for item in items], r"unit 0 .* at -0.050 s"),
        (lambda items: [items[0]._replace(start=float("nan")), *items[1:]], r"unit 0 .* at nan s"),
    ],
)
def test_an_alignment_that_does_not_fit_is_an_error(
    manifest: Manifest,
    tokenizer: Tokenizer,
    change: Callable[[list[AlignmentItem]], list[AlignmentItem]],
    message: str,
    num_workers: int,
) -> None:
    path = manifest(tokenizer)
    spoil(path, change)
    with pytest.raises(ManifestError, match=message):
        epoch(loader(path, tokenizer, num_workers=num_workers))


def test_rounding_is_no_mistake(manifest: Manifest, tokenizer: Tokenizer) -> None:
    path = manifest(tokenizer)
    spoil(path, lambda items: [items[0]._replace(start=0.0502), *items[1:]])
    cut = next(iter(open_cuts(path)))
    assert ends(cut, tokenizer)[:3] == pytest.approx([0.1002, 0.1002, 0.15])


def test_manifests_are_aligned_or_not_but_not_both(
    manifest: Manifest, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    with pytest.raises(
        ManifestError, match=r"other\d+: has no alignment, .*; run asr align on all manifests"
    ):
        epoch(loader([manifest(tokenizer), corpus(DURATIONS, "other")], tokenizer))
