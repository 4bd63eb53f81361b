"""SmolLM2-360M: 4.1T tokens at 2,048 tokens a row; smollm2_360m_8k.py then extends the context.

    smoljax pretrain smollm2-360m

Published (nanotron configuration): every number below but the ones marked as ours. It took 128 H100 about 20,000
GPU-hours. The released base model, context extended, has zero-shot: HellaSwag 54.5, ARC 53.0, PIQA 71.7, MMLU cloze
35.8, WinoGrande 52.5, OpenBookQA 37.4, TriviaQA 16.9. A loss curve was not published.
It had one stage. The corpus is not released and the weights of its mixture are not published; the paper names its
parts: DCLM filtered by the FineWeb-Edu classifier, Stack-Edu, InfiMM-WebMath, FineMath, Cosmopedia. Set data.sources to
what you have; any weights are your guess.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Heldout, Optim, Train

config = Train(
    model=replace(SIZES["smollm2-360m"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=2_600_000,  # x 1,572,864 tokens = 4.089T
    data=Data(
        sources={"shards/smollm2-corpus": 1.0},
        seq_len=2048,
        batch_size=768,  # rows: 128 replicas x 6 rows; x 2,048 = 1,572,864 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        seed=8,
    ),
    optim=Optim(
        lr=3e-3,
        warmup_steps=2000,
        decay_steps=520_000,  # from step 2,080,000: the last 20%
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
    init_std=0.03227,  # about 1/sqrt(960)
    seed=8,
    save_every=2000,
    keep_every=160_000,  # as released; the decay's start is the 13th
    # Ours: memory, not mathematics. 16 micro-batches are 48 rows each, the published 6 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 128 / N.
    accumulate=16,
    compute=Compute(dtype="bfloat16"),
)
