"""A small byte-level vocabulary with real merges, so that a test model can be given text."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

import numpy as np

from mortice.core.model.types import MetadataValue

__all__ = ["tiny_vocabulary"]

_TEXT = (
    "The mortice is cut first and the tenon is made to fit it. A joint that is tight when it is dry will hold for "
    "as long as the wood does; one that is loose was never a joint. Measure twice, mark with a knife, and cut on "
    "the waste side of the line. The chisel is struck across the grain before it is struck along it, otherwise the "
    "wood splits where nobody wanted it to. When the work is done the parts are put together without glue, to see "
    "whether they meet; only then is the glue taken from the shelf. What was not checked before cannot be mended "
    "after. In 1751 there were 28 trades; by 1851, 1,430 of them. A drawbored peg pulls the shoulder home: its hole "
    "is offset by a sixteenth of an inch, so that every blow of the mallet closes the gap. Haunched, stopped, "
    "wedged or twin, each shape answers a different strain. Oak moves with the seasons and pine hardly at all, "
    "which is why a panel floats in its groove unglued. Question the drawing before you question your hands; "
    "sharpen before you blame either. "
)
_CONTROL, _NORMAL = 3, 1
_SPECIAL = ("<|begin|>", "<|end|>", "<|turn|>")


@functools.cache
def _learned(size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens in order of id, and merges in order of rank, learned from the text above."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return tuple(tokens), tuple(merges)


def tiny_vocabulary(size: int = 512, *, pre: str = "gpt-2", add_bos: bool = False) -> Mapping[str, MetadataValue]:
    """The ``tokenizer.ggml.*`` keys of a byte-level BPE vocabulary: 256 bytes, merges, and three control tokens last.

    The control tokens are BOS, EOS and end-of-turn, in this order. Any text can be encoded.

    Raises:
        ValueError: when `size` is not between 261 and 600.

    """
    if not 261 <= size <= 600:
        raise ValueError(f"size: found {size}, wanted 261 to 600")
    tokens, merges = _learned(size - len(_SPECIAL))
    assert len(tokens) == size - len(_SPECIAL), f"the text gives {len(tokens)} tokens only"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *_SPECIAL],
        "tokenizer.ggml.token_type": np.array([_NORMAL] * len(tokens) + [_CONTROL] * len(_SPECIAL), np.int32),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": size - 3,
        "tokenizer.ggml.eos_token_id": size - 2,
        "tokenizer.ggml.eot_token_id": size - 1,
        "tokenizer.ggml.add_bos_token": add_bos,
    }
