"""SmolLM2-135M: 2.1T tokens at 2,048 tokens a row; smollm2_135m_8k.py then extends the context.

    smoljax pretrain smollm2-135m

Published (nanotron configuration): every number below but the ones marked as ours. It took 64 H100 about 5,000
GPU-hours. The released base model, context extended, has zero-shot: HellaSwag 42.1, ARC 43.9, PIQA 68.4, MMLU cloze
31.5, WinoGrande 51.3, OpenBookQA 34.6, TriviaQA 4.1. A loss curve was not published.
It had one stage. The corpus is not released and the weights of its mixture are not published; the paper names its
parts: DCLM filtered by the FineWeb-Edu classifier, Stack-Edu, InfiMM-WebMath, FineMath, Cosmopedia. Set data.sources to
what you have; any weights are your guess.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Heldout, Optim, Train

config = Train(
    model=replace(SIZES["smollm2-135m"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=2_000_000,  # x 1,048,576 tokens = 2.097T
    data=Data(
        sources={"shards/smollm2-corpus": 1.0},
        seq_len=2048,
        batch_size=512,  # rows: 64 replicas x 8 rows; x 2,048 = 1,048,576 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        seed=8,
    ),
    optim=Optim(
        lr=3e-3,
        warmup_steps=2000,
        decay_steps=400_000,  # from step 1,600,000: the last 20%
        decay="linear",
        min_lr=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        weight_decay_on="all",  # nanotron's list of exceptions was empty: norms and the embedding decay too
        clip=1.0,
    ),
    heldout=Heldout(every=1000),  # val_check_interval; name the sets in heldout.sets: theirs are not published
    init_std=1 / 24,  # 1/sqrt(576)
    seed=8,
    save_every=2000,
    keep_every=80_000,  # ours; every third is a step that was released (240,000), and the decay's start is one
    # Ours: memory, not mathematics. 8 micro-batches are 64 rows each, the published 8 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 64 / N.
    accumulate=8,
    compute=Compute(dtype="bfloat16"),
)
