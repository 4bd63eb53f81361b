"""SmolLM2-135M's context from 2,048 to 8,192 tokens, after smollm2_135m.py: another theta and longer rows.

    smoljax pretrain smollm2-135m-8k

Published: that it was done, the length and theta = 100,000 (the released config.json). Our guess: all the rest, which
follows what the paper says of the 1.7B model, 75B tokens with 40% of them from documents of 8,192 tokens or more.
Expected: at positions below 2,048 the loss is what it was; beyond, it keeps falling slowly instead of exploding
(`smoljax evaluate` shows both). Published for the result: the scores in smollm2_135m.py.
"""

from smoljax.config import SIZES, Compute, Data, Optim, Train

config = Train(
    model=SIZES["smollm2-135m"],  # rope_theta 100,000, 8,192 positions
    init_from="runs/smollm2_135m",
    steps=72_000,  # x 1,048,576 tokens = 75.5B; guess
    data=Data(
        sources={  # guess: the paper's mixture for the 1.7B; "-8k" are the documents of 8,192 tokens or more
            "shards/smollm2-corpus": 0.60,
            "shards/dolma-books-8k": 0.20,
            "shards/dclm-8k": 0.10,
            "shards/fineweb-edu-8k": 0.10,
        },
        seq_len=8192,
        batch_size=128,  # rows; x 8,192 = 1,048,576 tokens, as in pretraining; guess
        mask_documents=False,
        seed=8,
    ),
    optim=Optim(
        lr=2e-4,  # guess: 7% of the peak, as where the 1.7B model's decay stood 75B tokens before its end
        warmup_steps=1000,  # guess: Adam's moments start from nothing
        decay_steps=71_000,  # guess: all the rest
        decay="linear",
    ),
    save_every=2000,
    # 8 micro-batches are 16 rows each, 2 a GPU on one 8-GPU node.
    accumulate=8,
    compute=Compute(dtype="bfloat16"),
)
