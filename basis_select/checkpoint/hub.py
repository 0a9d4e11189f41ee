"""Checkpoints on a hub: push one with its card, find one that was pushed."""

import contextlib
import re
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError

from . import reading
from .card import card, evaluation

ABOUT = ("recipe.yaml", "results.json", "manifest.json")  # of a run: how its checkpoints were made, what they reach
STALE = ("*.safetensors", reading.INDEX)  # of an earlier push: a shard that is not part of this one


def snapshot(source):
    """The local folder with all files of the hub repository `source`, or None if it holds no checkpoint of ours."""
    if Path(source).is_dir():
        return None
    try:
        config = Path(hf_hub_download(str(source), "config.json"))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):  # whoever loads it then says what is wrong
        return None
    if not reading.is_compressed(config.parent):
        return None
    return Path(snapshot_download(str(source), revision=config.parent.name))


def push(folder, repo_id, *, private=True, base=None, license=None):
    """Publish a checkpoint with its model card as the hub repository `repo_id`, in one commit; returns its address.

    folder, base: as in `contents`. license: of the base model, if its card cannot be read. Nothing is
    created unless the checkpoint loads and passes its checks. Files that the hub has already are not sent again: the
    same call continues after a lost connection. Raises ValueError or FileNotFoundError with what is wrong.
    """
    _require_name(repo_id)
    checkpoint, run = _find(folder)
    api = HfApi()
    if get_token() is None:
        raise ValueError(f"not logged in to {api.endpoint}: run `hf auth login` or set HF_TOKEN")
    with _hub_errors(repo_id, api.endpoint):
        api.whoami()  # before the work: the first to say that the token is wrong or nobody answers
    known = _base_card(base or _recipe(run).get("model"))
    if license is not None:
        known = {"license": license} | {k: v for k, v in known.items() if k == "language"}
    if "license" not in known:
        raise ValueError("the licence of the base model could not be read from its card: name it with --license")
    made = contents(folder, repo_id, base=base, metadata=known)
    with _hub_errors(repo_id, api.endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if there.private != private:
            now, option = ("private", "without") if there.private else ("public", "with")
            raise ValueError(f"{repo_id} exists and is {now}: push {option} --public or change it on the hub first")
        old = [file.rfilename for file in there.siblings if file.rfilename not in made]
        operations = [CommitOperationDelete(name) for name in old if any(fnmatch(name, p) for p in STALE)]
        for name, what in made.items():
            operations.append(CommitOperationAdd(name, what if isinstance(what, Path) else what.encode()))
        api.create_commit(repo_id, operations, commit_message=f"basis_select checkpoint {checkpoint.name}")
    return f"{api.endpoint}/{repo_id}"


def contents(folder, repo_id, *, base=None, metadata=None):
    """`{path in the repository: file or text}` of what `push` would publish; contacts nobody.

    folder: a checkpoint, or a run directory, whose final/ it then is. Recipe, results and manifest are those of the
    run that made it. base: hub id of the base model, if the recipe does not name it; metadata: what the card of the
    base says of licence and language. Raises ValueError if the checkpoint fails its checks.
    """
    from ..models import load
    from ..sizes import sizes

    _require_name(repo_id)
    checkpoint, run = _find(folder)
    model, _ = load(checkpoint)
    recipe, row, parent, versions = _recipe(run), None, None, {}
    if run is not None:
        results, digest = reading.read_json(run / "results.json"), reading.weight_hash(checkpoint)
        row = next((row for row in results.values() if row["weights_sha256"] == digest), None)
        if row is None:
            raise ValueError(f"{run / 'results.json'} has no results of {checkpoint}: its weights are others")
        parent, versions = results["parent"], reading.read_json(run / "manifest.json")["versions"]
    text = card(
        repo_id,
        base=base or recipe.get("model"),
        metadata=metadata or {},
        sizes=row["sizes"] if row else sizes(model, checkpoint),
        recipe=recipe,
        row=row,
        parent=parent,
        versions=versions,
    )
    paths = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != "README.md"]
    made = {p.relative_to(checkpoint).as_posix(): p for p in paths}
    made |= {name: run / name for name in ABOUT} if run is not None else {}
    entries = evaluation(repo_id, recipe, row)
    if entries:
        made[f".eval_results/{recipe['task']}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return {**made, "README.md": text}


def _require_name(repo_id):
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", repo_id) or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(
            f"{repo_id!r} is not the name of a repository: it should read USER/NAME, of letters, digits, '-', '_', '.'"
        )


def _find(folder):
    """`(checkpoint, run directory that made it or None)`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder at {folder}")
    if (folder / "recipe.yaml").exists() and not (folder / "config.json").exists():
        if not (folder / "final").is_dir():
            raise FileNotFoundError(f"the run in {folder} has no final/ yet: finish it with the command that began it")
        folder = folder / "final"
    if not reading.is_compressed(folder):
        raise ValueError(f"{folder} is not a checkpoint of basis_select: its config.json does not say so")
    run = folder.resolve().parent
    return folder, run if all((run / name).exists() for name in ABOUT) else None


def _recipe(run):
    return yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")) if run is not None else {}


def _base_card(base):
    """Licence and language from the card of a base model, a hub id or a folder; empty where it cannot be read."""
    if base is None or base.startswith("wheel:"):
        return {}
    path = Path(base) / "README.md"
    try:
        data = ModelCard.load(path if path.is_file() else base, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError):  # gated, gone or never there: the licence is then asked for
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link", "language") if key in data}


@contextlib.contextmanager
def _hub_errors(repo_id, endpoint):
    """One sentence for what a hub refuses and for a connection that is lost."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise ValueError(
                f"{endpoint} does not accept this access token: run `hf auth login` or set HF_TOKEN to a valid one"
            ) from None
        if status in (403, 404):
            raise ValueError(
                f"{endpoint} does not let this access token write to {repo_id}: use one with write access there"
            ) from None
        reason = str(error.server_message or error).strip().splitlines()[0]
        raise ValueError(f"{endpoint} refused {repo_id}: {reason}") from None
    except (HTTPError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"the connection to {endpoint} failed ({reason}): nothing was published in part, the same command continues"
        ) from None
