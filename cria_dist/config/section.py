"""What every part of a configuration is: frozen, strict, documented."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen and strict about unknown keys; each field's docstring is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
