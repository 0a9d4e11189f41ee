"""Find a checkpoint of ours on a hub."""

import logging
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from . import checks
from .cleaning import masked


def snapshot(source: str | Path) -> Path | None:
    """The local folder with all files of the hub repository `source`, or None if it holds no checkpoint of ours."""
    if Path(source).is_dir():
        return None
    mask_logs()
    try:
        config = Path(hf_hub_download(str(source), "config.json"))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):  # whoever loads it then says what is wrong
        return None
    if not checks.is_compressed(config.parent):
        return None
    return Path(snapshot_download(str(source), revision=config.parent.name))


def mask_logs() -> None:
    """What the hub's client logs names addresses, which may hold a password."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("huggingface_hub", "httpx", "transformers"):
            logging.getLogger(name).addFilter(_mask_record)


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = masked(record.getMessage()), ()
    return True
