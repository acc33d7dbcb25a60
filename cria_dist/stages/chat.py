"""Conversations become text through the tokenizer's chat template, as the model saw them in training."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from cria_dist.errors import ConfigError, DataError
from cria_dist.stages.sources import Where

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
DATE = "26 Jul 2024"
"""What Llama 3's templates are told instead of today's date, so that a corpus gives the same tokens on any day: the
date they name themselves where they cannot ask. A template that asks for the day in another way gives the tokens of
the day on which the run began."""


def conversation_reader(tokenizer: "PreTrainedTokenizerBase") -> Callable[[Any, Where], str | None]:
    """A converter for :func:`cria_dist.stages.sources.read_items` that renders lists of messages.

    A message is ``{"role": ..., "content": ...}`` or, as in ShareGPT, ``{"from": "human", "value": ...}``; other keys
    of a message go to the template. A row that is null or has no message is left out.

    Raises:
        ConfigError: the tokenizer has no chat template, or several and none of them is the default.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f'the tokenizer in {tokenizer.name_or_path!r} has no (default) chat template, which format="chat" needs; '
            'put chat_template.jinja beside it, or give plain text with format="text"'
        ) from error

    def render(value: Any, where: Where) -> str | None:
        if value is None or value == []:
            return None
        if not isinstance(value, list):
            raise ConfigError(f'{where()} holds {type(value).__name__}, not a list of messages; set format="text"')
        messages = [_message(entry, number, where) for number, entry in enumerate(value)]
        try:
            return str(
                tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, date_string=DATE)
            )
        except TemplateError as error:
            raise DataError(
                f"{where()}: the chat template refuses the conversation ({error.message}); correct or delete the row"
            ) from error

    return render


def _message(entry: Any, number: int, where: Where) -> dict[str, Any]:
    if isinstance(entry, dict) and "from" in entry and "role" not in entry:
        entry = {"role": SHAREGPT_ROLES.get(entry["from"], entry["from"]), "content": entry.get("value")}
    for key in ("role", "content"):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise DataError(f"{where()}: message {number} (from 0) has no {key} of text; correct or delete the row")
    return entry
