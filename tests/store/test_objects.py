"""The object store: whole objects or none, whatever the server does; one clear line when it cannot be used."""

import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cria_dist.errors import ConfigError, DataError
from cria_dist.pool import LocalPool
from cria_dist.store import objects, places
from cria_dist.store.objects import ObjectStorage
from cria_dist.store.storage import LocalStorage

BIG = np.random.default_rng(0).bytes(11 << 20)
"""More than a part of 10 MiB: Arrow uploads it in two."""


def storage_of(s3: Any) -> ObjectStorage:
    return ObjectStorage(s3.url(f"runs/{uuid.uuid4().hex}"), "rec")


@pytest.mark.parametrize("content", [b"", b"few bytes", BIG, memoryview(b"a view")])
def test_round_trip(content: bytes, s3: Any) -> None:
    storage = storage_of(s3)
    storage.write("a/b/object", content)
    assert storage.read("a/b/object") == bytes(content)
    assert storage.sizes("") == storage.sizes("a") == {"a/b/object": len(content)}
    assert storage.sizes("a/c") == {}
    storage.write("a/b/object", b"replaced")
    assert pickle.loads(pickle.dumps(storage)).read("a/b/object") == b"replaced"
    storage.delete("a/b/object")
    storage.delete("a/b/object")
    assert storage.sizes("") == {}


def test_the_environment_names_the_server(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    storage = ObjectStorage(f"s3://bucket/{uuid.uuid4().hex}/")
    storage.write("one", b"1")
    assert storage.read("one") == b"1"
    assert s3.requests


def test_a_small_object_is_one_request(s3: Any) -> None:
    storage_of(s3).write("commits/a.json", b"{}")
    assert [method for method, _ in s3.requests] == ["PUT"]


def test_what_is_missing_is_named(s3: Any) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/runs/\w+/rec/gone cannot be read .*run the same command again"):
        storage_of(s3).read("gone")


@pytest.mark.parametrize("status", [500, 503])
def test_passing_errors_are_tried_again(status: int, s3: Any) -> None:
    s3.fault = lambda method, _path, number: status if method == "PUT" and number <= 2 else None
    storage = storage_of(s3)
    storage.write("a", b"content")
    assert storage.read("a") == b"content"
    assert [method for method, _ in s3.requests].count("PUT") == 3


@pytest.mark.parametrize("status", [500, 503, 403])
def test_lasting_errors_end_and_nothing_is_visible(status: int, s3: Any) -> None:
    s3.fault = lambda method, _path, _number: status if method == "PUT" else None
    storage = storage_of(s3)
    with pytest.raises(DataError, match=r"rec/a cannot be written .*run the same command again"):
        storage.write("a", b"content")
    assert [method for method, _ in s3.requests].count("PUT") == (1 if status == 403 else objects.ATTEMPTS)
    assert storage.sizes("") == {}


@pytest.mark.parametrize("status", [0, 500])
@pytest.mark.parametrize("part", [1, 2])
def test_an_upload_that_breaks_in_a_part_publishes_nothing(part: int, status: int, s3: Any) -> None:
    """0: the connection ends in the middle of the bytes."""
    s3.fault = lambda _method, path, _number: status if f"partNumber={part}" in path else None
    storage = storage_of(s3)
    with pytest.raises(DataError, match="cannot be written"):
        storage.write("big", BIG)
    assert storage.sizes("") == {}
    s3.fault = lambda *_: None
    storage.write("big", BIG)
    assert storage.read("big") == BIG


def test_an_error_in_this_process_after_the_stream_is_open_leaves_nothing(s3: Any) -> None:
    """Arrow would publish an empty object."""
    storage = storage_of(s3)
    with pytest.raises(TypeError):
        storage.write("a", "not bytes")  # pyright: ignore[reportArgumentType]  (the point)
    assert "PUT" in [method for method, _ in s3.requests]
    assert storage.sizes("") == {}


def test_a_store_that_works_passes_the_check_and_keeps_no_object(s3: Any) -> None:
    places.check(s3.url("fresh"))
    places.check(None)
    assert ObjectStorage(s3.url("fresh")).sizes("") == {}


def test_a_bucket_that_is_not_there(s3: Any) -> None:
    with pytest.raises(ConfigError, match=r"record.storage='s3://nowhere/p' is not usable: .*NO_SUCH_BUCKET.*create"):
        places.check(s3.url("p").replace("bucket", "nowhere"))


def test_credentials_that_are_not_there(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3.fault = lambda *_: 403
    with pytest.raises(ConfigError, match=r"is not usable: .*ACCESS_DENIED.*set AWS_ACCESS_KEY_ID"):
        places.check(s3.url("no-credentials"))


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ConfigError, match=r"is not usable: .*Could not connect"):
        places.check("s3://bucket/p?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://MYSELF:hush@bucket/p", "credentials in it; leave them out"),
        ("s3://MYSELF:hu/sh@bucket/p?region=x", "credentials in it; leave them out"),
        ("s3://bucket/p?secret_key=hush", "unknown setting 'secret_key'; known: endpoint_override, region, scheme"),
        ("gs://bucket/p", "not an object store; give s3://bucket/prefix"),
        ("/some/folder", "'/some/folder' is not an object store"),
        ("s3://", "not an object store"),
    ],
)
def test_other_locations_are_refused_without_showing_secrets(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        places.check(url)
    assert "hush" not in str(caught.value)
    assert "MYSELF" not in str(caught.value)


def test_messages_leave_the_settings_out() -> None:
    storage = ObjectStorage("s3://bucket/p/?endpoint_override=host:1&region=x", "rec")
    assert storage.where("commits/a.json") == "s3://bucket/p/rec/commits/a.json"


def test_a_recording_in_a_bucket_equals_the_local_one(s3: Any, toy: Any, tmp_path: Path) -> None:
    url = s3.url(uuid.uuid4().hex)
    for round_folder in (tmp_path / "run-a" / "round-00", tmp_path / "run-b" / "round-00"):
        there = places.open_recording(round_folder, url, "d1")
        toy.record(there.storage)
        local = toy.record(LocalStorage(tmp_path / "local"))
        assert there.storage.read("manifest.json") == local.storage.read("manifest.json")
        assert there.storage.where("x").endswith("/recording-d1/x")
        assert places.recorded(round_folder) == there
        for name, signal_NM in local.signals(toy.sites[1]).items():
            assert np.array_equal(there.signals(toy.sites[1])[name], signal_NM)
        assert np.array_equal(there.moments(toy.sites[0]).gram_NN, local.moments(toy.sites[0]).gram_NN)
    uploads = [path for method, path in s3.requests if method == "PUT" and "activations" in path]
    assert len(uploads) == len(toy.sites) * toy.shards  # the second run took it over


def test_a_folder_of_its_own_again_forgets_the_bucket(s3: Any, toy: Any, tmp_path: Path) -> None:
    places.open_recording(tmp_path, s3.url("x"), "d1")
    toy.record(places.open_recording(tmp_path, None, "d2").storage, "d2")
    assert places.recorded(tmp_path).storage == LocalStorage(tmp_path)


@pytest.mark.parametrize("every", [2, 3])
def test_a_store_that_fails_often_slows_a_recording_and_changes_nothing(
    every: int, s3: Any, toy: Any, tmp_path: Path
) -> None:
    s3.fault = lambda method, _path, number: 500 if method == "PUT" and number % every == 0 else None
    there = toy.record(storage_of(s3))
    assert there.storage.read("manifest.json") == toy.record(LocalStorage(tmp_path)).storage.read("manifest.json")


@pytest.mark.parametrize("after", [1, 4, 11])
def test_a_store_that_goes_away_in_the_middle(after: int, s3: Any, toy: Any, tmp_path: Path) -> None:
    s3.fault = lambda method, _path, number: 503 if method == "PUT" and number > after else None
    storage = storage_of(s3)
    with pytest.raises(DataError, match="cannot be written"):
        toy.record(storage)
    s3.fault = lambda *_: None
    there = toy.record(storage)
    assert there.storage.read("manifest.json") == toy.record(LocalStorage(tmp_path)).storage.read("manifest.json")


def test_a_run_records_into_a_bucket_and_another_takes_it_over(
    s3: Any, tmp_path: Path, run_config: Any, make_context: Any
) -> None:
    from cria_dist.pipeline import rounds, shrink

    url = s3.url(uuid.uuid4().hex)
    plans = []
    for name, storage, ratio in (("here", None, 0.25), ("there", url, 0.25), ("again", url, 0.5)):
        context = make_context(
            run_config(tmp_path, name=name, record={"storage": storage}, prune={"ratio": ratio}, recover={"steps": 0})
        )
        before = len(s3.requests)
        assert shrink(context, until="apply") is not None
        folder = rounds.round_folder(context, 0)
        plans.append((folder / "plan.json").read_bytes())
        stored = [path for method, path in s3.requests[before:] if method == "PUT" and path.count("shard-")]
        assert bool(stored) == (name == "there")
        assert (folder / "activations").exists() == (name == "here")
        assert os.fsencode(url) not in (context.job.folder / "config.json").read_bytes()
    assert plans[0] == plans[1] != plans[2]


class Meanwhile(LocalPool):
    """After some items, before the next of them, something else happens."""

    def __init__(self, items: int, happens: Callable[[], object]) -> None:
        self._items, self._happens = items, happens

    def map(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, done in enumerate(super().map(*args, **kwargs), 1):
            yield done
            if number == self._items:
                self._happens()


class Interrupted(Exception):
    """A run was."""


def interrupt() -> None:
    raise Interrupted


@pytest.fixture
def in_halves(run_config: Any, pico: Path) -> Callable[..., Any]:
    """Runs on the pico model, recorded in two blocks of a layer each with hidden states in between."""
    from cria_dist.models import checkpoint
    from cria_dist.models.blocks import Block
    from cria_dist.stages.footprint import Workload

    def make(folder: Path, **record: Any) -> Any:
        config = run_config(folder, record={"schedule": "sweep", **record}, recover={"steps": 0})
        work = Workload(config, checkpoint.read_config(pico))
        most = max(work.footprint(Block(layer, layer + 1, 2)).total for layer in range(2))
        return run_config(folder, record={"schedule": "sweep", "memory_gb": 1.01e-9 * most, **record})

    return make


@pytest.mark.parametrize("after", [2, 4])
def test_runs_that_share_a_recording_keep_what_they_pass_on_apart(
    after: int, s3: Any, in_halves: Any, make_context: Any, tmp_path: Path
) -> None:
    """Both record 3 shards in 2 blocks at the same time: the second begins and ends between two items of the first."""
    from cria_dist.pipeline import prune

    url = s3.url(uuid.uuid4().hex)

    def record(name: str, **options: Any) -> Path:
        storage = None if name == "alone" else url
        context = make_context(in_halves(tmp_path / name, storage=storage), until="record", **options)
        prune(context, until="record")
        return context.job.folder / "round-00"

    alone = record("alone")
    first = record("first", pool=Meanwhile(after, lambda: record("second")))
    there = places.recorded(first)
    assert there.storage.read("manifest.json") == (alone / "manifest.json").read_bytes()
    assert there.is_complete()
    assert there.storage.sizes("boundaries") == {}
    assert not list((alone / "boundaries").rglob("*.safetensors"))


def test_an_interrupted_run_finds_what_it_passed_on(s3: Any, in_halves: Any, make_context: Any, tmp_path: Path) -> None:
    """Three shards are through the first block and one through the second: two items are left."""
    from cria_dist.pipeline import prune

    config = in_halves(tmp_path, storage=s3.url(uuid.uuid4().hex))
    with pytest.raises(Interrupted):
        prune(make_context(config, until="record", pool=Meanwhile(4, interrupt)), until="record")
    counted: list[int] = []
    prune(make_context(config, until="record", pool=Meanwhile(2, lambda: counted.append(2))), until="record")
    assert counted == [2]
    before = len(s3.requests)
    prune(make_context(config, until="record", pool=Meanwhile(1, interrupt)), until="record")
    assert not [path for method, path in s3.requests[before:] if method == "PUT" and "shard-" in path]


def test_a_run_that_another_one_finished_for_takes_its_own_away(
    s3: Any, in_halves: Any, make_context: Any, tmp_path: Path
) -> None:
    from cria_dist.pipeline import prune

    url = s3.url(uuid.uuid4().hex)
    config = in_halves(tmp_path / "one", storage=url)
    with pytest.raises(Interrupted):
        prune(make_context(config, until="record", pool=Meanwhile(4, interrupt)), until="record")
    other = make_context(in_halves(tmp_path / "two", storage=url), until="record")
    prune(other, until="record")
    storage = places.recorded(other.job.folder / "round-00").storage
    assert len(storage.sizes("boundaries")) == 3 - 1  # of the interrupted run
    prune(make_context(config, until="record"), until="record")
    assert storage.sizes("boundaries") == {}
