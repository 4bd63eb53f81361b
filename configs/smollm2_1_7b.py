"""SmolLM2-1.7B: 11T tokens in four mixtures at 2,048 tokens a row, the last 75B of them at 8,192.

    smoljax pretrain smollm2-1-7b

Published (nanotron configuration; the SmolLM2 paper for mixtures and extension): every number below but the ones marked
as ours or as a guess. It took 256 H100 about 140,000 GPU-hours. The released base model has zero-shot: HellaSwag 68.7,
ARC 60.5, PIQA 77.6, WinoGrande 59.4, OpenBookQA 42.2, TriviaQA 36.7, MMLU-Pro 19.4; GSM8K (5-shot) 31.0. A loss curve
was not published; the paper tells of a spike in stage 3 that stayed when its data was skipped, for no known reason.
smollm2_1_7b_8k.py is the last stage as a run of its own.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Heldout, Optim, Stage, Train

# By dataset. The paper gives shares of web, code, mathematics and synthetic text; where it does not print how a share
# divides, that is a guess, made in proportion to the sizes: no set is then read more than 5 times, but OpenWebMath.
STAGE_1 = {  # 0 to 6T tokens: 90% web, FineWeb-Edu 60 : DCLM 40
    "shards/fineweb-edu": 0.54,
    "shards/dclm": 0.36,
    "shards/starcoderdata": 0.10,
}
STAGE_2 = {  # 6 to 8T: 75% web, 60 : 40
    "shards/fineweb-edu": 0.45,
    "shards/dclm": 0.30,
    "shards/starcoderdata": 0.20,
    "shards/open-web-math": 0.05,
}
STAGE_3 = {  # 8 to 10T: 74% web, 40 : 60; 16% code; 10% mathematics
    "shards/fineweb-edu": 0.296,
    "shards/dclm": 0.444,
    "shards/stack-edu": 0.135,  # guess: what is left of the 16%
    "shards/starcoder2data": 0.015,  # guess: the six languages of which Stack-Edu has below 4B, 13B of its 157B
    "shards/jupyter": 0.01,  # guess
    "shards/infimm-webmath": 0.08,  # guess: 40B tokens, to
    "shards/open-web-math": 0.02,  # guess: 12B
}
STAGE_4 = {  # 10 to 11T, the decay: 58% web, 24% code, 14% mathematics, 4% synthetic
    "shards/fineweb-edu": 0.232,  # guess: still 40 : 60; the paper says that DCLM kept the larger part
    "shards/dclm": 0.348,  # guess
    "shards/stack-edu": 0.24,
    "shards/infi-webmath-3plus": 0.093,  # guess: 20.5B tokens, to
    "shards/finemath-4plus": 0.046,  # guess: 10B
    "shards/open-web-math": 0.0008,
    "shards/auggsm8k": 0.0002,
    "shards/cosmopedia-v2": 0.04,
}
LONG = {  # documents of 8,192 tokens or more
    "shards/dolma-books-8k": 0.20,
    "shards/dclm-8k": 0.10,
    "shards/fineweb-edu-8k": 0.10,
}

config = Train(
    # Trained with interleaved rotary pairs, released with half-split ones: the converter permutes q and k, so for a
    # fresh model the two are the same thing under another order of random weights.
    model=replace(SIZES["smollm2-1.7b"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=5_240_000,  # x 2,097,152 tokens = 10.989T
    data=Data(
        sources=STAGE_1,
        seq_len=2048,
        batch_size=1024,  # rows: 256 replicas x 4 rows; x 2,048 = 2,097,152 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        # The paper aimed at 4 to 5 readings of a set. Its own stage 2 is beyond that: 5% of 2T tokens is 100B of
        # OpenWebMath, whose 12B are read 8 times. Bring more of it, or say data.max_epochs=12.
        max_epochs=5.0,
        seed=8,
    ),
    stages=(  # an update is 2,097,152 tokens; a stage begins with the first one at or beyond its boundary
        Stage(start=2_861_023, sources=STAGE_2),  # 6e12 / 2,097,152 = 2,861,022.95
        Stage(start=3_814_698, sources=STAGE_3),  # 8e12 / 2,097,152 = 3,814,697.27
        Stage(start=4_768_372, sources=STAGE_4),  # 1e13 / 2,097,152 = 4,768,371.58; the decay began at 9.89T
        Stage(
            start=5_204_000,  # 36,000 steps x 2,097,152 tokens = 75.5B before the end; implied, not stated
            sources={name: 0.6 * weight for name, weight in STAGE_4.items()} | LONG,
            seq_len=8192,  # rows of a step: 256, as many tokens as before; guess
            rope_theta=130_000.0,
        ),
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
    heldout=Heldout(every=100),  # val_check_interval; name the sets in heldout.sets: theirs are not published
    init_std=0.02,
    seed=42,
    save_every=2000,
    keep_every=524_000,  # ours: ten for good, the ninth is the decay's start
    keep=20,  # ours: so that step 5,204,000, where the 8k stage begins, is still there at the end; 20.5 GB each
    # Ours: memory, not mathematics. 32 micro-batches are 32 rows each, the published 4 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 256 / N. Weights, two moments and gradients are 16 B a parameter,
    # 27 GB: the default mesh splits them over all devices.
    accumulate=32,
    compute=Compute(dtype="bfloat16"),
)
