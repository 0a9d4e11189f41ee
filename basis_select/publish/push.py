"""Publish a checkpoint on a hub, with its card and with how it was made."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from ..checkpoint import checks
from ..checkpoint.cleaning import cleaned, masked
from ..checkpoint.models import load
from ..checkpoint.snapshot import mask_logs
from ..sizes import sizes
from ..system.reading import read_json, read_yaml
from .card import card, evaluation, family_card, is_hub_id, is_ours

log = logging.getLogger(__name__)

ABOUT = ("recipe.yaml", "results.json", "manifest.json")  # of a run: how its checkpoints were made, what they reach
CURVE = ("curve.csv", "curve.png")  # of a run with several sizes
KEPT = (".gitattributes",)  # the hub's own


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    base: str | None = None,
    license: str | None = None,
    replace_card: bool = False,
) -> str:
    """Publish a checkpoint with its model card as the hub repository `repo_id`, in one commit; returns its address.

    folder, base, replace_card: as in `contents`. license: of the base model, if its card cannot be read. Nothing is
    created unless the checkpoint loads and passes its checks. Afterwards the repository holds what was pushed and
    nothing else; a card there that was written by hand is replaced only with `replace_card`. Files that the hub has
    already are not sent again: the same call continues after a lost connection. Raises ValueError or FileNotFoundError
    with what is wrong.

        >>> bs.push("runs/quickstart", "you/small-model")  # doctest: +SKIP
        'https://huggingface.co/you/small-model'
    """
    _require_name(repo_id)
    checkpoint, run = _find(folder)
    api = _logged_in(repo_id)
    base = base or _base(run)
    _require_same(base, checkpoint)
    known = _known(base, license)
    made = contents(folder, repo_id, base=base, metadata=known, replace_card=replace_card)
    return _commit(api, repo_id, made, f"basis_select checkpoint {checkpoint.name}", private, replace_card)


def push_family(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    base: str | None = None,
    license: str | None = None,
    replace_card: bool = False,
) -> list[str]:
    """Publish every size of the run in `folder`, each as the repository REPO_ID-SIZE, then REPO_ID, an overview of them
    with the curve of quality against bytes; returns their addresses. The options are those of `push`.

    Raises ValueError for a run of one size alone, and as `push` does.
    """
    _require_name(repo_id)
    options = {"private": private, "license": license, "replace_card": replace_card}
    run = _family_run(folder)
    base = base or _base(run)
    done = [push(path, name, base=base, **options) for name, path in _members(run, repo_id).items()]
    made = overview(run, repo_id, base=base, metadata=_known(base, license))
    message = "basis_select overview of all sizes"
    return [*done, _commit(_logged_in(repo_id), repo_id, made, message, private, replace_card)]


def overview(
    folder: str | Path, repo_id: str, *, base: str | None = None, metadata: dict | None = None
) -> dict[str, Path | str]:
    """`{path in the repository: file or text}` of the overview that `push_family` publishes; contacts nobody."""
    run = _family_run(folder)
    facts = _about(run)
    results = facts["results.json"]
    by_weights = {row["weights_sha256"]: row for row in results.values()}
    rows = {name: by_weights.get(checks.weight_hash(path)) for name, path in _members(run, repo_id).items()}
    if missing := [name for name, row in rows.items() if row is None]:
        raise ValueError(f"{run / 'results.json'} has no results of {missing[0]}: no row has its weights")
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["sizes"]["bytes"]))
    recipe = facts["recipe.yaml"]
    text = family_card(repo_id, base or _base(run), metadata or {}, recipe, rows, results["parent"])
    return {name: run / name for name in CURVE} | {"README.md": text}


def _family_run(folder: str | Path) -> Path:
    run = Path(folder)
    if missing := [name for name in (*ABOUT, *CURVE) if not (run / name).is_file()]:
        raise ValueError(f"{run} has no {missing[0]}: a family is a finished run whose recipe names `sizes`")
    return run


def _members(run: Path, repo_id: str) -> dict[str, Path]:
    """`{repository: checkpoint}` of every size of a run."""
    pruned = _recipe(run)["prune"]
    own = pruned["size"] if pruned.get("keep") is None else pruned["keep"]
    found = {f"{repo_id}-{own}": run / "final"}
    return found | {f"{repo_id}-{size}": run / f"final-{size}" for size in _recipe(run)["sizes"]}


def _logged_in(repo_id: str) -> HfApi:
    mask_logs()
    api = HfApi()
    address = masked(api.endpoint)
    if get_token() is None:
        raise ValueError(f"not logged in to {address}: run `hf auth login` or set HF_TOKEN")
    with _hub_errors(repo_id, address):
        api.whoami()  # before the work: the first to say that the token is wrong or nobody answers
    return api


def _known(base: str | None, license: str | None) -> dict:
    """What the card says of licence and language. Raises ValueError without a licence."""
    known = _base_card(base)
    if license is not None:
        known = {"license": license} | {k: v for k, v in known.items() if k == "language"}
    if "license" not in known:
        raise ValueError("the licence of the base model could not be read from its card: name it with --license")
    return known


def _commit(
    api: HfApi, repo_id: str, made: dict[str, Path | str], message: str, private: bool, replace_card: bool
) -> str:
    """Let a repository hold `made` and nothing else; returns its address."""
    address = masked(api.endpoint)
    with _hub_errors(repo_id, address):
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if there.private != private:
            now, option = ("private", "without") if there.private else ("public", "with")
            raise ValueError(f"{repo_id} exists and is {now}: push {option} --public or change it on the hub first")
        old = {file.rfilename for file in there.siblings}
        if "README.md" in old and not replace_card:
            _require_card(Path(hf_hub_download(repo_id, "README.md", revision=there.sha)), repo_id, made["README.md"])
        operations = [CommitOperationDelete(name) for name in sorted(old.difference(made, KEPT))]
        for name, what in made.items():
            operations.append(CommitOperationAdd(name, what if isinstance(what, Path) else what.encode()))
        api.create_commit(repo_id, operations, commit_message=message, parent_commit=there.sha)
    return f"{address}/{repo_id}"


def contents(
    folder: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    metadata: dict | None = None,
    replace_card: bool = False,
) -> dict[str, Path | str]:
    """`{path in the repository: file or text}` of what `push` would publish; contacts nobody.

    folder: a checkpoint, or a run directory, whose final/ it then is. Only files that were saved with the checkpoint
    are published. Recipe, results and manifest are those of the run that made it, without paths of this machine and
    without secrets, which is logged. base: hub id of the base model, if the recipe does not name it; metadata: what the
    card of the base says of licence and language. A README.md in the checkpoint that was written by hand is its card,
    unless `replace_card`. Raises ValueError if the checkpoint fails its checks.
    """
    _require_name(repo_id)
    checkpoint, run = _find(folder)
    model, _ = load(checkpoint)
    facts, row, parent, versions = _about(run), None, None, {}
    recipe = facts.get("recipe.yaml", {})
    if run is not None:
        results, digest = facts["results.json"], checks.weight_hash(checkpoint)
        row = next((row for row in results.values() if row["weights_sha256"] == digest), None)
        if row is None:
            raise ValueError(f"{run / 'results.json'} has no results of {checkpoint}: no row has its weights")
        parent, versions = results["parent"], facts["manifest.json"]["versions"]
    text = card(
        repo_id,
        base=base or _base(run),
        metadata=metadata or {},
        sizes=row["sizes"] if row else sizes(model, checkpoint),
        recipe=recipe,
        row=row,
        parent=parent,
        versions=versions,
        trimmed=getattr(model.config, "trimmed", None),
    )
    own = checkpoint / "README.md"
    if not replace_card and own.exists() and not is_ours(own.read_text(encoding="utf-8")):
        text = own.read_text(encoding="utf-8")
        log.warning("%s, written by hand, is published as the card: --replace-card writes one", own)
    made = {name: checkpoint / name for name in sorted(checks.recorded_files(checkpoint)) if name != own.name}
    for name, fact in facts.items():
        made[name] = yaml.safe_dump(fact, sort_keys=False) if name == "recipe.yaml" else json.dumps(fact, indent=1)
    entries = evaluation(repo_id, recipe, row)
    if entries:
        made[f".eval_results/{recipe['task']}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return {**made, "README.md": text}


def _about(run: Path | None) -> dict[str, dict]:
    """`{file name: content}` of the files beside a checkpoint that say how it was made, cleaned."""
    facts = {}
    for name in ABOUT if run is not None else ():
        content = _recipe(run) if name == "recipe.yaml" else read_json(run / name)
        facts[name], changed = cleaned(content)
        if changed:
            log.warning("%s is published without secrets and folders of this machine in %s", name, ", ".join(changed))
    return facts


def _require_card(there: Path, repo_id: str, text: str) -> None:
    """Raise ValueError if the hub has a card that was written by hand and is another than `text`."""
    theirs = there.read_text(encoding="utf-8")
    if theirs != text and not is_ours(theirs):
        raise ValueError(
            f"README.md of {repo_id} was not written by basis_select, or changed since: push with --replace-card to "
            "replace it, or put it beside the weights as README.md to keep it"
        )


def _require_name(repo_id: str) -> None:
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", repo_id) or re.search(r"--|\.\.|\.git$", repo_id):
        raise ValueError(
            f"{repo_id!r} is not the name of a repository: it should read USER/NAME, of letters, digits, '-', '_', '.'"
        )


def _find(folder: str | Path) -> tuple[Path, Path | None]:
    """`(checkpoint, run directory that made it or None)`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder at {folder}")
    if (folder / "recipe.yaml").exists() and not (folder / "config.json").exists():
        if not (folder / "final").is_dir():
            raise FileNotFoundError(f"the run in {folder} has no final/ yet: finish it with the command that began it")
        folder = folder / "final"
    if not checks.is_compressed(folder):
        raise ValueError(f"{folder} is not a checkpoint of basis_select: its config.json does not say so")
    run = folder.resolve().parent
    return folder, run if all((run / name).exists() for name in ABOUT) else None


def _recipe(run: Path | None) -> dict:
    return read_yaml(run / "recipe.yaml") if run is not None else {}


def _base(run: Path | None) -> str | None:
    """The model that a run compressed, as its recipe names it. Raises ValueError for a folder that is gone."""
    base = _recipe(run).get("model")
    if base is None or base.startswith("wheel:") or Path(base).is_absolute() or Path(base).exists():
        return base
    facts = [read_json(path) for path in sorted(run.glob("stages/load-*/stage.json"))]
    loaded = [fact.get("options") or {} for fact in facts]
    was_local = any(options.get("model") == base and options.get("files") for options in loaded)
    if was_local or base.startswith((".", "~")) or base.count("/") > 1 or "\\" in base:
        raise ValueError(
            f"{run / 'recipe.yaml'} names the model {base}, a folder that is not here: name its hub id with --base, or "
            "push where the folder is"
        )
    return base


def _require_same(base: str | None, checkpoint: Path) -> None:
    """Raise ValueError if the hub's `base` has another shape: the recipe may have meant a folder of that name."""
    if not is_hub_id(base):
        return
    try:
        theirs = read_json(Path(hf_hub_download(base, "config.json")))
    except (OSError, HTTPError, HFValidationError):  # gated, gone or never there
        return
    ours = read_json(checkpoint / "config.json")
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"{base} on the hub is not what this model was made from, its {key} is {theirs.get(key)} and not "
                f"{ours.get(key)}: name the base model with --base"
            )


def _base_card(base: str | None) -> dict:
    """Licence and language from the card of a base model, a hub id or a folder; empty where it cannot be read."""
    if base is None or base.startswith("wheel:") or (Path(base).exists() and not (Path(base) / "README.md").is_file()):
        return {}
    path = Path(base) / "README.md"
    try:
        data = ModelCard.load(path if path.is_file() else base, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError):  # gated, gone or never there: the licence is then asked for
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link", "language") if key in data}


@contextlib.contextmanager
def _hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
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
        reason = masked(error.server_message or error).strip().splitlines()[0]
        raise ValueError(f"{endpoint} refused {repo_id}: {reason}") from None
    except (HTTPError, RuntimeError) as error:
        reason = masked(error.__cause__ or error)
        raise ValueError(
            f"the connection to {endpoint} failed ({reason}): nothing was published in part, the same command continues"
        ) from None
