"""The GGUF loader: own parser, memory-mapped, lazy and bounded. See `loader.open_gguf`."""
