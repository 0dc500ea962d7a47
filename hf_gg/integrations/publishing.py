"""A checkpoint published on the hub: one commit, or none.

Large files are uploaded first, by their digest and outside of any branch; the commit then names all files at once. So
a push that is cut off leaves the repository as it was, and the next one goes on with the files that are missing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, get_token, hf_raise_for_status, validate_repo_id

from .cards import Facts, Marker, base_of, collect, marker_of, may_replace, read_evaluation, read_license, write_card
from .folders import weight_files


_CARD = "README.md"
# What belongs to a training run, or to another way of saving the same model.
_NOT_PUBLISHED = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "training_args.bin",
    "trainer_state.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
)
_WEIGHTS = re.compile(r"(new-)?(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_TRIES = 4
# httpx, or httpx2 in later releases of huggingface_hub
_HTTP = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


@dataclass(frozen=True)
class Published:
    """What was published: the repository, the commit, the pull request if one was opened, files and bytes."""

    repository: str
    commit: str
    commit_url: str
    pull_request: str | None
    files: list[str]
    deleted: list[str]
    bytes: int


def check_name(name: str) -> str:
    """`name` if a repository can be called so.

    Raises:
        ValueError: it cannot; the hub's rule is told.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is no name of a repository ({str(error).rstrip('.')}): USER/NAME or NAME."
        ) from error
    return name


def facts_of(
    folder: Path,
    base: str | None = None,
    license: str | None = None,
    commands: list[str] | None = None,
    evaluation: Path | None = None,
) -> Facts:
    """What a card of this folder says.

    Args:
        folder: of the checkpoint.
        base: the base model, a name on the hub or a folder; None for what the folder's card remembers.
        license: the base's licence by the hub's name (`apache-2.0`); None for what the base's card says.
        commands: how the checkpoint was made; None for what the folder's card remembers.
        evaluation: what `hf-gg eval --output` wrote.

    Raises:
        ValueError: no checkpoint of ours, no base or evaluation of that name, or one of other weights.
    """
    known = marker_of(folder) or Marker()
    name, terms = known.base, known.license
    if base is not None:
        if not Path(base).exists():
            check_name(base)
        name, terms = base_of(base), {} if license is not None else read_license(base)
    if license is not None:
        terms = {"license": license}
    elif not terms and name is not None:
        terms = read_license(name)
    marker = Marker(name, terms, known.commands if commands is None else commands)
    facts = collect(folder, marker)
    found = None if evaluation is None else read_evaluation(evaluation, folder)
    return Facts(facts.config, facts.quantization, facts.size, facts.file_bytes, marker, found)


def publish(
    folder: Path,
    name: str,
    facts: Facts,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    overwrite_card: bool = False,
    api: HfApi | None = None,
    tell: Callable[[str], object] = lambda line: None,
    wait: float = 1.0,
) -> Published:
    """Publish a checkpoint with its card, in one commit; what cannot be done is found before anything is uploaded.

    Args:
        folder: of the checkpoint; nothing in it is changed.
        name: of the repository, `NAME` or `USER/NAME`; it is made if it is not there.
        facts: of `facts_of`.
        private: make it private; refused where a public one is there already.
        revision: the branch, made if it is not there; None for the main one.
        create_pr: open a pull request instead.
        message: of the commit.
        overwrite_card: replace a card that somebody has written, or edited.
        api: of another hub or user.
        tell: is told of each new try.
        wait: seconds before the second try; doubled before each other.

    Raises:
        ValueError: no token, a name or branch that cannot be, a hand-written card, a public repository.
        OSError: the hub cannot be reached, or refuses.
    """
    api = HfApi() if api is None else api
    check_name(name)
    if not (api.token or get_token()):
        raise ValueError("There is no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may write.")
    own = _read(folder / _CARD)
    _check_card(own, str(folder / _CARD), overwrite_card)
    with _Errors(name, create_pr):
        repository = name if "/" in name else f"{api.whoami()['name']}/{name}"
        existing, remote, head = _look(api, repository, revision, private)
        _check_card(existing, f"the card of {repository}", overwrite_card)
        card = write_card(
            facts, repository, [card for card in (own, existing) if card is not None and may_replace(card)]
        )
        additions = _additions(folder, card)
        _check_metadata(api, card)
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)

        def upload() -> None:
            api.preupload_lfs_files(repository, additions, revision=revision, create_pr=create_pr, free_memory=False)

        def commit() -> CommitInfo:
            operations: list = [*additions, *map(CommitOperationDelete, _old_weights(remote, additions))]
            return api.create_commit(
                repository,
                operations,
                commit_message=message or f"Upload {facts.quantization.get('weight_format')} weights by hf-gg",
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,  # of a card that somebody writes while files are uploaded nothing is lost
            )

        def look_again() -> None:
            # the commit may have arrived and only the answer not: then there is nothing left to do
            nonlocal additions, remote, head
            additions = _additions(folder, card)
            found, remote, head = _look(api, repository, revision, private)
            _check_card(found, f"the card of {repository}", overwrite_card)

        _again(upload, tell, wait)
        deleted = _old_weights(remote, additions)
        # a second try of a pull request could open a second one
        info = commit() if create_pr else _again(commit, tell, wait, look_again)
    return Published(
        repository,
        info.oid,
        info.commit_url,
        info.pr_url,
        sorted(addition.path_in_repo for addition in additions),
        deleted,
        sum(addition.upload_info.size for addition in additions),
    )


def _additions(folder: Path, card: str) -> list[CommitOperationAdd]:
    """All files of the checkpoint, with this card."""
    weights = {file.name for file in weight_files(folder)}
    found = [CommitOperationAdd(_CARD, card.encode())]
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in name.parts) or str(name) == _CARD:
            continue
        if name.name not in weights and any(fnmatch.fnmatch(name.name, pattern) for pattern in _NOT_PUBLISHED):
            continue
        if _WEIGHTS.fullmatch(name.name) and not name.name.endswith(".index.json") and name.name not in weights:
            continue  # left over from another save
        if not os.access(file, os.R_OK):
            raise ValueError(f"{file} cannot be read: change its permissions.")
        found.append(CommitOperationAdd(name.as_posix(), file))
    return found


def _old_weights(remote: list[str], additions: list[CommitOperationAdd]) -> list[str]:
    """Weights in the repository that are not among the new ones, and would be loaded with them or in their place."""
    new = {addition.path_in_repo for addition in additions}
    return sorted(file for file in remote if _WEIGHTS.fullmatch(file) and file not in new)


def _look(
    api: HfApi, repository: str, revision: str | None, private: bool
) -> tuple[str | None, list[str], str | None]:
    """The card, the files and the commit of a repository at a revision: None, none, None where there is nothing yet.

    Raises:
        ValueError: it is public, and a private one is wanted.
    """
    try:
        info = api.model_info(repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None, [], None
    if private and not info.private:
        raise ValueError(f"{repository} is there and public: make it private in its settings, or give another name.")
    if revision is not None:
        with contextlib.suppress(RevisionNotFoundError):  # a new branch begins as the main one
            info = api.model_info(repository, revision=revision)
    files = [sibling.rfilename for sibling in info.siblings or []]
    if _CARD not in files:
        return None, files, info.sha
    path = api.hf_hub_download(repository, _CARD, revision=info.sha)
    return Path(path).read_text(encoding="utf-8", errors="replace"), files, info.sha


def _check_card(card: str | None, where: str, overwrite: bool) -> None:
    if card is not None and not overwrite and not may_replace(card):
        raise ValueError(
            f"{where} was written or edited by hand, and would be lost: --overwrite-card replaces it. Nothing was "
            "published."
        )


def _check_metadata(api: HfApi, card: str) -> None:
    """Raise a `ValueError` if the hub does not take the metadata of a card; it would say so after the large files."""
    answer = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    if answer.status_code != 400:
        hf_raise_for_status(answer)
        return
    try:
        reasons = [str(error["message"]) for error in answer.json()["errors"]]
    except (ValueError, KeyError, TypeError):
        reasons = ["no reason was given"]
    raise ValueError(
        f"The hub does not take the card's metadata ({'; '.join(reasons)}): --license and --base are for names that "
        "it knows, other keys are those of the card that is there. Nothing was published."
    )


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    except OSError:
        return None


def _again(
    function: Callable[[], Any],
    tell: Callable[[str], object],
    wait: float,
    before: Callable[[], object] = lambda: None,
) -> Any:
    """Call, and where the connection broke or the hub failed call `before` and it again."""
    for attempt in range(1, _TRIES + 1):
        try:
            if attempt > 1:
                before()
            return function()
        except (HfHubHTTPError, _HTTP.TransportError) as error:
            response = getattr(error, "response", None)
            passing = response is None or response.status_code in (408, 429) or response.status_code >= 500
            if not passing or attempt == _TRIES:
                raise
            tell(f"The connection to the hub failed ({_first_line(error)}): try {attempt + 1} of {_TRIES}.")
            time.sleep(wait * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


class _Errors:
    """What the client raises, as errors that say what to do."""

    def __init__(self, name: str, create_pr: bool):
        self.name, self.create_pr = name, create_pr

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        # an answer that was lost may have been "done"
        state = "The old files are there, or all of the new ones"
        state += ", and perhaps a pull request: look before you push again." if self.create_pr else "."
        if isinstance(error, OfflineModeIsEnabled):
            raise OSError("The hub is switched off by HF_HUB_OFFLINE: unset it.") from error
        if isinstance(error, (_HTTP.TransportError, ConnectionError, EntryNotFoundError)):
            raise OSError(
                f"The hub ({constants.ENDPOINT}) cannot be reached ({_first_line(error)}): check the network and push "
                f"again. {state}"
            ) from error
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            said = " ".join((error.server_message or "").split())
            reason = f"{_first_line(error)}{f' {said}' if said and said not in _first_line(error) else ''}"
            raise OSError(
                f"{self.name} was refused by the hub ({reason}): {_remedy(error, status)}. {state}"
            ) from error


def _remedy(error: HfHubHTTPError, status: int) -> str:
    if status in (401, 403):
        return "the token may not write there: `hf auth login` with one that may, or another name"
    if isinstance(error, RevisionNotFoundError):
        return "a pull request is opened against a branch that is there: give another --revision"
    if status in (409, 412):
        return f"it answered {status}, somebody else has changed it meanwhile: push again"
    if status in (408, 429) or status >= 500:
        return f"it answered {status}: try again later"
    return f"it answered {status}, and would again: change what it names"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
