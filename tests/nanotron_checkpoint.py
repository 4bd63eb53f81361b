"""A small checkpoint as nanotron writes it, from Hugging Face's tensors: no line of smoljax/nanotron.py is used.

What huggingface/nanotron does on each rank in turn, with numpy in torch's place; each function names its original.
"""

import json
import os
import pickle
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

EMBEDDING = "model.token_position_embeddings.pp_block.token_embedding.weight"
HEAD = "model.lm_head.pp_block.weight"


def interleave_weight(w, d_qk):
    """examples/llama/convert_hf_to_nanotron.py @004f241d: half-split rows -> interleaved, head by head."""
    heads = [w[i : i + d_qk] for i in range(0, len(w), d_qk)]  # w.split(d_qk)
    heads = [h.reshape(2, d_qk // 2, -1).transpose(1, 0, 2).reshape(d_qk, -1) for h in heads]
    return np.concatenate(heads)


def state_dict(config, tensors, interleaved):
    """convert_hf_to_nt there, with the names of get_weight_mapping in convert_weights.py @004f241d: unsharded."""
    d_qk = config.hidden_size // config.num_attention_heads
    found = {EMBEDDING: tensors["model.embed_tokens.weight"]}
    for i in range(config.num_hidden_layers):
        nt, hf = f"model.decoder.{i}.pp_block", f"model.layers.{i}"
        q, k, v = (tensors[f"{hf}.self_attn.{part}_proj.weight"] for part in "qkv")
        q = interleave_weight(q, d_qk) if interleaved else q
        k = interleave_weight(k, d_qk) if interleaved else k
        found[f"{nt}.input_layernorm.weight"] = tensors[f"{hf}.input_layernorm.weight"]
        found[f"{nt}.attn.qkv_proj.weight"] = np.concatenate([q, k, v])
        found[f"{nt}.attn.o_proj.weight"] = tensors[f"{hf}.self_attn.o_proj.weight"]
        found[f"{nt}.post_attention_layernorm.weight"] = tensors[f"{hf}.post_attention_layernorm.weight"]
        gate, up = tensors[f"{hf}.mlp.gate_proj.weight"], tensors[f"{hf}.mlp.up_proj.weight"]
        found[f"{nt}.mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
        found[f"{nt}.mlp.down_proj.weight"] = tensors[f"{hf}.mlp.down_proj.weight"]
    found["model.final_layer_norm.pp_block.weight"] = tensors["model.norm.weight"]
    found[HEAD] = found[EMBEDDING]  # tied: one parameter under two names
    return found


def split_config(config, name):
    """(split_dim, contiguous_chunks) as models/llama.py @4796d2d9 and tensor_parallel/nn.py @06e17bcb say them."""
    d_qk = config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * d_qk, config.num_key_value_heads * d_qk
    if "qkv_proj" in name:  # TensorParallelColumnLinear(contiguous_chunks=qkv_contiguous_chunks)
        return 0, (q, kv, kv)
    if "gate_up_proj" in name:
        return 0, (config.intermediate_size, config.intermediate_size)
    if "o_proj" in name or "down_proj" in name:  # TensorParallelRowLinear
        return 1, None
    if "embedding" in name or "lm_head" in name:  # TensorParallelEmbedding, TensorParallelColumnLinear
        return 0, None
    return None  # TritonRMSNorm: not sharded


def shard(whole, tp, rank, split_dim, contiguous_chunks):
    """A rank's tensor and create_sharded_parameter_from_config of parallel/sharded_parameters.py @283b28d1."""
    ndim = whole.ndim

    def only_there(one):
        return tuple(one if dim == split_dim else slice(None) for dim in range(ndim))

    if contiguous_chunks is None:
        length = whole.shape[split_dim] // tp
        global_slice = slice(rank * length, (rank + 1) * length)
        local = whole[only_there(global_slice)]
        pairs = [(only_there(slice(None)), only_there(global_slice))]
        shape = tuple(tp * size if dim == split_dim else size for dim, size in enumerate(local.shape))
        return local, pairs, shape
    chunks_global_offset = np.cumsum((0,) + contiguous_chunks)
    chunks_local_offset = chunks_global_offset // tp
    pairs, locals_ = [], []
    for i, chunk in enumerate(contiguous_chunks):
        assert chunk % tp == 0
        length, start = chunk // tp, chunks_global_offset[i]
        global_slice = slice(rank * length + start, (rank + 1) * length + start)
        locals_.append(whole[only_there(global_slice)])
        pairs.append((only_there(slice(chunks_local_offset[i], chunks_local_offset[i + 1])), only_there(global_slice)))
    local = np.concatenate(locals_, axis=split_dim)
    shape = tuple(chunks_global_offset[-1] if dim == split_dim else size for dim, size in enumerate(local.shape))
    return local, pairs, shape  # numpy's int64 among the sizes, as there


def to_str_dict(version, pairs, shape):
    """TensorMetadata.to_str_dict of serialize/metadata.py @a3419235, SlicesPair of parallel/parameters.py @01de8d94."""

    def slice_to_str(s):
        return ",".join(str(x) if x is not None else "None" for x in (s.start, s.stop, s.step))

    texts = [f"{'|'.join(map(slice_to_str, here))}#{'|'.join(map(slice_to_str, there))}" for here, there in pairs]
    return {
        "version": version,
        "local_global_slices_pairs": ";".join(texts),
        "unsharded_shape": str(tuple(shape)),  # under numpy 2 "(np.int64(120), 72)", under 1 "(120, 72)"
    }


def get_path(tensor_name, rank_and_size):
    """serialize/utils.py @b9537301."""
    *folders, name = tensor_name.split(".")
    if rank_and_size:
        (tp_rank, tp_size), (pp_rank, pp_size) = rank_and_size
        name = f"model_{name}_pp-rank-{pp_rank}-of-{pp_size}_tp-rank-{tp_rank}-of-{tp_size}.safetensors"
    else:
        name = f"model_{name}.safetensors"
    return Path(*folders, name)


def model_config(config, interleaved):
    """asdict(LlamaConfig) of config/models_config.py @025f3141, which trainer.py @004a89ca writes."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "is_llama_config": True,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "attention_bias": False,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "rope_interleaved": interleaved,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "_attn_implementation": "flash_attention_2",
        "z_loss_enabled": False,
        "z_loss_coefficient": 0.0001,
    }


class Touch:
    """What a hostile pickle is: whoever loads it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save(folder, config, tensors, tp=1, pp=1, interleaved=False, dtype="float32", version="1.4", numpy2=True):
    """save_checkpoint of trainer.py @004a89ca on tp * pp ranks: save_weights of serialize/weights.py @0c9e8979 & co.

    Args:
      tensors: Hugging Face's name -> its tensor.
      numpy2: how the sizes of fused parameters are spelled in the metadata.
    """
    folder = Path(folder)
    assert config.head_dim * config.num_attention_heads == config.hidden_size  # nanotron knows no other
    whole = state_dict(config, {k: np.asarray(v).astype(dtype) for k, v in tensors.items()}, interleaved)
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            for name, tensor in whole.items():
                layer = int(name.split(".")[2]) if "decoder" in name else None
                last = "final_layer_norm" in name or name == HEAD
                if pp_rank != (pp - 1 if last else 0 if layer is None else layer * pp // config.num_hidden_layers):
                    continue  # another pipeline stage's block
                if name == HEAD and pp > 1:
                    continue  # only the first rank of the tied group saves
                base_name = EMBEDDING if name == HEAD else name  # tied_info's name: written twice where pp == 1
                split = split_config(config, name)
                metadata, ranks = {}, None
                if split is None:
                    if tp_rank:
                        continue  # tied across tp: the first rank saves
                else:
                    tensor, pairs, shape = shard(tensor, tp, tp_rank, *split)
                    shape = shape if numpy2 else map(int, shape)
                    metadata, ranks = to_str_dict(version, pairs, shape), ((tp_rank, tp), (pp_rank, pp))
                path = folder / "model" / get_path(base_name, ranks)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"data": np.ascontiguousarray(tensor)}, path, metadata)
    (folder / "model_config.json").write_text(json.dumps(model_config(config, interleaved)))
    stage = {"name": "stable phase", "start_training_step": 1, "consumed_train_samples": 8}
    metas = {"consumed_train_samples": 8, "last_train_step": 1, "last_stage_idx": 0, "data_stages": [stage]}
    meta = {"version": version, "tp": tp, "dp": 1, "metas": metas}  # save_meta of serialize/metadata.py
    (folder / "checkpoint_metadata.json").write_text(json.dumps(meta, indent=2, sort_keys=True))
    (folder / "config.yaml").write_text(
        "model:\n  init_method:\n    std: 0.02\ntokenizer:\n  tokenizer_name_or_path: x\n"
    )
    for name in (f"optimizer/optimizer_pp-0-of-{pp}_tp-0-of-{tp}_exp-0-of-1.pt", "lr_scheduler/lr_scheduler.pt"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(pickle.dumps(Touch(folder / "was-unpickled")))
    (folder / "optimizer/optimizer_config.json").write_text('{"type": "NamedOptimizer"}')
    return folder
