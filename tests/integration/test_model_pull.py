"""Fetching models from a server that cuts, stalls, changes its mind and lies."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capability_schemas.errors import (
    AccessDenied,
    ConfigurationError,
    Conflict,
    FoamError,
    NotFound,
    Unavailable,
)
from node_agent.models import BrokenModel, ModelStore
from node_agent.models.download import Patience, Progress, Remote, Web
from node_agent.models.pull import Puller
from support.model_server import COMMIT, MODEL, Act, ModelServer, model_server

ROOT = Path(__file__).resolve().parents[2]
DATA = MODEL.read_bytes()
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = DATA[:-1] + b"\x01"
PATH = "/models/Tiny.gguf"


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as made:
        made.files[PATH] = DATA
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ModelStore]:
    with ModelStore(tmp_path / "models") as made:
        yield made


class Pull:
    """A puller without real pauses, and what it reported."""

    def __init__(self, store: ModelStore, server: ModelServer, **given: object) -> None:
        self.store, self.server, self.given = store, server, given
        self.reports: list[Progress] = []
        self.pauses: list[float] = []

    def __call__(self, text: str, *, stall_s: float = 10.0, **options: object):
        web = Web(
            patience=Patience(stall_s=stall_s, tries=4),
            sleep=self.pauses.append,
            rng=random.Random(1),
        )
        with Puller(
            store=self.store,
            web=web,
            hub=self.server.url,
            report=self.reports.append,
            **self.given,  # type: ignore[arg-type]
        ) as puller:
            return puller.pull(text, **options)  # type: ignore[arg-type]


@pytest.fixture
def pull(store: ModelStore, server: ModelServer) -> Pull:
    return Pull(store, server)


def partials(store: ModelStore) -> list[Path]:
    return list(store.partials.iterdir())


def test_a_whole_file_gets_a_name_a_digest_and_its_facts(pull, server, store) -> None:
    got = pull(server.url + PATH)
    assert got.record.name == "tiny"
    assert got.record.digest == DIGEST
    assert got.record.quantisation == "q8_0"
    assert got.path.read_bytes() == DATA
    assert store.resolve("tiny") == store.resolve(DIGEST[:8]) == got.path
    assert store.digest(got.path) == f"sha256:{DIGEST}"
    assert pull.reports[-1] == Progress("checking", len(DATA), len(DATA))
    assert partials(store) == []


def test_pulled_again_it_is_not_sent_again_until_it_changes(pull, server, store) -> None:
    first = pull(server.url + PATH)
    assert pull(server.url + PATH).record == first.record
    assert "if-none-match" in server.sent(PATH)[1]
    server.files[PATH] = OTHER
    assert pull(server.url + PATH).path.read_bytes() == OTHER
    assert not first.path.exists()
    assert len(store.list()) == 1


def test_a_cut_download_goes_on_where_it_stopped(pull, server) -> None:
    server.script.extend([Act(cut_after=1_000_000), Act(cut_after=1_000_001)])
    assert pull(server.url + PATH).path.read_bytes() == DATA
    first, second, third = server.sent(PATH)
    assert "range" not in first
    assert second["range"].startswith("bytes=")
    assert third["range"].startswith("bytes=")
    assert third["if-range"].startswith('"')
    assert len(pull.pauses) == 2


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    acts=st.lists(
        st.one_of(
            st.integers(0, 300_000).map(lambda at: Act(cut_after=at)),
            st.integers(0, 300_000).map(lambda at: Act(cut_after=at, ignore_range=True)),
            st.sampled_from([500, 503, 429]).map(lambda status: Act(status=status)),
            st.just(Act(become=OTHER, cut_after=200_000)),
        ),
        max_size=3,
    ),
    etags=st.booleans(),
)
def test_any_pattern_of_cuts_ends_in_the_same_bytes(tmp_path_factory, acts, etags) -> None:
    with model_server() as server, ModelStore(tmp_path_factory.mktemp("store")) as store:
        server.files[PATH], server.etags = DATA, etags
        server.script.extend(Act(**vars(act)) for act in acts)
        got = Pull(store, server)(server.url + PATH)
        assert got.path.read_bytes() == server.files[PATH]
        assert got.record.digest == hashlib.sha256(server.files[PATH]).hexdigest()


def test_a_server_without_ranges_is_started_over(pull, server) -> None:
    server.script.extend([Act(cut_after=100_000), Act(ignore_range=True)])
    assert pull(server.url + PATH).path.read_bytes() == DATA


def test_a_file_that_changes_between_tries_is_never_mixed(pull, server) -> None:
    server.script.extend([Act(cut_after=2_000_000), Act(become=OTHER)])
    assert pull(server.url + PATH).path.read_bytes() == OTHER


def test_a_change_that_no_validator_tells_is_found_by_the_digest(pull, server) -> None:
    server.etags = False
    server.files[PATH] = b"GGUF" + bytes(len(DATA) - 4)
    server.script.extend([Act(cut_after=2_000_000), Act(become=DATA)])
    assert pull(server.url + PATH, sha256=DIGEST).path.read_bytes() == DATA


def test_a_silent_server_is_left_and_asked_again(pull, server) -> None:
    server.script.append(Act(stall_after=500_000))
    assert pull(server.url + PATH, stall_s=0.3).path.read_bytes() == DATA
    assert any(one.detail == "the server fell silent" for one in pull.reports)


def test_tries_without_progress_end_and_keep_what_came(pull, server, store) -> None:
    server.script.extend([Act(cut_after=300_000)] + [Act(cut_after=0)] * 4)
    with pytest.raises(Unavailable, match="300000 bytes are kept"):
        pull(server.url + PATH)
    assert sorted(path.suffix for path in partials(store)) == [".json", ".partial"]
    with pytest.raises(ConfigurationError, match="no model tiny"):
        store.resolve("tiny")
    assert pull(server.url + PATH).path.read_bytes() == DATA
    assert server.sent(PATH)[-1]["range"] == "bytes=300000-"


def test_retry_after_is_heeded_within_bounds(pull, server) -> None:
    server.script.extend(
        [
            Act(status=429, headers={"Retry-After": "7"}),
            Act(status=503, headers={"Retry-After": "86400"}),
        ]
    )
    pull(server.url + PATH)
    assert pull.pauses == [7.0, 60.0]


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, AccessDenied), (403, AccessDenied), (404, NotFound), (418, ConfigurationError)],
)
def test_a_final_answer_is_not_asked_for_twice(pull, server, store, status, error) -> None:
    server.script.append(Act(status=status))
    with pytest.raises(error, match=str(status)):
        pull(server.url + PATH)
    assert len(server.requests) == 1
    assert partials(store) == []


def test_a_wrong_digest_keeps_nothing(pull, server, store) -> None:
    with pytest.raises(ConfigurationError, match=f"has the digest {DIGEST}, not {'0' * 64}"):
        pull(server.url + PATH, sha256="0" * 64)
    assert partials(store) == []
    assert store.list() == ()


def test_a_digest_that_what_is_stored_does_not_have_is_refused_too(pull, server, store) -> None:
    first = pull(server.url + PATH)
    with pytest.raises(ConfigurationError, match=f"has the digest {DIGEST}, not {'0' * 64}"):
        pull(server.url + PATH, sha256="0" * 64)
    assert [one.record for one in store.list()] == [first.record]
    assert first.path.read_bytes() == DATA


def test_a_length_too_short_gives_a_broken_model_and_is_refused(pull, server, store) -> None:
    server.script.append(Act(claim=1_000_000))
    with pytest.raises(BrokenModel, match=f"cut short: it has 1000000 bytes.*need {len(DATA)}"):
        pull(server.url + PATH)
    assert partials(store) == []


def test_a_page_instead_of_a_model_is_refused(pull, server) -> None:
    server.files[PATH] = b"<!doctype html>"
    with pytest.raises(BrokenModel, match=r"127\.0\.0\.1:\d+/models/Tiny\.gguf: is no GGUF file"):
        pull(server.url + PATH)
    assert pull(server.url + PATH, any_format=True).record.architecture is None


def test_the_hub_finds_a_quantisation_and_vouches_for_it(store, server) -> None:
    server.add_repository(
        "owner/tiny-GGUF",
        {"tiny-Q8_0.gguf": DATA, "tiny-Q4_K_M.gguf": OTHER, "README.md": b"x"},
    )
    place = f"/owner/tiny-GGUF/resolve/{COMMIT}/tiny-Q8_0.gguf"
    with model_server() as cdn:
        cdn.files["/blob"] = DATA
        server.redirect[place] = (f"{cdn.url}/blob?key=1", {"X-Linked-Etag": f'"{DIGEST}"'})
        pull = Pull(store, server, token="hf_secret")
        cdn.script.append(Act(cut_after=200_000))
        got = pull("hf:owner/tiny-GGUF:q8_0")
        assert got.record.digest == DIGEST
        assert server.sent(place)[0]["authorization"] == "Bearer hf_secret"
        assert len(cdn.requests) == 2
        assert all("authorization" not in headers for _, headers in cdn.requests)
        assert cdn.requests[1][1]["range"] == "bytes=200000-"
        assert store.resolve("hf:owner/tiny-GGUF:q8_0") == got.path
        asked = len(cdn.requests)
        assert pull("owner/tiny-GGUF/tiny-Q8_0.gguf", name="again").path == got.path
        assert len(cdn.requests) == asked  # the digest says it is there already
    everything = "".join(
        path.read_text("utf-8", "replace") for path in store.folder.rglob("*.json")
    )
    assert "hf_secret" not in everything
    assert "key=1" not in everything


def test_the_hub_says_what_there_is(pull, server) -> None:
    server.add_repository("owner/tiny", {"a-Q4_0.gguf": DATA, "b-q4_0.gguf": DATA})
    with pytest.raises(NotFound, match=r"no GGUF file of quantisation q5_k_m.*a-Q4_0\.gguf"):
        pull("hf:owner/tiny:Q5_K_M")
    with pytest.raises(ConfigurationError, match="several q4_0 files"):
        pull("hf:owner/tiny:Q4_0")
    with pytest.raises(NotFound, match=r"has no file c\.gguf"):
        pull("owner/tiny/c.gguf")
    with pytest.raises(NotFound, match="404"):
        pull("hf:owner/nothing")


def test_a_redirect_may_not_leave_encryption(pull, server) -> None:
    server.redirect[PATH] = ("http://models.example/x.gguf", {})
    with pytest.raises(ConfigurationError, match="not encrypted"):
        pull(server.url + PATH)


def test_offline_refuses_the_web_but_not_files(store, server, tmp_path) -> None:
    pull = Pull(store, server, offline=True)
    with pytest.raises(ConfigurationError, match="FOAM_OFFLINE"):
        pull(server.url + PATH)
    assert server.requests == []
    assert pull(str(MODEL)).record.digest == DIGEST


def test_a_name_from_elsewhere_is_not_taken(pull, server) -> None:
    pull(server.url + PATH)
    server.files["/other/tiny.gguf"] = OTHER
    with pytest.raises(Conflict, match="--name"):
        pull(server.url + "/other/tiny.gguf")
    assert server.sent("/other/tiny.gguf") == []


def test_a_file_beyond_the_budget_is_refused_before_it_comes(tmp_path, server) -> None:
    with ModelStore(tmp_path / "small", budget_bytes=1_000_000) as store:
        with pytest.raises(ConfigurationError, match=f"needs {len(DATA)} bytes.*1000000"):
            Pull(store, server)(server.url + PATH)
        assert sum(one.stat().st_size for one in store.partials.glob("*.partial")) == 0


# ------------------------------------------------------------------- with real processes


def foam(models: Path, *words: str, **extra: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "FOAM_MODELS": str(models), "PYTHONPATH": str(ROOT), **extra}
    return subprocess.Popen(
        [sys.executable, "-m", "foam", "model", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(check, timeout_s: float = 25.0) -> None:
    end = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.timeout(90)
def test_two_processes_share_one_download(tmp_path: Path, server: ModelServer) -> None:
    server.script.append(Act(stall_after=1_000_000))
    models = tmp_path / "models"
    first = foam(models, "pull", server.url + PATH, "--json")
    until(lambda: len(server.requests) == 1)
    second = foam(models, "pull", server.url + PATH, "--json", "--name", "mine")
    assert second.stdout is not None
    assert json.loads(second.stdout.readline())["state"] == "waiting"
    server.release.set()
    outputs = [first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]]
    assert [first.returncode, second.returncode] == [0, 0]
    names = {json.loads(text.splitlines()[-1])["name"] for text in outputs}
    assert names == {"tiny", "mine"}
    # The stalled answer ends early, so the first process asks once more; the second never asks.
    assert [sent for sent in server.sent(PATH)[1:] if "if-range" not in sent] == []
    assert [path.name for path in (models / "blobs" / "sha256").iterdir()] == [DIGEST]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_never_used_and_goes_on(tmp_path, server, number) -> None:
    server.script.append(Act(stall_after=1_500_000))
    models = tmp_path / "models"
    process = foam(models, "pull", server.url + PATH)

    def there() -> bool:
        return any(p.stat().st_size >= 1_500_000 for p in models.glob("partial/*.partial"))

    until(there)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert ("run the same command again to go on" in said) == (number == signal.SIGINT)
    with ModelStore(models) as store:
        assert store.list() == ()
        got = Pull(store, server)(server.url + PATH)
        assert got.path.read_bytes() == DATA
    if number == signal.SIGINT:
        assert server.sent(PATH)[-1]["range"] == "bytes=1500000-"


@pytest.mark.timeout(90)
def test_a_reader_that_leaves_ends_the_download_and_is_no_full_disk(tmp_path, server) -> None:
    server.script.append(Act(stall_after=1_500_000))
    process = foam(tmp_path / "models", "pull", server.url + PATH, "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["state"] == "downloading"
    process.stdout.close()
    server.release.set()
    assert process.wait(60) == 130
    assert process.stderr is not None
    with process.stderr as told:
        assert "the output cannot be written: Broken pipe" in told.read()


@pytest.mark.timeout(90)
def test_a_full_disk_keeps_what_fits_and_says_so(tmp_path: Path, server: ModelServer) -> None:
    models = tmp_path / "models"
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, -1)); "
        "from foam.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "model", "pull", server.url + PATH],
        env={**os.environ, "FOAM_MODELS": str(models), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 20, done.stderr
    assert "free some disk space" in done.stderr
    with ModelStore(models) as store:
        assert Pull(store, server)(server.url + PATH).path.read_bytes() == DATA
    assert server.sent(PATH)[-1]["range"] == "bytes=1000000-"


@pytest.mark.timeout(120)
def test_the_command_line_from_import_to_removal(tmp_path: Path) -> None:
    models = tmp_path / "models"

    def run(*words: str) -> tuple[int, str, str]:
        process = foam(models, *words)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    assert run("list")[1].startswith("no models yet")
    code, out, _ = run("import", str(MODEL), "--name", "tiny")
    assert code == 0
    assert 'model = "tiny"' in out
    shown = json.loads(run("show", "tiny", "--json")[1])
    assert shown["parameters"] == 2_623_744
    assert shown["metadata"]["tokenizer.ggml.tokens"] == "1024 texts"
    with ModelStore(models) as store:
        store.resolve("tiny")
        assert "in use" in run("list")[1]
        code, _, err = run("remove", "tiny")
        assert code == 21
        assert "in use" in err
    assert run("remove", "tiny")[0] == 0
    assert run("show", "tiny")[0] == 23


def test_errors_of_a_pull_are_the_meshs_own(pull, server) -> None:
    server.script.append(Act(headers={"Content-Encoding": "gzip"}))
    with pytest.raises(FoamError, match="packs the file unasked"):
        pull(server.url + PATH)


@pytest.mark.parametrize(
    ("start", "refused"), [("http://models.example", True), ("http://127.0.0.1", False)]
)
def test_nobody_elsewhere_redirects_to_this_machine(start, refused) -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        if len(asked) == 1:
            return httpx2.Response(302, headers={"location": "http://127.0.0.1:9/secret"})
        return httpx2.Response(200, content=iter([b'{"fine": true}']))

    web = Web(insecure=True)
    web.close()
    web._client = httpx2.Client(transport=httpx2.MockTransport(answer))
    remote = Remote(url=f"{start}/x", shown="x")
    if refused:
        with pytest.raises(ConfigurationError, match="redirected to this machine itself"):
            web.json(remote)
        assert len(asked) == 1
    else:
        assert web.json(remote) == {"fine": True}
    web.close()
