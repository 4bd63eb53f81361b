"""The other side of the duel: transformers' LlamaForCausalLM and torch's AdamW, in a process of their own.

Started by train/bench.py, which says on stdin, a JSON line each, what to do, and reads a JSON line for each on stdout:
first the model and {"kind": "eager" | "compile"}, then {"first": n, "steps": k}. It imports nothing of smoljax.
"""

import json
import os
import sys
import time


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch's compiler prints is no answer
    setup = json.loads(sys.stdin.readline())
    import numpy as np
    import torch
    import transformers

    device = "cuda" if setup["platform"] == "gpu" else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as XLA's default is there
    if cores := setup.get("threads"):
        torch.set_num_threads(cores)
    model = load(setup, np.load(setup["weights"]), transformers, torch).to(device)
    call = torch.compile(model) if setup["kind"] == "compile" else model
    o = setup["optim"]
    adam = torch.optim.AdamW(
        model.parameters(), betas=(o["b1"], o["b2"]), eps=o["eps"], weight_decay=o["weight_decay"], fused=True
    )

    def step(n: int) -> float:
        shape, V = (setup["batch"], setup["seq"] + 1), setup["model"]["vocab_size"]
        ids = np.random.default_rng(n).integers(0, V, shape, np.int32)  # as measure.random_batch
        ids = torch.tensor(ids, dtype=torch.long, device=device)
        for group in adam.param_groups:
            group["lr"] = setup["lr"][n]
        with torch.autocast(device, torch.bfloat16, enabled=setup["dtype"] == "bfloat16"):
            logits = call(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])
        adam.step()
        adam.zero_grad()
        return loss.detach()

    def say(answer: dict):
        print(json.dumps(answer), file=answers, flush=True)

    say({"versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
    for line in sys.stdin:
        asked = json.loads(line)
        if device == "cuda":
            torch.cuda.synchronize()
        begun, used = time.perf_counter(), time.process_time()
        losses = [step(n) for n in range(asked["first"], asked["first"] + asked["steps"])]
        losses = [loss.item() for loss in losses]
        if device == "cuda":
            torch.cuda.synchronize()
        k = asked["steps"]
        answer = {"wall": (time.perf_counter() - begun) / k, "cpu": (time.process_time() - used) / k, "losses": losses}
        if device == "cuda":
            answer["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        say(answer)


def load(setup: dict, weights, transformers, torch):
    """The model, f32, with smoljax's weights: theirs are [out, in], with heads and head size in one axis."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**setup["model"], tie_word_embeddings=True))
    D = setup["model"]["hidden_size"]
    own = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    for i in range(setup["model"]["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name in "qkv":
            own[f"{at}self_attn.{name}_proj.weight"] = weights[name][i].reshape(D, -1).T
        own[f"{at}self_attn.o_proj.weight"] = weights["o"][i].reshape(-1, D).T
        for name in ("gate", "up", "down"):
            own[f"{at}mlp.{name}_proj.weight"] = weights[name][i].T
        own[f"{at}input_layernorm.weight"] = weights["attn_norm"][i]
        own[f"{at}post_attention_layernorm.weight"] = weights["mlp_norm"][i]
    missing, unexpected = model.load_state_dict({k: torch.tensor(v) for k, v in own.items()}, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


if __name__ == "__main__":
    main()
