import json
from pathlib import Path

from tools.draw_latency import main


def test_several_reports_make_one_figure(tmp_path: Path) -> None:
    for number, mode in enumerate(("rescore", "chunked")):
        row = {"config": {"mode": mode, "chunk_ms": 320}, "look_ahead_ms": 0, "wer": 10.0 + number}
        rows = [row | {"unaware": {"laal": 800.0}}, row | {"unaware": {"laal": None}}]
        (tmp_path / f"{mode}.json").write_text(json.dumps({"settings": rows}))
    main([str(tmp_path / name) for name in ("rescore.json", "chunked.json", "both.png")])
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
