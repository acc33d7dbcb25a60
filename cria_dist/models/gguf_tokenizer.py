"""A tokenizer as GGUF stores it, from ``tokenizer.json``: byte-level BPE, or BPE over pieces with byte fallback.

llama.cpp does not store how text is cut before BPE; it knows a list of ways by name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from cria_dist.errors import ConfigError
from cria_dist.models import checkpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter

TOKENIZER = "tokenizer.json"
GPT2_CUT, BYTES_ONLY, DIGIT_CUT = "GPT-2's pattern", "bytes", "single digits"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS: Mapping[tuple[str, ...], str] = {
    (GPT2_CUT,): "gpt-2",
    (DIGIT_CUT, GPT2_CUT): "smollm",
    (_WORDS % "{1,3}" + _SPACES, BYTES_ONLY): "llama-bpe",
    (_WORDS % "" + _SPACES, BYTES_ONLY): "qwen2",
}
"""llama.cpp's name for the steps that cut text before byte-level BPE."""
NO_MERGE = "\u0120\u0120\u0120\u0120 <never>"
"""llama.cpp wants merges; a tokenizer of single bytes has none, so it gets one that no text can ask for."""
SPACE = "\u2581"
"""How BPE over pieces writes a space."""


def describe_tokenizer(directory: Path, vocabulary: int, writer: "GGUFWriter") -> None:
    """Add the tokenizer of a checkpoint; one without ``tokenizer.json`` goes out without, for token ids only.

    Args:
        directory: the checkpoint.
        vocabulary: rows of its embedding; ids without a token are marked unused.
        writer: of the GGUF file.

    Raises:
        ConfigError: llama.cpp has no name for this tokenizer.
    """
    described = read_tokenizer(directory)
    if described is None:
        writer.add_tokenizer_model("none")
        return
    import gguf

    model = described["model"]
    pieces = bool(model.get("byte_fallback"))
    special = gguf.SpecialVocab(directory, load_merges=not pieces, n_vocab=vocabulary)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_piece_scores(described, vocabulary))
        writer.add_add_space_prefix(_prepends_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut_name(described.get("pre_tokenizer")))
        special.merges = special.merges or [NO_MERGE]
    tokens, kinds = _tokens(described, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special.add_special_token = _added(checkpoint.load_tokenizer(directory))
    special.add_to_gguf(writer, quiet=True)


def read_tokenizer(directory: Path) -> dict[str, Any] | None:
    """``tokenizer.json`` of a checkpoint; None where there is none.

    Raises:
        ConfigError: llama.cpp has no name for this tokenizer.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return None
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"a tokenizer of type {model.get('type')!r} has no GGUF export; there is one for BPE")
    if not model.get("byte_fallback"):
        cut_name(described.get("pre_tokenizer"))
    return described


def cut_name(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for a pre-tokenizer of byte-level BPE.

    Raises:
        ConfigError: it is none of those known here.
    """
    steps = tuple(_step(part) for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]))
    if steps not in CUTS:
        raise ConfigError(
            f"the tokenizer cuts text by {steps}, for which no llama.cpp name is known; "
            f"there is one for {', '.join(sorted(CUTS.values()))}"
        )
    return CUTS[steps]


def _step(part: Mapping[str, Any] | None) -> str:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2_CUT if part.get("use_regex", True) else BYTES_ONLY
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT_CUT
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
        case _:
            return json.dumps(part)


def _tokens(described: Mapping[str, Any], vocabulary: int) -> tuple[list[bytes], list[int]]:
    """Every id's token, and what kind it is of; an id beyond the embedding is none that the model can read or write.

    Gemma 3 1B has one: its ``<image_soft_token>`` is id 262,144 of a vocabulary of as many.
    """
    import gguf

    added = {one["content"]: one for one in described.get("added_tokens", [])}
    ids = {**described["model"]["vocab"], **{text: one["id"] for text, one in added.items()}}
    tokens = [f"[PAD{number}]".encode() for number in range(vocabulary)]
    kinds = [int(gguf.TokenType.UNUSED)] * vocabulary
    unknown, pieces = described["model"].get("unk_token"), bool(described["model"].get("byte_fallback"))
    for text, number in ids.items():
        if number >= vocabulary:
            continue
        tokens[number] = text.encode()
        kind = gguf.TokenType.NORMAL
        if text == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif text in added:
            kind = gguf.TokenType.CONTROL if added[text]["special"] else gguf.TokenType.USER_DEFINED
        elif pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = gguf.TokenType.BYTE
        kinds[number] = int(kind)
    return tokens, kinds


def _piece_scores(described: Mapping[str, Any], vocabulary: int) -> Sequence[float]:
    """Scores by which llama.cpp merges pieces in the order of the merges: the earlier one, the higher."""
    merges = described["model"]["merges"]
    scores = [float(-len(merges) - 1)] * vocabulary
    ids = described["model"]["vocab"]
    for rank, merge in reversed(list(enumerate(merges))):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (number := ids["".join(pair)]) < vocabulary:
            scores[number] = float(-rank)
    return scores


def _prepends_space(described: Mapping[str, Any]) -> bool:
    """Whether text is read as if a space stood before it."""
    normalizer, cut = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("prepend") == SPACE for step in steps) or cut.get("prepend_scheme") in {"first", "always"}


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last token around a text; asked by letting it."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return {"bos": ids[0] == tokenizer.bos_token_id, "eos": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id}
