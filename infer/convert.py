"""`smoljax convert SRC DST [--to hf|orbax|gguf]`: weights from whatever MODEL may be into another form, with a proof.

`hf` is what transformers loads, or in int8 what smoljax alone does. `orbax` is a folder that smoljax's programs and
`init_from` take. `gguf` is a folder with one file for llama.cpp. With --verify what was written is read back and
compared with the source, tensor by tensor and by logits, and with transformers where that is installed; conversion.json
and SHA256SUMS then lie beside it.
"""

import argparse
import json
import math
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

from smoljax.errors import Error, require, run

DTYPES = {"hf": ("float32", "bfloat16", "float16"), "orbax": ("float32", "bfloat16", "float16")}
DTYPES["gguf"] = (*DTYPES["hf"], "q8_0", "q4_0")
DTYPES["hf"] += ("int8",)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("smoljax convert", description="Convert a model's weights.", allow_abbrev=False)
    p.add_argument(
        "src", metavar="SRC", help="a run, a checkpoint, a Hugging Face folder, a .gguf, nanotron, a hub name"
    )
    p.add_argument("dst", metavar="DST", help="a new folder")
    p.add_argument("--to", choices=tuple(DTYPES), default="hf", help="default: hf")
    known = dict.fromkeys(dtype for each in DTYPES.values() for dtype in each)
    p.add_argument("--dtype", choices=known, help="default: the source's; int8 for hf; q8_0 and q4_0 for gguf")
    p.add_argument("--int8-embedding", action="store_true", help="--dtype int8: the embedding in int8, too")
    p.add_argument("--max-file-size", type=float, metavar="GB", help="hf: split the weights into files of this size")
    p.add_argument("--verify", action="store_true", help="read it back, compare, write conversion.json and SHA256SUMS")
    p.add_argument("--push", metavar="OWNER/NAME", help="upload DST to the Hugging Face hub when it is complete")
    p.add_argument("--private", action="store_true", help="... into a private repository, if it is new")
    p.add_argument("--json", action="store_true", help="print the report")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    known = args.dtype in (None, *DTYPES[args.to])
    for_ = " or ".join(to for to, dtypes in DTYPES.items() if args.dtype in dtypes)
    require(known, f"--dtype {args.dtype} is for --to {for_}; --to {args.to} takes {', '.join(DTYPES[args.to])}")
    require(not args.int8_embedding or args.dtype == "int8", "--int8-embedding is for --dtype int8")
    split = args.max_file_size
    require(split is None or args.to == "hf", "--max-file-size is for --to hf")
    require(split is None or 0 < split < math.inf, f"--max-file-size is {split}, expected GB, more than 0")
    require(not args.private or args.push, "--private is for --push")
    require(not args.dst.endswith(".gguf"), f"DST is {args.dst}, but it is a folder, in which the .gguf gets its name")
    from smoljax import atomic, exchange, hub, runtime, special_tokens, sums, verify, weights

    if args.push:
        hub.check_push(args.push)
    runtime.start()
    start = time.perf_counter()
    with atomic.fresh(args.dst) as part:  # refuses a DST that exists before any weight is read
        with weights.open_source(args.src) as source:
            dtype = args.dtype or (source.dtype if source.dtype in DTYPES[args.to] else "float32")  # as exact
            more = args.int8_embedding and exchange.EMBED not in source.ints
            write(source, part, args, dtype)
            report = {
                "route": f"{Path(args.src).name if Path(args.src).exists() else args.src} -> {args.to}",
                "dtype": dtype,
                "bits": "exact" if dtype in (source.dtype, "float32") and not more else "rounded",
                "parameters": source.config.parameters,
                "seconds": round(time.perf_counter() - start, 2),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,  # kB on Linux
                "smoljax": version("smoljax"),
            }
            if args.verify:
                report |= verify.compare(source, part, dtype)
        if args.verify:
            atomic.write_json(part / "conversion.json", report)
            sums.write(part)
    if "tokenizer.json" not in source.files:
        print(f"smoljax: note: {args.src} has no tokenizer.json, so {args.dst} has none", file=sys.stderr)
    words = weights.words(source.files, source.config, source.name)
    kept = special_tokens.ends(source.files, source.config, words)
    if lost := [id for id in source.ends if id not in kept]:
        texts = ", ".join(f"{words.id_to_token(id)} ({id})" for id in lost)
        print(
            f"smoljax: note: llama.cpp also ends a text of {args.src} at {texts}; {args.dst} does not", file=sys.stderr
        )
    print(json.dumps(report) if args.json else describe(args.dst, report))
    if args.push:
        try:
            print(hub.push(args.dst, args.push, private=args.private), file=sys.stderr)
        except Error as e:
            again = f"{args.dst} is complete; to push it again: hf upload {args.push} {args.dst}"
            raise type(e)(f"{e}; {again}") from None
    return 0


def write(source, folder, args, dtype: str):
    from smoljax import atomic, checkpoint, exchange, gguf, hf

    if args.to == "hf":
        size = args.max_file_size and int(args.max_file_size * 1e9)
        hf.write(folder, source, dtype, size, args.int8_embedding)
        return
    files = source.files
    if args.to == "gguf":  # which holds the tokenizer itself
        name = Path(args.dst).absolute().name
        gguf.write(folder / f"{name}-{gguf.TYPES[dtype]}.gguf", source, dtype, name)
        files = {name: files[name] for name in ("README.md", "LICENSE") if name in files}
    else:
        checkpoint.save_model(folder, exchange.assemble(source, dtype), source.config)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)  # additional_chat_templates/
        atomic.write(folder / name, content)


def describe(dst: str, report: dict) -> str:
    file = next(Path(dst).glob("*.gguf"), dst)
    lines = [
        f"wrote {file}: {report['parameters']:,} parameters in {report['dtype']}, {report['route']}, "
        f"in {report['seconds']} s with {report['peak_memory_mb']:,} MB"
    ]
    if "tensors" in report:
        t, theirs, logits = report["tensors"], report["transformers"], report["logits"]
        rounded = "" if report["bits"] == "exact" else f", rounded to {report['dtype']}"
        if "bytes" in report:
            mb = {what: f"{size / 1e6:.2f} MB" for what, size in report["bytes"].items()}
            lines.append(f"weights {mb['weights']}, scales {mb['scales']}, total {mb['total']}")
            rounded = "" if report["bits"] == "exact" else ", rounded to bfloat16, the others within half a step"
        lines.append(
            f"read back: {t['exact']} of {t['count']} tensors are exactly the source's{rounded}, "
            f"difference up to {t['largest_difference']:.3g}"
        )
        lines.append(
            f"logits differ by up to {logits['largest_difference']:.3g} on {logits['tokens']} tokens; "
            f"loss {report['loss']['source']:.4f} before, {report['loss']['written']:.4f} after"
        )
        what = f"logits differ by up to {theirs['largest_difference']:.3g}" if isinstance(theirs, dict) else theirs
        lines.append(f"transformers: {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run(main))
