"""`hf-gg push` and its parts, by the real client, to a hub on loopback that may break connections."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import HfApi, ModelCard, constants
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gg import GGConfig, quantize_
from hf_gg.cli import main
from hf_gg.integrations.cards import fingerprint, may_replace
from hf_gg.integrations.publishing import facts_of, publish


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HAND = "---\nlicense: mit\ntags:\n- mine\n---\n# My model\n\nWritten with care.\n"


def make(folder: Path, config: GGConfig | None = None, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    quantize_(LlamaForCausalLM(LlamaConfig(**SIZES)), config).save_pretrained(folder, **options)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and this process as one whose client is switched on and has a cache of its own."""
    with Hub() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield found


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_test")


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "rf8", max_shard_size="20KB")


def test_private_repository(hub, api, folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").touch()
    done = publish(folder, "tiny", facts_of(folder), private=True, api=api)
    files = hub.files["user/tiny"]
    weights = [file.name for file in folder.glob("*.safetensors")]
    assert len(weights) > 1 and set(files) == {
        *weights,
        "config.json",
        "generation_config.json",
        "README.md",
        "model.safetensors.index.json",
    }
    assert all(files[name] == (folder / name).read_bytes() for name in weights)
    assert hub.private == {"user/tiny"} and hub.commits == [("user/tiny", "main")]
    assert done.repository == "user/tiny" and sorted(files) == done.files and done.pull_request is None
    assert done.bytes == sum(map(len, files.values()))
    assert not (folder / "README.md").exists(), "the folder was changed"
    # the same again: nothing new, no second commit
    publish(folder, "tiny", facts_of(folder), private=True, api=api)
    assert hub.commits == [("user/tiny", "main")]


def test_a_repository_that_is_public_is_not_taken_for_private(hub, api, folder):
    publish(folder, "tiny", facts_of(folder), api=api)
    with pytest.raises(ValueError, match="user/tiny is there and public"):
        publish(folder, "tiny", facts_of(folder), private=True, api=api)


def test_branch_and_pull_request(hub, api, folder, tmp_path):
    publish(folder, "tiny", facts_of(folder), api=api)
    before = dict(hub.files["user/tiny"])
    other = make(tmp_path / "rf8x", GGConfig("rf8x"), seed=1)
    done = publish(other, "tiny", facts_of(other), revision="better", api=api)
    assert hub.commits[-1] == ("user/tiny", "better") and hub.files["user/tiny"] == before
    # one file now, so the shards of the branch's beginning are gone in the same commit
    branch = hub.branches["user/tiny", "better"]
    assert "model.safetensors" in branch and not any("-of-" in name or "index" in name for name in branch)
    assert len(done.deleted) == sum("-of-" in name or "index" in name for name in before)
    done = publish(other, "tiny", facts_of(other), create_pr=True, api=api)
    assert done.pull_request.endswith("/discussions/1") and hub.files["user/tiny"] == before
    assert "rf8x" in hub.branches["user/tiny", "refs/pr/1"]["README.md"].decode()


@pytest.mark.parametrize("trouble", ["cut", "lose", 503])
def test_a_large_file_cut_half_way(hub, api, folder, trouble):
    hub.troubles = [("PUT", "/lfs/", trouble)]
    publish(folder, "tiny", facts_of(folder), api=api, wait=0.01)
    assert not hub.troubles and hub.commits == [("user/tiny", "main")]
    for file in folder.glob("*.safetensors"):
        assert hub.files["user/tiny"][file.name] == file.read_bytes()


@pytest.mark.parametrize("trouble", ["cut", "lose", 502])
def test_a_commit_cut_half_way_is_made_once(hub, api, folder, trouble):
    hub.troubles = [("POST", "/api/models/user/tiny/commit/", trouble)]
    told: list[str] = []
    publish(folder, "tiny", facts_of(folder), api=api, wait=0.01, tell=told.append)
    assert hub.commits == [("user/tiny", "main")] and len(told) == 1 and "try 2 of 4" in told[0]


def test_a_hub_that_goes_away_leaves_the_old_files_and_the_next_push_goes_on(hub, api, folder, tmp_path):
    publish(folder, "tiny", facts_of(folder), api=api)
    before = dict(hub.files["user/tiny"])
    other = make(tmp_path / "other", seed=1)
    hub.troubles = [("POST", "/api/models/user/tiny/commit/", "cut")] * 4
    with pytest.raises(OSError, match="cannot be reached.*The old files are there, or all of the new ones"):
        publish(other, "tiny", facts_of(other), api=api, wait=0.01)
    assert hub.files["user/tiny"] == before and len(hub.commits) == 1
    hub.requests.clear()
    publish(other, "tiny", facts_of(other), api=api)
    assert not any(path.startswith("/lfs/") for _, path in hub.requests), "uploaded twice"
    assert hub.files["user/tiny"]["model.safetensors"] == (other / "model.safetensors").read_bytes()


def test_a_pull_request_is_not_opened_twice(hub, api, folder):
    publish(folder, "tiny", facts_of(folder), api=api)
    other = make(folder.parent / "other", seed=1)
    hub.troubles = [("POST", "/api/models/user/tiny/commit/", "lose")]
    with pytest.raises(OSError, match="perhaps a pull request"):
        publish(other, "tiny", facts_of(other), create_pr=True, api=api, wait=0.01)
    assert [branch for _, branch in hub.branches] == ["refs/pr/1"]


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_a_card_written_by_hand_is_not_lost(hub, api, folder, where):
    hub.files["user/tiny"] = {"README.md": HAND.encode()} if where == "hub" else {}
    if where == "folder":
        (folder / "README.md").write_text(HAND)
    with pytest.raises(ValueError, match="by hand, and would be lost: --overwrite-card"):
        publish(folder, "tiny", facts_of(folder), api=api)
    assert not hub.commits and not hub.blobs
    publish(folder, "tiny", facts_of(folder), overwrite_card=True, api=api)
    assert may_replace(hub.files["user/tiny"]["README.md"].decode())


def test_a_card_that_cannot_be_read_is_not_taken_for_none(hub, api, folder, monkeypatch):
    hub.files["user/tiny"] = {"README.md": HAND.encode()}
    hub.troubles = [("HEAD", "/user/tiny/resolve/", 404), ("GET", "/user/tiny/resolve/", 404)]
    with pytest.raises(OSError, match="cannot be reached|refused by the hub"):
        publish(folder, "tiny", facts_of(folder), api=api)
    assert hub.files["user/tiny"] == {"README.md": HAND.encode()} and not hub.blobs


def test_a_card_of_ours_is_replaced_unless_it_was_edited(hub, api, folder):
    publish(folder, "tiny", facts_of(folder, base="user/base", license="mit"), api=api)
    files = hub.files["user/tiny"]
    tagged = ModelCard(files["README.md"].decode())
    tagged.data.tags.append("mine")
    tagged.data.datasets = ["some/data"]
    files["README.md"] = str(tagged).replace("\n", "\r\n").encode()  # metadata changed on the site
    publish(
        folder, "tiny", facts_of(folder, base="user/base", license="mit", commands=["hf-gg compress a b"]), api=api
    )
    card = ModelCard(files["README.md"].decode())
    assert {"mine", "rf8"} <= set(card.data.tags) and card.data.datasets == ["some/data"]
    assert "hf-gg compress a b" in card.text
    files["README.md"] = files["README.md"].replace(b"## Limits", b"## My limits")
    with pytest.raises(ValueError, match="edited by hand"):
        publish(folder, "tiny", facts_of(folder), api=api)


@pytest.mark.parametrize("when", ["POST /user/tiny.git", "lost"])
def test_a_card_written_while_files_are_uploaded_is_not_lost(hub, api, folder, monkeypatch, when):
    """On the site, after the card was looked at; and between two tries of a commit whose connection broke."""
    publish(folder, "tiny", facts_of(folder), api=api)
    other = make(folder.parent / "other", seed=1)
    trouble, changed = hub.trouble, []

    def written(method, path):
        wanted = "POST /api/models/user/tiny/commit/" if when == "lost" else when
        if not changed and f"{method} {path}".startswith(wanted):
            hub.files["user/tiny"]["README.md"] = HAND.encode()
            changed.append(path)
            return "cut" if when == "lost" else None
        return trouble(method, path)

    monkeypatch.setattr(hub, "trouble", written)
    with pytest.raises((OSError, ValueError), match="somebody else has changed it meanwhile: push again|by hand, and"):
        publish(other, "tiny", facts_of(other), api=api, wait=0.01)
    assert changed and hub.files["user/tiny"]["README.md"] == HAND.encode() and len(hub.commits) == 1


def test_metadata_that_the_hub_does_not_take_is_refused_before_files_are_sent(hub, api, folder):
    hub.bad_words = ["my-own"]
    with pytest.raises(ValueError, match=r'does not take the card.s metadata \("my-own" must be one of.*--license'):
        publish(folder, "tiny", facts_of(folder, license="my-own"), api=api)
    assert not hub.commits and not hub.blobs and not hub.files


def test_what_an_earlier_push_said_of_itself_goes_and_what_others_said_stays(hub, api, folder, tmp_path):
    publish(folder, "tiny", facts_of(folder, base="user/base", license="mit"), api=api)
    files = hub.files["user/tiny"]
    tagged = ModelCard(files["README.md"].decode())
    tagged.data.tags.append("mine")
    files["README.md"] = str(tagged).encode()
    other = make(tmp_path / "other", GGConfig("rf8x"))
    (other / "README.md").write_text("---\ntags:\n- local\nlanguage: en\n---\n")
    publish(other, "tiny", facts_of(other), api=api)
    data = ModelCard(files["README.md"].decode()).data
    assert set(data.tags) == {"hf_gg", "rf8x", "mine", "local"} and data.language == "en"
    assert data.base_model is None and data.license is None and "base_model_relation" not in data.to_dict()


@pytest.mark.parametrize(
    "front", ["a: [", "- a", "1: x", "tags: [[a]]", "tags: 5", "ignore_metadata_errors: 1", "&a *b"]
)
def test_a_card_whose_metadata_cannot_be_read_stays(hub, api, folder, front):
    hub.files["user/tiny"] = {"README.md": f"---\n{front}\n---\n".encode()}
    with pytest.raises(ValueError, match="by hand, and would be lost"):
        publish(folder, "tiny", facts_of(folder), api=api)
    assert not hub.blobs
    publish(folder, "tiny", facts_of(folder), overwrite_card=True, api=api)
    assert "hf_gg" in ModelCard(hub.files["user/tiny"]["README.md"].decode()).data.tags


def test_a_card_that_is_no_utf8_is_one_of_somebody(hub, api, folder):
    hub.files["user/tiny"] = {"README.md": "caf\xe9".encode("latin-1")}
    with pytest.raises(ValueError, match="by hand, and would be lost"):
        publish(folder, "tiny", facts_of(folder), api=api)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/api/repos/create", 403, "the token may not write there"),
        ("POST", "/api/models/user/tiny/commit/", 409, "somebody else has changed it meanwhile"),
        ("POST", "/api/models/user/tiny/commit/", 400, "would again: change what it names"),
        ("GET", "/api/whoami-v2", 429, "try again later"),
        ("POST", "/api/models/user/tiny/preupload/", 404, "would again|branch that is there"),
        ("POST", "/api/validate-yaml", 500, "try again later"),
    ],
)
def test_each_answer_has_its_remedy(hub, api, folder, method, path, status, words):
    hub.troubles = [(method, path, status)] * 9
    with pytest.raises(OSError, match=words) as caught:
        publish(folder, "tiny", facts_of(folder), api=api, wait=0.01)
    assert "\n" not in str(caught.value) and not hub.commits


def test_a_pull_request_against_a_branch_that_is_not_there(hub, api, folder):
    publish(folder, "tiny", facts_of(folder), api=api)
    other = make(folder.parent / "other", seed=1)
    with pytest.raises(OSError, match="give another --revision"):
        publish(other, "tiny", facts_of(other), api=api, revision="no-such", create_pr=True)
    assert len(hub.commits) == 1


def test_entropy_coded_checkpoints(hub, api, tmp_path):
    folder = make(tmp_path / "coded", GGConfig("rf8x", coding="rans"))
    publish(folder, "coded", facts_of(folder), api=api)
    card = hub.files["user/coded"]["README.md"].decode()
    assert "entropy-coded (`rans`)" in card and "rf8x" in ModelCard(card).data.tags
    plain = facts_of(make(tmp_path / "plain", GGConfig("rf8x"))).size
    coded = float(card.split("of `hf_gg`")[1].split(": ")[1].split(" bits")[0])
    assert 6 < coded < 8 * plain.quantized_bytes / plain.quantized_weights - 0.2


def test_refused_before_anything_is_sent(hub, api, folder, tmp_path, monkeypatch):
    def refused(words, *args, error=ValueError, **options):
        with pytest.raises(error, match=words):
            publish(*args, **{"api": api, **options})

    facts = facts_of(folder)
    refused("no name of a repository", folder, "a/b/c", facts)
    refused("no name of a repository", folder, "bad name", facts)
    with pytest.raises(ValueError, match="is no folder"):
        facts_of(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint: it has no config.json"):
        facts_of(tmp_path / "empty")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is not quantized by hf_gg"):
        facts_of(tmp_path / "float")
    shard = next(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=shard.name):
        facts_of(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        facts_of(folder)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="no name of a repository"):
        facts_of(folder, base="not a name")
    assert not hub.requests
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused("no token for the hub: run `hf auth login`", folder, "tiny", facts, api=HfApi(endpoint=hub.url))
    refused(
        "refused by the hub.*the token may not write",
        folder,
        "tiny",
        facts,
        error=OSError,
        api=HfApi(endpoint=hub.url, token="hf_wrong"),
    )
    assert not hub.commits and not hub.files


def test_no_network(folder, hub, monkeypatch):
    facts = facts_of(folder)
    gone = HfApi(endpoint="http://127.0.0.1:9", token="hf_test")
    with pytest.raises(OSError, match=r"cannot be reached .*check the network"):
        publish(folder, "user/tiny", facts, api=gone, wait=0.01)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        publish(folder, "user/tiny", facts, api=gone)


def test_evaluations_of_other_weights_are_refused(folder, tmp_path):
    estimate = {"value": 1.5, "low": 1.25, "high": 2.0}
    found = {
        "evaluated_with": "hf-gg eval /home/me/rf8 --against base --text ../a.txt",
        "against": "/home/me/base",
        "weights": fingerprint(folder),
        "texts": {"source": ["/home/me/x.jsonl"], "metrics": {"kl": estimate}, "documents": 3, "tokens": 9,
                  "window": 8, "stride": 4, "confidence": 0.95},
        "versions": {"torch": "2"}, "dtype": "float32", "device": "cpu", "date": "2026-01-01",
    }  # fmt: skip
    path = tmp_path / "eval.json"

    def read(**changes):
        path.write_text(json.dumps({k: v for k, v in (found | changes).items() if v is not None}))
        return facts_of(folder, evaluation=path)

    from hf_gg.integrations.cards import write_card

    card = write_card(read(), "tiny")
    assert "| KL from the base, nats a token | 1.5 | 1.25 to 2 |" in card and "/home" not in card
    assert "hf-gg eval rf8 --against base --text ../a.txt" in card
    assert "The base in what follows is `base`." in card
    assert "Perplexity was not measured" in card and "No task was measured" in card
    for changes, words in (
        ({"weights": "0" * 64}, "of other weights than those of"),
        ({"weights": None}, "of other weights than those of"),
        ({"evaluated_with": None}, "is no evaluation by"),
        ({"texts": None}, "is no evaluation by"),
    ):
        with pytest.raises(ValueError, match=words):
            read(**changes)
    with pytest.raises(ValueError, match="not as `hf-gg eval` writes it"):
        write_card(read(texts={"metrics": {}}), "tiny")
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        facts_of(folder, evaluation=path)
    with pytest.raises(ValueError, match="There is no file"):
        facts_of(folder, evaluation=tmp_path / "missing.json")


def test_read_only_folder(hub, api, folder):
    """Nothing is written there: for root nothing is read-only, so its times are compared."""
    for file in [*folder.iterdir(), folder]:
        file.chmod(stat.S_IREAD | (stat.S_IEXEC if file.is_dir() else 0))
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}, folder.stat().st_mtime_ns
    publish(folder, "tiny", facts_of(folder), api=api)
    assert before == ({file.name: file.stat().st_mtime_ns for file in folder.iterdir()}, folder.stat().st_mtime_ns)
    folder.chmod(0o755)


def test_command_in_a_process_of_its_own(tmp_path, capsys):
    """Compressed, pushed and loaded again by name, with one card all the way."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "README.md").write_text(HAND)
    assert main(["compress", str(tmp_path / "full"), str(tmp_path / "rf8"), "--format", "rf8"]) == 0
    capsys.readouterr()
    assert main(["push", str(tmp_path / "rf8"), "user/tiny", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("---\n") and "# user/tiny" in printed
    local = (tmp_path / "rf8" / "README.md").read_text()
    assert may_replace(local) and "Written with care" not in local
    with Hub() as hub:
        environment = {**os.environ, **hub.environment(str(tmp_path / "home"))}

        def run(*words, code=0):
            command = [sys.executable, "-m", "hf_gg", "push", str(tmp_path / "rf8"), *words]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
            assert done.returncode == code, done.stderr
            return done

        done = run("user/tiny", "--json", "--private")
        result = json.loads(done.stdout)
        assert result["repository"] == "user/tiny" and "user/tiny" in hub.private
        card = hub.files["user/tiny"]["README.md"].decode()
        # what the folder's card remembers: the licence of the base, the command
        assert ModelCard(card).data.license == "mit" and "--format rf8" in card and "hf-gg compress" in card
        assert "# user/tiny" in card
        hub.files["user/tiny"]["README.md"] = HAND.encode()
        done = run("user/tiny", code=1)
        assert done.stderr.startswith("hf-gg push: error: the card of user/tiny was written or edited by hand")
        assert not done.stdout and len(done.stderr.splitlines()) == 1
