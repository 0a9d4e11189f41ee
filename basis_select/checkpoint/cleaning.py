"""What leaves this machine says nothing of its folders and holds no password: texts are cleaned before."""

import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
SECRET_KEYS = re.compile(r"(?i)(^|[_-])(token|secret|password|passwd|api_?key|credentials?|authorization)$")
SECRETS = re.compile(
    r"\b(hf_\w{8,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abps]-[\w-]{8,}"
    r"|AKIA[0-9A-Z]{12,}|AIza[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
USER = re.compile(r"(?<=://)[^/@\s]+@")  # user and password of an address
QUERY = re.compile(r"(?i)([?&](?:token|access_token|key|api_key|password|signature|sig)=)[^&\s\"']+")
BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}")
PATH_KEYS = ("model", "task", "data_dir", "costs", "cache_dir", "folder", "path", "out")
WHOLE_PATH = re.compile(r"(?:file://)?(?:/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)[^\n]*")
INNER_PATH = re.compile(r"""(?<![^\s"'=(:,\[])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\"']+[/\\])+([^\s/\\"',)]*)""")


def masked(text: object) -> str:
    """A text without passwords and access tokens."""
    text = QUERY.sub(rf"\1{HIDDEN}", USER.sub("", str(text)))
    return BEARER.sub(rf"\1{HIDDEN}", SECRETS.sub(HIDDEN, text))


def cleaned(value: Any, key: str = "") -> tuple[Any, list[str]]:
    """`(value, keys that changed)`: paths of this machine become their last part, secrets are hidden.

    value: what YAML or JSON hold. A key that names a file or a folder loses relative folders as well.
    """
    if isinstance(value, dict):
        made = {k: cleaned(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
        return {k: v for k, (v, _) in made.items()}, [name for _, changed in made.values() for name in changed]
    if isinstance(value, list):
        made = [cleaned(v, key) for v in value]
        return [v for v, _ in made], list(dict.fromkeys(name for _, changed in made for name in changed))
    if not isinstance(value, str):
        return value, []
    name = key.rpartition(".")[2]
    text = HIDDEN if SECRET_KEYS.search(name) else masked(_without_folders(value, name))
    return text, [key] if text != value else []


def _without_folders(text: str, name: str) -> str:
    is_id = name == "model" and text.count("/") == 1 and not Path(text).exists()
    relative = name in PATH_KEYS and ("/" in text or "\\" in text) and not is_id
    if WHOLE_PATH.fullmatch(text) or (relative and "://" not in text and not text.startswith("wheel:")):
        return re.split(r"[\\/]", text.rstrip("/\\"))[-1] or HIDDEN
    return INNER_PATH.sub(r"\1", text)
