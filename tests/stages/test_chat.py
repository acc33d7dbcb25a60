"""Conversations: what the model's template makes of them, and which rows are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cria_dist.config import CorpusConfig, DataConfig, RunConfig
from cria_dist.errors import ConfigError, CriaError, DataError
from cria_dist.stages.chat import conversation_reader
from cria_dist.stages.corpus import load_tokens
from cria_dist.stages.prepare import prepare
from cria_dist.stages.sources import plain_text, read_items

TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + message.role) }}{% endif -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}"""
HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
HELLO_TEXT = "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for each special word; asked for special tokens it would put ``<s>`` first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*alphabet, *SPECIAL])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    extra = list(SPECIAL[1:])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", additional_special_tokens=extra)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> list[str]:
    corpus = CorpusConfig(source=str(path), format="chat", **{"field": "messages", **settings})
    return list(read_items(corpus, conversation_reader(tokenizer)))


def test_the_template_renders_each_kind_of_source_alike(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"messages": HELLO, "id": 0}, {"messages": None, "id": 1}, {"messages": [], "id": 2}]
    jsonl = write_jsonl(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    shutil.copyfile(tmp_path / "rows.parquet", tmp_path / "folder" / "train.parquet")
    for source in (jsonl, tmp_path / "rows.parquet", tmp_path / "folder"):
        assert conversations(source, tokenizer) == [HELLO_TEXT]


def test_sharegpt_conversations_are_the_same_conversations(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi there"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": turns}])
    assert conversations(path, tokenizer, field="conversations") == [HELLO_TEXT]
    system = write_jsonl(tmp_path / "system.jsonl", [{"conversations": [{"from": "system", "value": "be brief"}]}])
    assert "<|im_start|>system\nbe brief<|im_end|>" in conversations(system, tokenizer, field="conversations")[0]


def test_null_keys_of_a_parquet_struct_do_not_reach_the_template(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rows of unlike messages share one struct; a template that asks whether a key is defined must not see nulls."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "b", "x": "c"}]},
    ]
    parquet.write_table(pa.Table.from_pylist([rows[1], rows[0]]), tmp_path / "rows.parquet")
    copy = with_template(tokenizer, "{% for m in messages %}{{ 'x' if m.x is defined else '-' }}{% endfor %}")
    assert conversations(tmp_path / "rows.parquet", copy) == ["x", "-"]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    copy.chat_template = template
    return copy


def test_tokens_are_those_of_the_template_without_a_second_start_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = [HELLO, [{"role": "user", "content": "one two three"}]]
    second = [[{"role": "user", "content": f"quite another talk, number {number}"}] for number in range(3)]
    calibration = write_jsonl(tmp_path / "first.jsonl", [{"messages": talk} for talk in first])
    test = write_jsonl(tmp_path / "second.jsonl", [{"messages": talk} for talk in second])
    expected = [token for talk in first for token in tokenizer.apply_chat_template(talk)["input_ids"]]
    chat = {"format": "chat", "field": "messages"}
    data = DataConfig(
        calibration=CorpusConfig(source=str(calibration), **chat),
        test=CorpusConfig(source=str(test), **chat),
        sequence_length=8,
        calibration_sequences=len(expected) // 8,
        test_sequences=2,
    )
    calibration_ST, _ = load_tokens(data, tokenizer)
    assert calibration_ST.ravel().tolist() == expected[: calibration_ST.size]
    starts = np.flatnonzero(calibration_ST == tokenizer.bos_token_id)
    assert starts.size == 2, "one start token per conversation, and no blank line between them"


def test_the_day_does_not_change_the_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": HELLO}])
    llama = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated = with_template(tokenizer, llama + "today is {{ date_string }}")
    assert conversations(path, dated) == ["today is 26 Jul 2024"]


@pytest.mark.parametrize(
    ("value", "error", "complaint"),
    [
        ([{"content": "x"}], DataError, r"line 2: message 0 \(from 0\) has no role of text; correct or delete"),
        ([HELLO[0], {"role": "user"}], DataError, r"line 2: message 1 \(from 0\) has no content of text"),
        ([{"role": "user", "content": ["x"]}], DataError, r"line 2: message 0 .*has no content of text"),
        ([{"from": "human"}], DataError, r"line 2: message 0 .*has no content of text"),
        (["hello"], DataError, r"line 2: message 0 .*has no role of text"),
        ([{"role": "judge", "content": "x"}], DataError, r"line 2: the chat template refuses .*\(no role judge\)"),
        ("hello", ConfigError, r'line 2 holds str, not a list of messages; set format="text"'),
        ({"role": "user", "content": "x"}, ConfigError, r"line 2 holds dict, not a list of messages"),
    ],
)
def test_a_refused_row_is_named(
    value: object, error: type[CriaError], complaint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": HELLO}, {"messages": value}])
    with pytest.raises(error, match=complaint) as refusal:
        conversations(path, tokenizer)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_rows_of_a_data_set_are_numbered_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"messages": HELLO}] * 70 + [{"messages": [{"role": "judge", "content": "x"}]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=40)
    for source in (tmp_path / "train.parquet", tmp_path):
        with pytest.raises(DataError, match=r"row 70 \(from 0\): the chat template refuses"):
            conversations(source, tokenizer)


def test_messages_read_as_text_say_which_format_to_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": HELLO}])
    with pytest.raises(ConfigError, match=r'holds list, not text; .*set format="chat"'):
        list(read_items(CorpusConfig(source=str(path), field="messages"), plain_text))


@pytest.mark.parametrize("source", ["builtin:pydoc", "talk.txt"])
def test_plain_text_has_no_messages(source: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "talk.txt").write_text("hello")
    source = source if source.startswith("builtin") else str(tmp_path / source)
    corpus = CorpusConfig(source=source, format="chat")
    with pytest.raises(ConfigError, match=r'is plain text without messages; set format="text"'):
        read_items(corpus, conversation_reader(tokenizer))


def test_several_templates_without_a_default_are_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    several = with_template(tokenizer, "x")
    several.chat_template = {"tools": "a", "rag": "b"}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"no \(default\) chat template"):
        conversation_reader(several)


def talks(path: Path, subject: str) -> dict[str, str]:
    rows = [
        {"messages": [{"role": "user", "content": f"what of {subject} {number * 7919}?"}, HELLO[1]]}
        for number in range(40)
    ]
    return {"source": str(write_jsonl(path, rows)), "format": "chat", "field": "messages", "part": "all"}


def test_no_chat_template_is_said_before_anything_is_read(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    chat = talks(tmp_path / "rows.jsonl", "cats")
    with pytest.raises(
        ConfigError, match=r'has no \(default\) chat template, which format="chat" needs; put chat_template\.jinja'
    ):
        prepare(run_config(tmp_path, data={"calibration": chat}))


def test_a_run_on_conversations_is_recorded(
    run_config: Callable[..., RunConfig], make_context: Callable[..., Any], pico: Path, tmp_path: Path
) -> None:
    from cria_dist.pipeline import prune

    model = shutil.copytree(pico, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    config = run_config(
        tmp_path, model={"path": str(model)}, data={"calibration": talks(tmp_path / "rows.jsonl", "cats")}
    )
    context = make_context(config)
    prune(context, "python -m pytest", until="record")
    text = AutoTokenizer.from_pretrained(model).decode(np.load(context.job.calibration_path).ravel())
    talk = "<s><|im_start|>user\nwhat of cats 0?<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n"
    assert text.startswith(talk + "<s><|im_start|>user\nwhat of cats 7919?")
    assert list(context.job.folder.glob("round-00/**/manifest.json"))
