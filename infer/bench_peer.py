"""The other side of the duel: transformers' LlamaForCausalLM.generate, in a process of its own.

Started by infer/bench.py, which says on stdin, a JSON line each, what to do, and reads a JSON line for each on stdout:
first the folder, the prompts, {"dtype": "float32" | "bfloat16", "compile": false | true}, then {"new_tokens": n,
"exact": false | true}. It imports nothing of smoljax. On a GPU "compile" is the static cache, under which generate
compiles a token's step.
"""

import json
import os
import sys
import time


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch's compiler prints is no answer
    setup = json.loads(sys.stdin.readline())
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if setup["platform"] == "gpu" else "cpu"
    model = transformers.LlamaForCausalLM.from_pretrained(setup["folder"], dtype=getattr(torch, setup["dtype"]))
    model = model.to(device).eval()
    # No id ends a row, so that a run is as long as it is asked to be: as our engine with eos=().
    model.generation_config = transformers.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    ids = torch.tensor(setup["prompts"], dtype=torch.long, device=device)
    asked_for = {"attention_mask": torch.ones_like(ids)}
    if setup["compile"]:
        asked_for["cache_implementation"] = "static"

    def generate(n: int, **more):
        with torch.inference_mode():
            return model.generate(ids, **asked_for, min_new_tokens=n, max_new_tokens=n, **more)

    def likeliest(n: int, count: int) -> list:
        """Log-probabilities of so many likeliest tokens, for each row and new token."""
        logits = torch.stack(generate(n, return_dict_in_generate=True, output_logits=True).logits, dim=1)
        return logits.float().log_softmax(-1).topk(count).values.tolist()

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        generate(2)
        begun = time.perf_counter()
        generate(6)
        return time.perf_counter() - begun

    def say(answer: dict):
        print(json.dumps(answer), file=answers, flush=True)

    if device == "cpu":  # where others are at work, threads that wait for each other can take ten times as long as one
        torch.set_num_threads(min({1, setup["threads"] // 2 or 1, setup["threads"]}, key=seconds))
    say({"versions": {"torch": torch.__version__, "transformers": transformers.__version__}})
    for line in sys.stdin:
        asked = json.loads(line)
        n = asked["new_tokens"]
        # TF32, as XLA's default is on a GPU; a CPU knows one f32
        torch.set_float32_matmul_precision("highest" if asked["exact"] or device == "cpu" else "high")
        begun, used = time.perf_counter(), time.process_time()
        if "likeliest" in asked:
            say({"likeliest": likeliest(n, asked["likeliest"])})
            continue
        rows = generate(n)[:, ids.shape[1] :].tolist()  # waits for the device
        answer = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - used, "tokens": rows}
        answer["threads"] = torch.get_num_threads()
        assert all(len(row) == n for row in rows), [len(row) for row in rows]
        if device == "cuda":
            answer["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        say(answer)


if __name__ == "__main__":
    main()
