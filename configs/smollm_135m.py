"""SmolLM-135M: 629B tokens of SmolLM-Corpus and more, 2,048 tokens a row.

    smoljax pretrain smollm-135m

Published (nanotron configuration and model card): every number below but the ones marked as ours. The base model then
has, zero-shot: HellaSwag 41.2, ARC 42.4, PIQA 68.4, MMLU cloze 30.2, WinoGrande 51.3, OpenBookQA 34.0, TriviaQA 4.3.
Hardware: the card says 64 H100, the configuration 32 replicas. A loss curve was not published.
One stage, and its mixture is published.
FineWeb-Edu-dedup, Cosmopedia-v2 and Python-Edu are SmolLM-Corpus; `smoljax prepare` makes each folder of shards.
"""

from dataclasses import replace

from smoljax.config import SIZES, Compute, Data, Optim, Train

config = Train(
    model=replace(SIZES["smollm-135m"], rope_theta=10_000.0, max_position_embeddings=2048),
    steps=600_000,  # x 1,048,576 tokens = 629B
    data=Data(
        sources={
            "shards/fineweb-edu-dedup": 0.70,
            "shards/cosmopedia-v2": 0.15,
            "shards/python-edu": 0.08,
            "shards/open-web-math": 0.06,
            "shards/stackoverflow": 0.01,
        },
        seq_len=2048,
        batch_size=512,  # rows: 32 replicas x 8 rows x 2 micro-batches; x 2,048 = 1,048,576 tokens
        mask_documents=False,  # plain causal attention over the row: documents see the ones before them
        seed=42,
    ),
    optim=Optim(
        lr=3e-3,
        warmup_steps=5000,
        decay_steps=100_000,  # from step 500,000: the last 16.7%
        decay="1-sqrt",
        min_lr=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        weight_decay_on="all",  # nanotron's list of exceptions was empty: norms and the embedding decay too
        clip=1.0,
    ),
    init_std=0.0416,  # about 1/sqrt(576)
    seed=8,
    save_every=2000,
    keep_every=100_000,  # ours; the start of the decay is among them
    # Ours: memory, not mathematics. 8 micro-batches are 64 rows each, the published 8 rows on each GPU of one 8-GPU
    # node; N devices of that size want accumulate = 64 / N.
    accumulate=8,
    compute=Compute(dtype="bfloat16"),
)
