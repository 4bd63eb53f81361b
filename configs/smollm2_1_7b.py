"""SmolLM2-1.7B: 11T tokens at 2,048 tokens a row; smollm2_1_7b_8k.py replaces the last 75B of them at 8,192.

    smoljax pretrain smollm2-1-7b

Published (nanotron configuration): every number below but the ones marked as ours. It took 256 H100 about 140,000
GPU-hours. The released base model, context extended, has zero-shot: HellaSwag 68.7, ARC 60.5, PIQA 77.6, WinoGrande
59.4, OpenBookQA 42.2, TriviaQA 36.7, MMLU-Pro 19.4; GSM8K (5-shot) 31.0. A loss curve was not published.
Not as published: the run had four mixtures, changed at 6T, 8T and 10T tokens; this file has one source, as the
configuration prints it, and the corpus is not released. The paper's first stage is 90% web (FineWeb-Edu 60 : DCLM 40)
and 10% StarCoderData: 'data.sources={"shards/fineweb-edu": 0.54, "shards/dclm": 0.36, "shards/starcoderdata": 0.1}'.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Optim, Train

config = Train(
    # Trained with interleaved rotary pairs, released with half-split ones: the converter permutes q and k, so for a
    # fresh model the two are the same thing under another order of random weights.
    model=replace(SIZES["smollm2-1.7b"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=5_240_000,  # x 2,097,152 tokens = 10.989T
    data=Data(
        sources={"shards/smollm2-corpus": 1.0},
        seq_len=2048,
        batch_size=1024,  # rows: 256 replicas x 4 rows; x 2,048 = 2,097,152 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        seed=8,
    ),
    optim=Optim(
        lr=5e-4,
        warmup_steps=2000,
        decay_steps=524_000,  # from step 4,716,000: the last 10%
        decay="linear",
        min_lr=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        weight_decay_on="all",  # nanotron's list of exceptions was empty: norms and the embedding decay too
        clip=1.0,
    ),
    init_std=0.02,
    seed=42,
    save_every=2000,
    keep_every=524_000,  # ours: ten for good, the ninth is the decay's start
    keep=20,  # ours: so that step 5,204,000, where the 8k extension begins, is still there at the end; 20.5 GB each
    # Ours: memory, not mathematics. 32 micro-batches are 32 rows each, the published 4 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 256 / N. Weights, two moments and gradients are 16 B a parameter,
    # 27 GB: the default mesh splits them over all devices. Attention keeps scores of 4 rows x 32 heads x 2048^2 x 4 B
    # = 2.1 GB a layer, times 24 layers: remat keeps one layer's at a time.
    accumulate=32,
    compute=Compute(dtype="bfloat16", remat=True),
)
