"""Speech to text with hybrid CTC/attention encoder-decoders. `import asr` imports nothing heavy."""

__version__ = "0.1.0"
