"""The generation loop, with a scripted model and a vocabulary of a few byte strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mortice.core.errors import ConfigError, ExecutionError, TokenizerError
from mortice.core.text.generation import GenerationParams, Piece, generate, stream_pieces
from mortice.core.text.sampling import Sampled, SamplingParams

EOS = 0


@define
class Bytes:
    """A vocabulary: token 0 ends the text, the others stand for the bytes given."""

    tokens: list[bytes]
    stop_ids: frozenset[int] = frozenset({EOS})

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + 1


class ByteDetokenizer:
    def __init__(self, vocabulary: Bytes) -> None:
        self._tokens = [b"</s>", *vocabulary.tokens]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokens[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


@define
class Script:
    """A model that wants these tokens one after the other, and notes what it is fed."""

    wants: Sequence[int]
    vocab_size: int
    fed: list[list[int]] = field(factory=list)

    def __call__(self, ids: Sequence[int]) -> NDArray[np.float32]:
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[self.wants[len(self.fed)]] = 5.0
        self.fed.append(list(ids))
        return logits


def run(
    tokens: list[bytes],
    wants: Sequence[int],
    *,
    context_length: int = 1000,
    prompt: Sequence[int] = (1,),
    **options: Any,
) -> tuple[list[Piece], Script]:
    vocabulary = Bytes(tokens)
    script = Script(wants, vocabulary.vocab_size)
    pieces = generate(
        script,
        prompt,
        tokenizer=vocabulary,
        detokenizer=ByteDetokenizer(vocabulary),
        sampling=SamplingParams(),
        generation=GenerationParams(**options),
        context_length=context_length,
    )
    return list(pieces), script


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_the_prompt_is_fed_whole_and_then_each_token_but_the_last() -> None:
    pieces, script = run([b"a", b"b", b"c"], [2, 3, 1], prompt=[1, 2], max_tokens=3)
    assert script.fed == [[1, 2], [2], [3]]
    assert [piece.id for piece in pieces] == [2, 3, 1]
    assert [piece.index for piece in pieces] == [0, 1, 2]
    assert text_of(pieces) == "bca"


def test_max_tokens_ends_with_length() -> None:
    pieces, _ = run([b"a"], [1] * 9, max_tokens=4)
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "length"]
    assert pieces[-1].stop_reason is None


def test_a_full_context_ends_with_length() -> None:
    pieces, script = run([b"a"], [1] * 9, prompt=[1, 1, 1], context_length=5, max_tokens=9)
    assert len(pieces) == 2
    assert pieces[-1].finish_reason == "length"
    assert sum(map(len, script.fed)) <= 5


def test_the_end_token_ends_with_stop_and_adds_no_text() -> None:
    pieces, script = run([b"a"], [1, EOS, 1], max_tokens=9)
    assert text_of(pieces) == "a"
    assert (pieces[-1].id, pieces[-1].finish_reason, pieces[-1].stop_reason) == (EOS, "stop", EOS)
    assert script.fed == [[1], [1]]


def test_the_end_token_is_text_like_any_other_where_it_does_not_stop() -> None:
    pieces, _ = run([b"a"], [1, EOS, 1], max_tokens=3, stop_at_eos=False)
    assert text_of(pieces) == "a</s>a"
    assert pieces[-1].finish_reason == "length"


def test_a_stop_string_across_tokens_is_found_and_not_shown() -> None:
    pieces, script = run([b"hi\nUs", b"er", b": x"], [1, 2, 3, 1], max_tokens=9, stop=["\nUser:"])
    assert [piece.text for piece in pieces] == ["hi", "", ""]
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "\nUser:")
    assert len(script.fed) == 3


def test_text_held_for_a_stop_string_comes_out_when_it_turns_out_otherwise() -> None:
    pieces, _ = run([b"a#", b"#b"], [1, 2], max_tokens=2, stop=("###",))
    assert [piece.text for piece in pieces] == ["a", "##b"]


@pytest.mark.parametrize(("max_tokens", "reason"), [(9, "stop"), (2, "length")])
def test_text_still_held_at_the_end_comes_out_with_the_last_piece(max_tokens: int, reason: str) -> None:
    pieces, _ = run([b"#"], [1, 1, EOS], max_tokens=max_tokens, stop=["####"])
    assert text_of(pieces) == "##"
    assert pieces[-1].text == "##"
    assert pieces[-1].finish_reason == reason


def test_a_stop_string_completed_by_the_last_token_allowed_is_a_stop() -> None:
    pieces, _ = run([b"a#", b"#"], [1, 2], max_tokens=2, stop=["##"])
    assert text_of(pieces) == "a"
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "##")


def test_a_character_of_several_tokens_comes_whole() -> None:
    euro = "€".encode()
    pieces, _ = run([euro[:1], euro[1:2], euro[2:] + b"!"], [1, 2, 3, EOS], max_tokens=9)
    assert [piece.text for piece in pieces] == ["", "", "€!", ""]


def test_half_a_character_at_the_end_is_replaced_and_not_lost() -> None:
    pieces, _ = run([b"a", "€".encode()[:2]], [1, 2], max_tokens=2)
    assert text_of(pieces) == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_whose_character_is_split_between_tokens_is_found() -> None:
    euro = "€".encode()
    pieces, _ = run([b"5 " + euro[:2], euro[2:] + b" each"], [1, 2, 1], max_tokens=9, stop=["€"])
    assert text_of(pieces) == "5 "
    assert pieces[-1].stop_reason == "€"


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=8), st.data())
def test_the_pieces_join_to_the_whole_text_decoded_at_once(tokens: list[bytes], data: st.DataObject) -> None:
    wants = data.draw(st.lists(st.integers(1, len(tokens)), min_size=1, max_size=20))
    pieces, _ = run(tokens, wants, max_tokens=len(wants), stop=["\x00\x00\x00\x00\x00never"])
    assert text_of(pieces) == b"".join(tokens[token - 1] for token in wants).decode("utf-8", "replace")


def test_logprobs_are_listed_as_asked() -> None:
    pieces, _ = run([b"a", b"b", b"c"], [2], max_tokens=1, logprobs=2)
    (piece,) = pieces
    assert [token for token, _ in piece.top_logprobs] == [2, 0]
    assert piece.top_logprobs[0][1] == piece.logprob == pytest.approx(5 - np.log(np.exp(5) + 3))
    pieces, _ = run([b"a"], [1], max_tokens=1)
    assert pieces[0].top_logprobs == ()


def test_the_penalties_see_prompt_and_generated_text() -> None:
    vocabulary = Bytes([b"a", b"b", b"c", b"d"])
    pieces = generate(
        lambda _: np.array([-9.0, 4.0, 3.0, 2.0, 1.0], dtype=np.float32),
        [1],
        tokenizer=vocabulary,
        detokenizer=ByteDetokenizer(vocabulary),
        sampling=SamplingParams(presence_penalty=10.0),
        generation=GenerationParams(max_tokens=3),
        context_length=100,
    )
    assert text_of(list(pieces)) == "bcd"


def test_the_same_seed_gives_the_same_text() -> None:
    vocabulary = Bytes([bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"])

    def text(seed: int) -> str:
        return text_of(
            list(
                generate(
                    lambda _: np.zeros(vocabulary.vocab_size, dtype=np.float32),
                    [1],
                    tokenizer=vocabulary,
                    detokenizer=ByteDetokenizer(vocabulary),
                    sampling=SamplingParams(temperature=1.0, seed=seed),
                    generation=GenerationParams(max_tokens=30, stop_at_eos=False),
                    context_length=100,
                )
            )
        )

    assert text(7) == text(7) != text(8)


def test_nothing_is_fed_before_the_first_piece_is_wanted_nor_after_closing() -> None:
    vocabulary = Bytes([b"a"])
    script = Script([1] * 9, vocabulary.vocab_size)
    pieces = generate(
        script,
        [1, 1],
        tokenizer=vocabulary,
        detokenizer=ByteDetokenizer(vocabulary),
        sampling=SamplingParams(),
        generation=GenerationParams(max_tokens=9),
        context_length=100,
    )
    assert script.fed == []
    next(pieces)
    next(pieces)
    pieces.close()
    assert script.fed == [[1, 1], [1]]
    assert list(pieces) == []


def test_an_executor_may_choose_tokens_itself() -> None:
    vocabulary = Bytes([b"a", b"b"])
    asked: list[tuple[list[int], int]] = []

    def choose(ids: Sequence[int], index: int) -> Sampled:
        asked.append((list(ids), index))
        return Sampled(id=2 if index < 2 else EOS, logprob=-0.5)

    pieces = list(
        stream_pieces(
            choose,
            [1, 1],
            tokenizer=vocabulary,
            detokenizer=ByteDetokenizer(vocabulary),
            generation=GenerationParams(),
            context_length=100,
        )
    )
    assert asked == [([1, 1], 0), ([2], 1), ([2], 2)]
    assert text_of(pieces) == "bb"
    assert pieces[0].logprob == -0.5


def test_a_prompt_that_cannot_be_used_is_refused_before_the_model_runs() -> None:
    with pytest.raises(TokenizerError, match="prompt: found no tokens"):
        run([b"a"], [1], prompt=[])
    with pytest.raises(TokenizerError, match="prompt: token id 2 is outside the vocabulary of 2 tokens"):
        run([b"a"], [1], prompt=[1, 2])
    with pytest.raises(ConfigError, match="prompt: found 4 tokens, wanted fewer than the context's 4"):
        run([b"a"], [1], prompt=[1] * 4, context_length=4)


def test_logits_of_another_vocabulary_stop_the_run() -> None:
    vocabulary = Bytes([b"a"])
    pieces = generate(
        lambda _: np.zeros(99, dtype=np.float32),
        [1],
        tokenizer=vocabulary,
        detokenizer=ByteDetokenizer(vocabulary),
        sampling=SamplingParams(),
        generation=GenerationParams(),
        context_length=100,
    )
    with pytest.raises(ExecutionError, match=r"step 0: logits are float32 \(99,\), wanted float32 \(2,\)"):
        next(pieces)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0, wanted an integer >= 1"),
        ({"max_tokens": True}, "max_tokens: found True"),
        ({"stop": "abc"}, "stop: found 'abc', wanted a list of strings"),
        ({"stop": ["a", ""]}, "stop: found"),
        ({"stop": (1,)}, "stop: found"),
        ({"stop_at_eos": 1}, "stop_at_eos: found 1, wanted true or false"),
        ({"logprobs": -1}, "logprobs: found -1"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationParams(**options)
