"""Real-time recognition: a bundle, its streams, and their events. onnxruntime and NumPy, never torch.

stream = open_stream(Bundle.load("bundle"))
for samples in microphone_blocks(device, 16000, block_ms=100):
    for event in stream.accept(samples):
        print(event.text, end="\\n" if event.final else "\\r")
"""

import os

# onnxruntime writes a telemetry id into the home directory when it is imported, unless this is set before
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from asr.runtime.bundle import Bundle
from asr.runtime.endpoint import EndpointConfig
from asr.runtime.events import Event
from asr.runtime.stream import Stream, StreamBatch
from asr.runtime.utterance import StreamConfig
from asr.runtime.whole import WholeStream, WindowStream, open_stream

__all__ = [
    "Bundle",
    "EndpointConfig",
    "Event",
    "Stream",
    "StreamBatch",
    "StreamConfig",
    "WholeStream",
    "WindowStream",
    "open_stream",
]
