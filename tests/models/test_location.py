"""What is said of a model that cannot be reached."""

import pytest
from huggingface_hub import constants

from cria_dist.errors import ConfigError
from cria_dist.models import location


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_that_cannot_be_reached_can_be_downloaded_first(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        ConfigError, match=r"\(no network\); .*check the name, or download it first \(hf download.*token.*give the dir"
    ) as refusal:
        location.locate("org/model", None)
    assert ("HF_HUB_OFFLINE=1 forbids downloads: unset it" in str(refusal.value)) == offline
