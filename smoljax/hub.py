"""The Hugging Face hub, in and out: the only file that knows huggingface_hub, which is the extra `hf`. What goes wrong
is one sentence of ours: in the client's own words a signed URL may stand, or the header with the token."""

import logging
import os
import re
import sys
import time
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from smoljax.chat import MORE
from smoljax.companions import ADAPTER, NAMES, adapter
from smoljax.errors import DataError, Error, UsageError, require
from smoljax.fetch import check_room, check_sum, is_full

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
FILES = (".bin", ".gguf", ".json", ".jsonl", ".pt", ".pth", ".py", ".safetensors", ".txt")  # a path, were it there
SMALL = ["config.json", *NAMES, "LICENSE*"]
STANDARD = ["model.safetensors", "model-*-of-*.safetensors"]  # not consolidated.safetensors, the same once more
BUSY = (408, 429, 500, 502, 503, 504)
WAITS, LONGEST_WAIT = (1, 2, 4, 8), 60  # seconds; the hub may name others


class Unreachable(Error):
    """The hub gives no answer now, but its cache on this disk may."""


SENTENCES = {  # by the client's classes and what `sentence` adds to them; the first that fits
    "full": (Error, "there is no room for {name} in {cache}; make some, or set HF_HOME to a folder elsewhere"),
    "OfflineModeIsEnabled": (Unreachable, "{name} is not in {cache}, and HF_HUB_OFFLINE is set; unset it to download"),
    "HFValidationError": (UsageError, "no hub allows a name like {name}; expected owner/name"),
    "GatedRepoError": (UsageError, "{name} is gated; ask for access on its page at {site}, and set HF_TOKEN"),
    "RevisionNotFoundError": (UsageError, "{name} is no branch, tag or commit of that repository at {site}"),
    "token": (UsageError, "{site} does not take the token (401); make a new one and set HF_TOKEN"),
    "none": (UsageError, "{name} is not on this disk, and not at {site}, or private; check the name, or set HF_TOKEN"),
    "barred": (UsageError, "{site} forbids that for {name} (403); set HF_TOKEN to a token that may"),
    "busy": (Unreachable, "{site} is busy ({status}) and does not give {name}; run it again later"),
    "status": (Error, "{site} answers {status} for {name}; run it again later"),
    "HTTPError": (Unreachable, "{site} cannot be reached for {name} ({own}); check the network, or HF_ENDPOINT"),
    "PermissionError": (UsageError, "{cache} cannot be written; set HF_HOME to a folder that can"),
    "Exception": (Error, "{name} broke off ({own}), or {site} is no hub; run it again, or check HF_ENDPOINT"),
}


def is_name(text: str) -> bool:
    """Whether it could be `owner/name` or `owner/name@revision`. That a path goes before is the caller's affair."""
    found = NAME.fullmatch(text)
    return bool(found) and ".." not in text and not found["repo"].lower().endswith(FILES)


def download(name: str) -> Path:
    """The snapshot of `owner/name` or `owner/name@revision` in the hub's cache; the folder's name is the commit."""
    require(is_name(name), f"{name} is no name on the hub; expected owner/name or owner/name@revision")
    repo, revision = NAME.fullmatch(name).group("repo", "revision")
    hub = client(f"there is no {name} on this disk; to look for it on the hub")
    try:
        info = ask(hub, name, lambda: hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30))
        files = wanted(name, {f.rfilename: f for f in info.siblings or []})
        new = [f for f in files if not isinstance(hub.try_to_load_from_cache(repo, f, revision=info.sha), str)]
        check_room(Path(hub.constants.HF_HUB_CACHE), sum(files[f].size or 0 for f in new), name, "HF_HOME")
        exact = [escape(f) for f in files]
        folder = Path(ask(hub, name, lambda: hub.snapshot_download(repo, revision=revision, allow_patterns=exact)))
        if folder.name != info.sha:  # the branch moved on, or the hub went away and the client took an older commit
            raise Unreachable(f"{name} changed while it was read")
    except Unreachable as e:
        if (folder := cached(hub, repo, revision)) is None:
            raise
        if not hub.constants.HF_HUB_OFFLINE:
            logging.getLogger("smoljax").warning(f"{e}; taken from the cache: commit {folder.name}")
        return folder
    for f in new:  # the client compares sizes alone; the hub knows git's sum of small files, the sha256 of large ones
        lfs = files[f].lfs
        check_sum(folder / f, lfs.sha256 if lfs else files[f].blob_id, f"{f} of {name}", git=not lfs)
    return folder


def wanted(name: str, files: dict) -> dict:
    """Of a repository's files, those that smoljax reads: the safetensors, or else the one GGUF, and the small ones."""
    top = [f for f in files if "/" not in f]
    weights = [f for f in top if f.endswith(".safetensors")]
    weights = [f for f in weights if any(fnmatchcase(f, pattern) for pattern in STANDARD)] or weights
    ggufs = [f for f in top if f.endswith(".gguf") and not weights]
    require(len(ggufs) < 2, f"{name} holds {len(ggufs)} GGUF files; download one of {', '.join(ggufs)}, give its path")
    if not weights + ggufs:
        pickles = ", ".join(f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
        why = f"only pickles ({pickles}), which can run code and are never read" if pickles else "no weights"
        raise DataError(f"{name} holds {why}; expected .safetensors or a .gguf file")
    if ADAPTER in files and not any(fnmatchcase(f, pattern) for f in weights for pattern in STANDARD):
        raise DataError(adapter(name))
    if weights and "config.json" not in files:
        raise DataError(f"{name} has safetensors but no config.json; expected a model's, and its config.json")
    small = SMALL[1:] if ggufs else SMALL  # a config.json beside it would be another model's, as folders are read
    patterns = [*small, *map(escape, weights + ggufs), "*.safetensors.index.json"]
    found = [f for f in top if any(fnmatchcase(f, pattern) for pattern in patterns)]
    return {f: files[f] for f in (*found, *(f for f in files if fnmatchcase(f, f"{MORE}*.jinja")))}


def cached(hub, repo: str, revision: str | None) -> Path | None:
    """The snapshot as it lies in the cache, where it is whole."""
    for suffix, patterns in ((".safetensors", SMALL + STANDARD), (".gguf", SMALL[1:])):
        how = {"allow_patterns": patterns, "ignore_patterns": ["*/*"], "local_files_only": True}
        try:
            folder = Path(hub.snapshot_download(repo, revision=revision, **how))
        except FileNotFoundError:
            continue
        if any(file.suffix == suffix for file in folder.iterdir()):
            return folder
    return None


def check_push(repo: str):
    """A UsageError unless there is a token that the hub takes: to be called before hours of work."""
    require(is_name(repo) and "@" not in repo, f"{repo} is no name for a repository; expected OWNER/NAME")
    hub = client(f"to push to {repo}")
    require(not hub.constants.HF_HUB_OFFLINE, f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repo}; unset it")
    require(hub.get_token() is not None, f"there is no token to push to {repo} with; set HF_TOKEN, or `hf auth login`")
    token = (ask(hub, repo, hub.HfApi().whoami).get("auth") or {}).get("accessToken") or {}
    require(token.get("role") != "read", f"the token may only read; make one that may write to {repo}")


def push(folder: str | Path, repo: str, private: bool = False) -> str:
    """Upload a folder's files to the main branch of a repository, made where there is none: the commit's URL."""
    hub = client(f"to push to {repo}")
    api, private = hub.HfApi(), private or None  # None: public, unless the organization has another default
    ask(hub, repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    how = {"repo_id": repo, "folder_path": folder, "commit_message": "Upload with smoljax"}
    return str(ask(hub, repo, lambda: api.upload_folder(**how)).commit_url)


def client(what: str):
    """huggingface_hub, which reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, quiet but for its bars."""
    try:
        import huggingface_hub as hub
        import huggingface_hub.utils  # with which hub.utils and hub.constants are there
    except ImportError:
        raise UsageError(f"{what}, smoljax needs huggingface_hub: pip install 'smoljax[hf]'") from None
    if "HF_HUB_VERBOSITY" not in os.environ:
        hub.utils.logging.set_verbosity_error()  # its warnings hold URLs; what counts is raised
    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        hub.utils.disable_progress_bars()
    require(bool(re.fullmatch("[!-~]*", hub.get_token() or "")), "the hub's token holds a character that none has")
    return hub


def ask(hub, name: str, call):
    """call(), again where the hub is busy; what the client raises is one sentence about `name`."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as e:
            chain = [e]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 16:
            chain.append(cause)
        answer = next((x.response for x in chain if getattr(x, "response", None) is not None), None)
        status, after = (None, "") if answer is None else (answer.status_code, answer.headers.get("retry-after", ""))
        seconds = int(after) if after.isdecimal() else wait
        if wait is None or status not in BUSY or seconds > LONGEST_WAIT:
            raise sentence(hub, name, chain, status)
        time.sleep(seconds)


def sentence(hub, name: str, chain: list[Exception], status: int | None) -> Error:
    site, cache = re.sub("//.*@", "//", hub.constants.ENDPOINT), hub.constants.HF_HUB_CACHE
    kinds = {kind.__name__ for x in chain for kind in type(x).__mro__}
    kinds |= {"full"} if any(map(is_full, chain)) else set()
    kinds |= {"HTTPError"} if kinds & {"ConnectionError", "TimeoutError"} else set()  # as hf_xet says it
    if status is not None:
        known = {401: "token" if hub.get_token() else "none", 404: "none", 403: "barred"} | dict.fromkeys(BUSY, "busy")
        kinds.add(known.get(status, "status"))
    error, text = next(SENTENCES[kind] for kind in SENTENCES if kind in kinds)
    return error(text.format(name=name, site=site, cache=cache, status=status, own=type(chain[0]).__name__))
