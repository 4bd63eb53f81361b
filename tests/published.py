"""Small models in the files that people publish: a Hugging Face folder, and llama.cpp's file with other keys."""

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from infer import convert
from smoljax import tokenizer
from smoljax.exchange import shapes
from smoljax.hf_config import from_config

SIZE = 300
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "hello, the cat sat on the mat 12 times: <tool> <|im_start|>é <|im_end|>"


def tokenizer_json() -> str:
    with tempfile.TemporaryDirectory() as work:
        tokenizer.train([TEXT * 9, "and the dog said hello to the assistant user"] * 4, SIZE, f"{work}/tokenizer.json")
        return Path(work, "tokenizer.json").read_text()


def folder(path: Path, files: dict | None = None, rows: int = SIZE, template: str | None = CHATML, **config) -> Path:
    """A folder with a random model of one layer; `files` are written as JSON, or as they are where they are text."""
    path.mkdir(parents=True)
    keys = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", tie_word_embeddings=True, hidden_act="silu",
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=rows, max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-5, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    keys |= config
    named = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>")
    settings = named | dict(tokenizer_class="PreTrainedTokenizerFast")
    found = {"config.json": keys, "tokenizer_config.json": settings, "tokenizer.json": tokenizer_json()}
    found |= {} if template is None else {"chat_template.jinja": template}
    for name, content in (found | (files or {})).items():
        if content is not None:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes(from_config(keys)).items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def words(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def gguf_file(path: Path, keys: dict | None = None, drop: tuple = (), source: Path | None = None, **given) -> Path:
    """A folder as llama.cpp's file, with other keys: name -> (value, its type, an array's elements'), less `drop`."""
    keys = keys or {}
    with tempfile.TemporaryDirectory() as work:
        source = source or folder(Path(work, "hf"), **given)
        convert.main([str(source), f"{work}/out", "--to", "gguf", "--dtype", "float32"])
        (plain,) = Path(work, "out").glob("*.gguf")
        reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(path, "llama")
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", *drop, *keys):
                continue
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        for name, (value, kind, *inner) in keys.items():
            writer.add_key_value(name, value, kind, sub_type=inner[0] if inner else None)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path
