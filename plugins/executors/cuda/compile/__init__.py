"""From CUDA C++ to cubin, in parallel and kept on disk. Nothing here needs a card."""
