"""The pre-tokenizers that `tokenizer.ggml.pre` may name: how text is cut into words before merging.

Names, grouping and flags are those of llama.cpp (src/llama-vocab.cpp). Where llama.cpp documents its expression
as an approximation of the one the model was trained with, or runs it on coarser classes of characters (the families
of tekken, gpt-4o, youtu, tiny_aya, afmoe and kimi-k2), the model's own is used: text is then cut as in training.

Expressions are in Oniguruma syntax. They are applied one after the other, each to the pieces that the one before
left; what an expression matches and what lies between two matches both become pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrs import frozen

from mortice.core.errors import TokenizerError

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "pre_tokenizer"]


@frozen(kw_only=True)
class PreTokenizer:
    """One way to cut text into words.

    Attributes:
        patterns: expressions, applied in order.
        ignore_merges: a word that is itself a token is taken whole, whatever the merges say.
        add_bos: whether BOS is put first when `tokenizer.ggml.add_bos_token` is absent.
        byte_level: tokens are written in GPT-2's byte alphabet; otherwise in UTF-8 with ``▁`` for the space
            and ``<0xNN>`` for bytes.

    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    byte_level: bool = True


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _cased(
    contractions: str, numbers: str, *, upper: str = _UPPER, lower: str = _LOWER, tail: str = r"[\r\n/]*"
) -> str:
    """The o200k shape: words are cut where lower case turns to upper; `contractions` may follow a word."""
    return (
        rf"{_LEAD}{upper}*{lower}+{contractions}|{_LEAD}{upper}+{lower}*{contractions}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{tail}|{_SPACES}"
    )


_GPT4O = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_KIMI = r"[\p{Han}]+|" + _cased(
    f"{_CONTRACTIONS}?",
    r"\p{N}{1,3}",
    upper=_UPPER[:-1] + r"&&[^\p{Han}]]",
    lower=_LOWER[:-1] + r"&&[^\p{Han}]]",
    tail=r"[\r\n]*",
)
# Groups of three counted from the right. Only the first group looks ahead, so a long number takes linear time.
_DIGITS_FROM_THE_RIGHT = r"(?<!\p{N})\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|(?<=\p{N})\p{N}{3}"

# The cased letters that DeepSeek-LLM's expression lists, range by range.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫ"
    "ᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟"
    "𞤀-𞥃"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_MARK_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3_WORD = rf"{_ASCII_MARK_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_JAIS_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))


_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_BAILING = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_JAIS2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|{_JAIS_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}"
_MINICPM5 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_SPARK = rf"{_DEEPSEEK3_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_DEEPSEEK_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CHAMELEON = (
    "<sentinel:[0-9]+>",
    "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    _GPT2,
)


def _family(names: str, *patterns: str, **flags: bool) -> dict[str, PreTokenizer]:
    entry = PreTokenizer(patterns=patterns, **flags)
    return dict.fromkeys(names.split(), entry)


_LLAMA3_NAMES = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
_QWEN2_NAMES = "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"
_GPT2_NAMES = (
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
    "modern-bert exaone4 mpt olmo jais trillion granite-docling"
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    _family(_LLAMA3_NAMES, _LLAMA3, ignore_merges=True, add_bos=True)
    | _family("dbrx smaug-bpe chatglm-bpe", _LLAMA3)
    | _family("glm4 glm5", _LLAMA3, ignore_merges=True)
    | _family("jais-2", _JAIS2)
    | _family(_QWEN2_NAMES, _QWEN2)
    | _family("qwen35", _QWEN35)
    | _family("ufakzeka", _UFAKZEKA)
    | _family("laguna", r"[^\n]+|[\n]+", _QWEN2)
    | _family("minicpm5", r"\p{N}{1,3}", _MINICPM5, ignore_merges=True)
    | _family("seed-coder", _SEED_CODER)
    | _family("bailingmoe bailingmoe2 llada-moe", _BAILING)
    | _family("exaone-moe", _EXAONE_MOE)
    | _family(_GPT2_NAMES, _GPT2)
    | _family("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", r"\p{N}", _GPT2)
    | _family("falcon", r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
    | _family("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
    | _family(
        "deepseek-llm",
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        _DEEPSEEK_MARKS,
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    )
    | _family("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
    | _family("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", r"\p{N}{1,3}", _CJK, _DEEPSEEK3)
    | _family("spark2_5", r"\p{N}{1,3}", _CJK, _SPARK, r"\p{N}")
    | _family("afmoe", _DIGITS_FROM_THE_RIGHT, _AFMOE_SCRIPTS, _DEEPSEEK3)
    | _family("youtu", _YOUTU_SCRIPTS, _cased(f"{_CONTRACTIONS}?", r"\p{N}"), ignore_merges=True)
    | _family("poro-chat bloom gpt3-finnish", _BLOOM)
    | _family("viking", _BLOOM, r"\p{N}")
    | _family("tekken", _cased("", r"\p{N}"), ignore_merges=True, add_bos=True)
    | _family("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O)
    | _family("granite-embed-multi-97m", _GPT4O, ignore_merges=True)
    | _family("tiny_aya cohere2moe", _DIGITS_FROM_THE_RIGHT, _GPT4O)
    | _family("kimi-k2", _KIMI)
    | _family("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))")
    | _family("chameleon", *_CHAMELEON, add_bos=True)
    | _family("gemma4 granite-embed-multi-311m", r"[^\n]+|[\n]+", add_bos=True, byte_level=False)
    | _family("sarvam-moe", r"[^\n]+|[\n]+", byte_level=False)
)
"""Every supported value of `tokenizer.ggml.pre`."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer called `name`.

    Raises:
        TokenizerError: the name is not known; the message lists those that are.

    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(f"tokenizer.ggml.pre: unknown pre-tokenizer {name!r}; known: {known}") from None
