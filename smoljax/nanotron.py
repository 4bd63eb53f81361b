"""nanotron's checkpoints, in: the layout of HuggingFaceTB/SmolLM2-nanotron-ckpt, and the only file that knows it.

    FOLDER/model_config.json  the fields of nanotron's LlamaConfig
    FOLDER/model/model/decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors
    FOLDER/model/model/final_layer_norm/pp_block/model_weight.safetensors

A file is one parameter, or the slices of it that a tensor-parallel rank had and that the file's metadata name. Rows of
q, k and v, and of gate and up, are one parameter; the tied head is the embedding's. With rope_interleaved the rows of q
and k stand, head by head, in the order 0, H/2, 1, H/2 + 1, ... of Hugging Face's.
From huggingface/nanotron: src/nanotron/serialize/weights.py @0c9e8979, utils.py @b9537301, metadata.py @a3419235 and
@1c377d1d, parallel/parameters.py @01de8d94, parallel/sharded_parameters.py @283b28d1, trainer.py @004a89ca,
config/models_config.py @025f3141, examples/llama/convert_nanotron_to_hf.py @e60dec2e.
Not read: Adam's moments, and the f32 copies of bfloat16 weights beside them. optimizer/optimizer_pp-*_tp-*_exp-*.pt
(ZeRO-1 adds _dp-*) is torch.save of optimizer.state_dict() (serialize/optimizer.py @6b2ff650), a pickle: it can run
code. So can lr_scheduler/*.pt and random/*.pt.
Checked against files made as that source makes them, not against the published ones. That those have a
model_config.json, and nothing below model/ but the parameters, is what nanotron's trainer and converter say.
"""

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable
from itertools import accumulate, combinations
from pathlib import Path

import numpy as np

from smoljax import companions, exchange, tensors
from smoljax.config import Model
from smoljax.errors import DataError
from smoljax.exchange import Source
from smoljax.hf import some
from smoljax.hf_config import from_config, read_json

CONFIG = "model_config.json"
# A parameter -> Hugging Face's tensors, whose rows it holds one below the other.
OUTER = {"token_position_embeddings/pp_block/token_embedding": ["embed_tokens"], "final_layer_norm/pp_block": ["norm"]}
LAYER = {name: [name] for name in ("input_layernorm", "post_attention_layernorm")}
LAYER |= {"attn/qkv_proj": [f"self_attn.{part}_proj" for part in "qkv"], "attn/o_proj": ["self_attn.o_proj"]}
LAYER |= {"mlp/gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "mlp/down_proj": ["mlp.down_proj"]}
WHOLE = "model_weight.safetensors"  # of a parameter that tensor parallelism does not divide
SHARD = re.compile(r"model_weight_pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+\.safetensors", re.ASCII)
# LlamaConfig's fields: a config.json's, and those that say nothing about the mathematics of a trained model.
FIELDS = {field.name for field in dataclasses.fields(Model)} - {"head_dim"}  # which is hidden_size / heads there
FIELDS |= {"hidden_act", "attention_bias", "rope_scaling", "tie_word_embeddings"}
KNOWN = FIELDS | {"is_llama_config", "pretraining_tp", "use_cache", "_attn_implementation", "z_loss_enabled"}
KNOWN |= {"z_loss_coefficient"}
Box = tuple[slice, ...]  # of each axis, with start and stop
log = logging.getLogger("smoljax")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is meant as nanotron's; `open_source` says what it lacks."""
    return (folder / "model/model").is_dir()


def open_source(folder: Path) -> Source:
    """A checkpoint with its config read and all its headers checked; the numbers are read by Source.tensor."""
    folder = Path(folder)
    config, interleaved = read_config(folder)
    shapes, where, dtypes = exchange.shapes(config), {}, []  # where: a tensor -> its parameter, its rows there
    for paths, parts in find_files(folder, config):
        ends = [0, *accumulate(shapes[part][0] for part in parts)]
        whole, dtype = open_parameter(paths, (ends[-1], *shapes[parts[0]][1:]))
        where |= {part: (whole, slice(*ends[i : i + 2])) for i, part in enumerate(parts)}
        dtypes.append(dtype)

    def get(name: str) -> np.ndarray:
        whole, rows = where[name]
        array = whole()[rows]
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = array.reshape(-1, config.head_dim // 2, 2, config.hidden_size)
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    for file in sorted(folder.glob("optimizer/*.pt"))[:1]:
        log.warning(f"{file}: optimizer state is a pickle, not read; training restarts its moments")
    return Source(config, exchange.widest(dtypes), get, f"nanotron checkpoint {folder}", companions.read(folder))


def read_config(folder: Path) -> tuple[Model, bool]:
    """The Model, and whether the rows of q and k are interleaved."""
    path, meta, yaml = (inside(folder, name) for name in (CONFIG, "checkpoint_metadata.json", "config.yaml"))
    found, version = read_json(path), str(read_json(meta).get("version")) if meta.is_file() else "1.2"
    if found.get("is_llama_config") is not True:
        raise DataError(f"{path}: is_llama_config is not true; smoljax reads nanotron's LlamaForTraining only")
    interleaved = found.pop("rope_interleaved", "absent")
    if type(interleaved) is not bool:
        raise DataError(
            f"{path}: rope_interleaved is {interleaved!r:.80}, expected true or false; add it: true if trained before "
            "August 2024, when nanotron had interleaved only, else as trained"
        )
    unknown = [f"{k!r:.80}" for k, v in found.items() if k not in KNOWN and v is not None and v is not False]
    if unknown:
        raise DataError(f"{path}: {some(unknown)} unknown here; remove what leaves the mathematics as they are")
    if not re.fullmatch(r"1\.([2-9]|\d\d+)(\.\d+)*", version):
        raise DataError(f"{meta}: the format's version is {version!r:.80}, expected 1.2 or a later 1.x")
    if yaml.is_file():  # muP divides the scores by H, not by its root, and model_config.json does not say so
        with open(yaml, "rb") as file:
            if re.search(rb"^\s*use_mup: *true", file.read(1 << 20), re.I | re.M):
                raise DataError(f"{yaml}: use_mup is true; smoljax has the standard scale of attention only")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return from_config(llama | {k: v for k, v in found.items() if k in FIELDS}, str(path)), interleaved


def find_files(folder: Path, config: Model) -> list[tuple[list[Path], list[str]]]:
    """For each parameter its files and Hugging Face's tensors in it, where model/ holds them and nothing else."""
    expected = {f"model/model/{name}": [f"model.{part}.weight" for part in parts] for name, parts in OUTER.items()}
    for i in range(config.num_hidden_layers):
        for name, parts in LAYER.items():
            expected[f"model/model/decoder/{i}/pp_block/{name}"] = [f"model.layers.{i}.{part}.weight" for part in parts]
    files, extra = {}, []
    for parent, folders, names in os.walk(inside(folder, "model")):
        name = Path(parent).relative_to(folder).as_posix()
        for file in names + [f for f in folders if os.path.islink(Path(parent, f))]:  # which walk does not enter
            if name in expected and (file == WHOLE or SHARD.fullmatch(file)):
                files.setdefault(name, []).append(inside(folder, f"{name}/{file}"))
            else:
                extra.append(f"{name}/{file}")
    missing = [name for name in expected if name not in files]
    if missing or extra:
        raise DataError(f"{folder}: by {CONFIG}, missing: {some(missing)}; not expected: {some(sorted(extra))}")
    return [(sorted(files[name]), parts) for name, parts in expected.items()]


def open_parameter(paths: list[Path], shape: tuple[int, ...]) -> tuple[Callable[[], np.ndarray], str]:
    """One parameter: what reads all of it, mapped where it is one file as it stands, and its dtype."""
    pieces, dtypes = [], []
    for path in paths:
        file = tensors.open_file(path)
        code, own = file.entries.get("data", ("", ()))
        if code not in tensors.NUMPY or len(file.entries) > 1:
            held = some([f"{name!r:.80} ({code})" for name, (code, _) in file.entries.items()])
            raise DataError(f"{path} holds {held}; expected one tensor, data, that is {' or '.join(tensors.NUMPY)}")
        pieces += [(file, here, there) for here, there in slices(file, own, shape)]
        dtypes.append(tensors.NUMPY[code].name)
    if not tiles([there for _, _, there in pieces], shape):
        raise DataError(f"{paths[0].parent} lacks or repeats a part of {list(shape)}; expected each tp-rank once")
    dtype = exchange.widest(dtypes)

    def whole() -> np.ndarray:
        if len(paths) == 1 and all(here == there for _, here, there in pieces):
            return pieces[0][0].get("data")
        array = np.empty(shape, dtype)
        for file, here, there in pieces:
            array[there] = file.get("data")[here]
        return array

    return whole, dtype


def slices(file: tensors.File, own: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[Box, Box]]:
    """A rank's local_global_slices_pairs: "HERE#THERE;...", each side "start,stop,step|..." by axis, None its end."""
    text, whole = file.metadata.get("local_global_slices_pairs", ""), file.metadata.get("unsharded_shape", "absent")
    if file.path.name == WHOLE:  # which says neither
        text, whole = "#".join(["|".join(["None,None,None"] * len(own))] * 2), str(own)
    sizes = re.findall(r"\d{1,18}", whole.replace("np.int64", ""))  # numpy 2 writes (np.int64(9), 64)
    if [int(size) for size in sizes] != list(shape):
        raise DataError(f"{file.path}: the whole tensor's shape is {whole!r:.80}, but {CONFIG} gives it {list(shape)}")
    try:
        sides = [pair.split("#") for pair in text.split(";", 16)]  # nanotron has 3 at most
        pairs = [(box(here, own), box(there, shape)) for here, there in sides]
        same = all(s.stop - s.start == t.stop - t.start for one in pairs for s, t in zip(*one, strict=True))
    except ValueError:
        same = False
    if not same or not tiles([here for here, _ in pairs], own):
        raise DataError(f"{file.path}: local_global_slices_pairs {text!r:.200} do not map {own} into {shape}")
    return pairs


def box(text: str, shape: tuple[int, ...]) -> Box:
    found = []
    for axis, size in zip(text.split("|"), shape, strict=True):
        start, stop, step = axis.split(",")
        found.append(slice(0 if start == "None" else int(start), size if stop == "None" else int(stop)))
        if step not in ("None", "1") or not 0 <= found[-1].start < found[-1].stop <= size:
            raise ValueError(text)
    return tuple(found)


def tiles(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes, all inside a shape, hold each of its places once: as many places, and no two boxes the same."""
    if len(boxes) > 4096 or sum(math.prod(s.stop - s.start for s in one) for one in boxes) != math.prod(shape):
        return False
    pairs = (zip(one, other, strict=True) for one, other in combinations(boxes, 2))
    return not any(all(a.start < b.stop and b.start < a.stop for a, b in pair) for pair in pairs)


def inside(folder: Path, name: str) -> Path:
    """A path in the folder; a DataError where a link leads out of it, but for the hub's cache, all links to blobs/."""
    path, home = folder / name, Path(os.path.realpath(folder))
    blobs = [p.parent.parent / "blobs" for p in (home, *home.parents) if p.parent.name == "snapshots"]
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(allowed) for allowed in (home, *blobs)):
        raise DataError(f"{path} is a link to {real}, outside the folder; put a copy of the file there")
    return path
