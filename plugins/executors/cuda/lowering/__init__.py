"""From a program to launches of kernels: what is fused, how it is cut, where buffers lie. Nothing here needs a card."""
