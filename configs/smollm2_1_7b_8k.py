"""SmolLM2-1.7B's context from 2,048 to 8,192 tokens, from another run's checkpoint: another theta and longer rows.

    smoljax pretrain smollm2-1-7b-8k

The same inside one run, with its optimizer's moments and its place in the data, is the last stage of smollm2_1_7b.py.
Published (the SmolLM2 paper, 4.6): theta from 10,000 to 130,000, the length, the mixture, and the start from a
checkpoint before the final 75B tokens of training, so about 75B tokens at 8,192 (implied, not stated). Learning rate
and batch are not stated: ours go on where the decay stood.
Expected: at positions below 2,048 the loss is what it was; beyond, it keeps falling slowly instead of exploding
(`smoljax evaluate` shows both). Published for the result: the scores in smollm2_1_7b.py; HELMET at 8k, average 32.61.
"""

from smoljax.config import SIZES, Compute, Data, Optim, Train

config = Train(
    model=SIZES["smollm2-1.7b"],  # rope_theta 130,000, 8,192 positions
    init_from="runs/smollm2_1_7b/checkpoints/5204000",  # 36,000 steps x 2,097,152 tokens = 75.5B before the end
    steps=36_000,  # those 75.5B tokens; implied
    data=Data(
        sources={  # 60% as in stage 4 of smollm2_1_7b.py, where its guesses are marked
            "shards/fineweb-edu": 0.6 * 0.232,
            "shards/dclm": 0.6 * 0.348,
            "shards/stack-edu": 0.6 * 0.24,
            "shards/infi-webmath-3plus": 0.6 * 0.093,
            "shards/finemath-4plus": 0.6 * 0.046,
            "shards/open-web-math": 0.6 * 0.0008,
            "shards/auggsm8k": 0.6 * 0.0002,
            "shards/cosmopedia-v2": 0.6 * 0.04,
            "shards/dolma-books-8k": 0.20,  # and 40% documents of 8,192 tokens or more
            "shards/dclm-8k": 0.10,
            "shards/fineweb-edu-8k": 0.10,
        },
        seq_len=8192,
        batch_size=256,  # rows; x 8,192 = 2,097,152 tokens, as in pretraining; guess
        mask_documents=False,
        seed=8,
    ),
    optim=Optim(
        lr=3.4e-5,  # guess: 5e-4 x 36,000 / 524,000, where the linear decay stood
        warmup_steps=500,  # guess: Adam's moments start from nothing
        decay_steps=35_500,  # guess: all the rest, to 0 where pretraining's decay would have ended
        decay="linear",
    ),
    save_every=2000,
    # 32 micro-batches are 8 rows each, one a GPU on one 8-GPU node.
    accumulate=32,
    compute=Compute(dtype="bfloat16"),
)
