"""`asr align`: manifests with the time of every unit of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.context import Context
from asr.errors import ConfigError
from recipes.sets import (
    FINISHED_WITH_FAILURES,
    Progress,
    check_batch_s,
    chunk_frames,
    failure,
    in_order,
    list_failures,
    read_batch,
    set_name,
)

if TYPE_CHECKING:
    import numpy as np
    from lhotse.cut import Cut
    from numpy.typing import NDArray

    from asr.model.align import Span
    from asr.tokens import Tokenizer

Samples = Sequence["NDArray[np.float32]"]


def align(
    exp: Annotated[Path, typer.Argument(help="experiment whose model aligns")],
    manifests: Annotated[list[Path], typer.Argument(help="what to align")],
    out: Annotated[Path, typer.Option("--out", "-o", help="manifest to write (.jsonl.gz)")],
    segments: Annotated[
        bool, typer.Option("--segments", help="refine the CTC alignment by the segmental decoder")
    ] = False,
    chunk_ms: Annotated[int, typer.Option(help="attend in chunks, as in a stream; 0: whole utterances")] = 0,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    batch_s: Annotated[float, typer.Option(help="seconds of audio aligned at once")] = 120.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write the utterances of manifests with the time of each unit of their text, by CTC forced alignment.

    Segmental and chunked attention decoders are trained on such manifests. With --segments, a trained
    segmental decoder then moves the ends of the units to where it finds them likeliest. lhotse reads the
    times as `supervision.alignment["token"]`, in seconds from the start of the supervision. Utterances whose
    audio cannot be used, or is too short for the text, are left out and listed in NAME.failures.jsonl beside
    OUT; then the exit status is 3.

    Example: asr align exp/conformer-s data/manifests/train.jsonl.gz -o data/aligned/train.jsonl.gz
    """
    from asr.data.cuts import save_cuts
    from asr.model.align import Aligner
    from asr.train.checkpoint import load_model
    from asr.train.distributed import device_of

    check_batch_s(batch_s)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"-o {out}: not the name of a manifest; expected one that ends in .jsonl.gz")
    model, tokenizer, config = load_model(exp, checkpoint)
    context = Context(chunk_frames(chunk_ms, model.frame_s))
    aligner = Aligner(model, device_of(device), context, segments)
    work = Work(aligner, tokenizer, config.features.sample_rate)
    count = save_cuts(work.aligned(manifests, batch_s), out)
    failures = out.with_name(f"{set_name(out)}.failures.jsonl")
    list_failures(failures, work.failures, count + len(work.failures), "aligned")
    print(f"{out}: {count:,} utterances, {work.num_units:,} units, {work.mean_score:.3f} nats each")
    if work.failures:
        raise typer.Exit(FINISHED_WITH_FAILURES)


@dataclass
class Work:
    """Aligns waveforms to tokens, and collects the results."""

    aligner: Callable[[Samples, Sequence[Sequence[int]]], list[list[Span] | None]]
    tokenizer: Tokenizer
    sample_rate: int
    num_units: int = 0
    score: float = 0.0
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def mean_score(self) -> float:
        """Mean log-probability of a unit in one of its frames."""
        return self.score / max(1, self.num_units)

    def aligned(self, manifests: Sequence[Path], batch_s: float) -> Iterator[Cut]:
        from asr.data.cuts import count_cuts

        for manifest in manifests:
            progress = Progress("align", set_name(manifest), count_cuts(manifest))
            yield from in_order(manifest, batch_s, self._align_batch, progress)

    def _align_batch(self, batch: Iterable[tuple[int, Cut]]) -> Iterator[tuple[int, Cut]]:
        from asr.data.alignment import with_alignment
        from asr.data.cuts import cut_text

        heard, samples = read_batch(batch, self.sample_rate, self.failures)
        tokens = [self.tokenizer.encode(cut_text(cut)) for _, cut in heard]
        found = self.aligner(samples, tokens) if heard else []
        for (number, cut), row, spans in zip(heard, tokens, found, strict=True):
            if spans is None:
                error = f"{cut.duration:.2f} s is too short for the {len(row)} units of its text"
                self.failures.append(failure(cut, error))
                continue
            self.num_units += len(spans)
            self.score += sum(span.score for span in spans)
            yield number, with_alignment(cut, self.tokenizer, spans)
